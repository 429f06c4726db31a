"""Transformer blocks compiled by torch: few kernels between their products.

One compiled code serves all equal blocks and micro-batches of all lengths, so that compiling takes
the same time whatever the depth. Hooks of an engine stay outside: it gathers a block, then the
block runs. Blocks that do not compile run as they are.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.cache_folder import code_folder
from peft_dist.common.errors import line_of
from peft_dist.config import Recipe
from peft_dist.distributed.world import World
from peft_dist.model.attention import has_own_code

log = logging.getLogger(__name__)

_VARIANTS = 32
"""Most compiled codes of a kind of block: one for the first block, whose input has no gradient, and
one for the others, each with the windows of the proof and of training."""
_MOST_THREADS = 8
"""That compile side by side for a process; torch would start one for each core, in every rank."""


def set_up_compiler(
    folder: Path | None,
    processes: int,
    *,
    deterministic: bool,
    environ: MutableMapping[str, str] = os.environ,
) -> None:
    """Have what is compiled kept in a folder, from which the next start takes it.

    Args:
        folder: Is made where it is not there; who can write to it is trusted. None: torch's own.
        processes: That compile on this machine at the same time.
        deterministic: Whether the same inputs must give the same bits: else reductions are arranged
            as was fastest in a trial.
        environ: What torch reads where it looks for code.
    """
    # Takes a second, which a run without it need not wait for.
    from torch._inductor import config

    cores = len(os.sched_getaffinity(0))
    config.compile_threads = max(1, min(_MOST_THREADS, cores // processes))
    config.deterministic = config.deterministic or deterministic
    if folder is not None:
        environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def of(
    recipe: Recipe,
    model: PreTrainedModel,
    blocks: Mapping[str, nn.Module],
    world: World,
    cache_dir: Path,
) -> "CompiledBlocks | None":
    """Return the blocks of a model as an engine has wrapped it, ready to be compiled; or none."""
    if not blocks and not has_own_code(model.config):
        return None
    folder, deterministic = code_folder(cache_dir), recipe.train.deterministic
    set_up_compiler(folder, world.local_size, deterministic=deterministic)
    if not blocks:
        return None
    return CompiledBlocks(blocks.values(), model.config.model_type)


class CompiledBlocks:
    """Takes the place of the `forward` of each block, in passes that have a backward.

    Scoring runs blocks as they are: code for it would have to be compiled as well.

    Attributes:
        on: Whether blocks run compiled.
        problem: Why they could not since `switch`, in one line; empty where nothing has failed.
    """

    def __init__(self, blocks: Iterable[nn.Module], model_type: str) -> None:
        """Take the blocks of a model as an engine has wrapped it; until `on` they run as they are.

        Args:
            blocks: Equal ones share their code.
            model_type: What the model is called where its blocks do not compile.
        """
        from torch._dynamo import config, exc

        config.recompile_limit = max(config.recompile_limit, _VARIANTS)
        # Sizes of heads among them, which FSDP2 would have vary; what does vary has a tensor.
        config.specialize_int = True
        self._errors = (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)
        self.switch(on=False)
        self._model_type = model_type
        codes: dict[Any, Callable[..., Any]] = {}
        for block in blocks:
            forward = type(block).forward
            if forward not in codes:
                codes[forward] = torch.compile(forward, fullgraph=True, dynamic=True)
            # On the module and not as a call of it, so that hooks are no part of the code.
            block.forward = self._forward_of(block, forward, codes[forward])

    def switch(self, *, on: bool, told: bool = False) -> None:
        """Let blocks run compiled from now on, or as they are.

        Args:
            on: Whether compiled.
            told: Whether to warn where they do not compile; a proof tells so itself.
        """
        self.on, self.problem, self._told = on, "", told

    def _forward_of(
        self, block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        index, windowed = _layer_index(block), _windowed(block)

        def forward(*inputs: Any, **arguments: Any) -> Any:
            if not (self.on and torch.is_grad_enabled()):
                return plain(block, *inputs, **arguments)
            prefix = arguments.get("prefix")
            if isinstance(prefix, tuple) and index is not None:
                arguments["prefix"] = prefix[index]  # else each layer would have code of its own
            if isinstance(blocks := arguments.get("row_blocks"), dict) and windowed is not None:
                arguments["row_blocks"] = blocks.get(windowed.sliding_window)  # likewise
            if isinstance(lengths := arguments.get("row_lengths"), tuple):
                arguments["row_lengths"] = torch.tensor(lengths)  # else each batch would
            if isinstance(longest := arguments.get("longest_row"), int):
                arguments["longest_row"] = _size_that_varies(longest)
            _fix_widths((*inputs, *arguments.values()))
            try:
                return compiled(block, *inputs, **arguments)
            except self._errors as error:
                cause = getattr(error, "inner_exception", error)
                self.on, self.problem = False, line_of(cause)
                log.log(
                    logging.WARNING if self._told else logging.DEBUG,
                    "%s: its blocks are not compiled and run slower: %s",
                    self._model_type,
                    self.problem,
                )
                return plain(block, *inputs, **arguments)

        return forward


def _fix_widths(given: Iterable[Any]) -> None:
    """Say which sizes of what a block is given are the same in every pass.

    What is left varies with the rows. Widths that could vary would make slower code.
    """
    from torch._dynamo import mark_static

    for one in given:
        if isinstance(one, tuple):  # cosines and sines of positions
            _fix_widths(one)
        elif isinstance(one, torch.Tensor) and one.is_floating_point():
            if one.dim() == 3:  # [B, T, width]
                mark_static(one, 2)
            elif one.requires_grad:  # a prefix; masks have no gradient
                mark_static(one)


def _size_that_varies(size: int) -> torch.Tensor:
    """Return a tensor of a size that is no constant of code, also where another is equal to it."""
    from torch._dynamo import maybe_mark_dynamic

    tensor = torch.empty(size, dtype=torch.bool)
    maybe_mark_dynamic(tensor, 0)
    return tensor


def _windowed(block: nn.Module) -> Any | None:
    """Return the one module of a block that has a window, which may change."""
    found = [module for module in block.modules() if hasattr(module, "sliding_window")]
    return found[0] if len(found) == 1 else None


def _layer_index(block: nn.Module) -> int | None:
    """Return the place that the attention of a block has among those of all blocks."""
    found = {getattr(module, "layer_idx", None) for module in block.modules()} - {None}
    return found.pop() if len(found) == 1 else None
