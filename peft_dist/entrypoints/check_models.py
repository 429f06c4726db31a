"""Try every model that the installed transformers can build: is it trained as it should be?

Each type is built tiny and random, saved, loaded by this project, and compared with what
transformers makes of the same files: the loss of every token and the gradient of the adapter.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from peft_dist.common import logs
from peft_dist.common.console import show
from peft_dist.common.errors import PeftDistError, RecipeError, TrainingError
from peft_dist.config import Recipe
from peft_dist.config.models import known_to_transformers
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.methods.method import base_name_in
from peft_dist.model import architectures, attention
from peft_dist.model.expected import LOOKS_AHEAD
from peft_dist.model.loss import Losses
from peft_dist.model.nf4 import dequantize
from peft_dist.model.probe import probe_rows
from peft_dist.model.source import find_base
from peft_dist.model.tiny_config import tiny_config
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.worker.process import run_worker

MOST_PARAMETERS = 20_000_000
"""A type that cannot be made smaller than this is not tried."""
LARGEST_DIFFERENCE = 1e-4
"""Of two losses of a token, and of gradients over their largest."""


_CLASSES = ("a", "b", "c")


Score = Callable[[Any, torch.Tensor], torch.Tensor]
"""From a model and the tokens of a row to its losses."""


class Result(NamedTuple):
    """What was found of one type: `equal`, `refused`, `not built`, `different` or `failed`."""

    kind: str
    detail: str
    dense: bool = False
    """Whether it was built, has no experts, and does not look ahead."""


def check(
    model_type: str,
    folder: Path,
    world: World,
    *,
    quantization: str = "none",
    classify: bool = False,
) -> Result:
    """Try one type, as a classifier or as a decoder; `folder` is used up. Collective."""
    auto = _auto(classify=classify)
    try:
        model = build_tiny(model_type, classify=classify)
    except Exception as error:  # a type may want anything
        return Result("not built", _line(error))
    model.save_pretrained(folder / "model")
    recipe = Recipe.model_validate(
        {
            "model": {
                "name": str(folder / "model"),
                "dtype": "float32",
                "task": "sequence-classification" if classify else "causal-lm",
            },
            "data": {"train": "none.jsonl"},
            "method": {"kind": "lora", "rank": 2},
            "quantization": quantization,
        }
    )
    dense = not any("expert" in name for name, _ in model.named_parameters())
    try:
        setup = _set_up(recipe, world, folder / "cache")
        plain = auto.from_pretrained(
            folder / "model", dtype=torch.float32, trust_remote_code=False
        ).eval()
        plain.config.use_cache = False
        attention.use_kernel(plain, "eager")
        if quantization == "nf4":
            _dequantize_into(plain, setup)
        problem = _difference(setup, plain)
    except PeftDistError as error:
        return Result("refused", str(error), dense and LOOKS_AHEAD not in str(error))
    except Exception as error:  # that is what is looked for
        return Result("failed", f"{type(error).__name__}: {_line(error)}", dense)
    if problem:
        return Result("different", problem, dense)
    way = f"{'packed' if setup.packing else 'padded'}, {plain_name(setup)}"
    way += ", ddp" if setup.strategy == "ddp" else ""
    return Result("equal", way, dense)


def _set_up(recipe: Recipe, world: World, cache: Path) -> ModelSetup:
    """Load it as a run does, without shards where its layers share weights."""
    try:
        return _open(recipe, world, cache)
    except RecipeError as error:  # of layers that share weights
        if error.where != "parallel.strategy":
            raise
    ddp = recipe.parallel.model_copy(update={"strategy": "ddp"})
    return _open(recipe.model_copy(update={"parallel": ddp}), world, cache)


def _open(recipe: Recipe, world: World, cache: Path) -> ModelSetup:
    classes = _CLASSES if recipe.model.task == "sequence-classification" else ()
    return set_up_model(recipe, world, find_base(recipe, cache), label_names=classes)


def _auto(*, classify: bool) -> Any:
    return AutoModelForSequenceClassification if classify else AutoModelForCausalLM


def build_tiny(model_type: str, *, classify: bool = False) -> PreTrainedModel:
    """Return a random model of a type, float32; raises whatever the type raises."""
    config = tiny_config(model_type, as_decoder=not classify)
    if classify:
        config.num_labels = len(_CLASSES)
    auto = _auto(classify=classify)
    with torch.device("meta"):
        bare = auto.from_config(config, trust_remote_code=False)
        size = sum(p.numel() for p in bare.parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"it has {size} parameters at least")
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            # Released models have no zero biases and no norms of exactly one; a mix-up must show.
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.add_(torch.randn_like(buffer) * 0.02)
    model.eval()
    return model


def plain_name(setup: ModelSetup) -> str:
    """Return the kernel that a model setup computes attention with."""
    return str(architectures.bare_model(setup.peft).config._attn_implementation)


def _dequantize_into(plain: PreTrainedModel, setup: ModelSetup) -> None:
    """Give a full-precision model the values that a 4-bit one computes with. Collective."""
    by_name = {base_name_in(setup.peft, name): p for name, p in setup.base.items()}
    whole = setup.engine.full_tensor
    parameters = dict(plain.named_parameters())
    for name in [name for name in by_name if name.endswith("packed")]:
        stem = name.removesuffix("packed")
        packed, absmax = whole(by_name[name]), whole(by_name[stem + "absmax"])
        columns = packed.shape[-1] * 2
        weight = dequantize(
            packed.flatten(0, -2),
            absmax.flatten(0, -2),
            block_size=columns // (absmax.shape[-1] // 4),
            dtype=torch.float32,
        )
        target = parameters[stem[:-1] + ".weight" if stem.endswith(".") else stem[:-1]]
        module = plain.get_submodule(stem[:-1]) if stem.endswith(".") else None
        weight = weight.t() if isinstance(module, Conv1D) else weight
        target.data.copy_(weight.reshape(target.shape))


def _difference(setup: ModelSetup, plain: PreTrainedModel) -> str | None:
    """Compare losses with another model's, and gradients with those of transformers' forward."""
    bare = architectures.bare_model(setup.peft)
    classify = setup.recipe.model.task == "sequence-classification"
    rows = probe_rows(bare, classified=classify)
    score = _nll_of_class if classify else _nll
    batch = setup.pack(rows, np.arange(rows.n_rows))
    setup.model.train()
    with torch.no_grad():
        first, second = setup.model(batch).nll, setup.model(batch).nll
    if not torch.equal(first, second):  # routers that draw by chance while they train
        setup.model.eval()
    ours = setup.model(batch).nll
    ours.sum().backward()
    setup.model.eval()
    found = {name: p.grad.clone() for name, p in setup.adapter.items() if p.grad is not None}
    setup.engine.zero_gradients()
    theirs = []
    for ids in _ids(rows):
        with torch.no_grad():
            theirs.append(score(plain, ids))
        setup.model(batch, None, lambda model, _, ids=ids: _backward(model, ids, score))
    largest = float((ours.detach() - torch.cat(theirs)).abs().max())
    if not largest <= LARGEST_DIFFERENCE:
        return f"the loss of a {'row' if classify else 'token'} by {largest:.2g}"
    # The last bit of the largest gradient, of which a thousandth may differ.
    rounding = 1e-4 * max(float(gradient.abs().max()) for gradient in found.values())
    for name, parameter in setup.adapter.items():
        expected = parameter.grad
        if expected is None or not expected.any() and not found[name].any():
            continue
        scale = max(float(expected.abs().max()), rounding)
        largest = float((found[name] - expected).abs().max()) / scale
        if not largest <= 1e-3:
            return f"the gradient of {base_name_in(setup.peft, name)} by {largest:.2g}"
    if not any(gradient.any() for gradient in found.values()):
        return "the adapter gets no gradient"
    return None


def _backward(model: PreTrainedModel, ids: torch.Tensor, score: Score) -> Losses:
    before = model.config._attn_implementation
    attention.use_kernel(model, "eager")
    nll = score(model, ids)
    nll.sum().backward()
    attention.use_kernel(model, before)
    return Losses(nll, None)


def _nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def _nll_of_class(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[None]).logits.float()
    return torch.nn.functional.cross_entropy(logits, torch.zeros(1).long(), reduction="none")


def _ids(rows: Any) -> Iterator[torch.Tensor]:
    for start, stop in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        yield torch.from_numpy(rows.tokens[start:stop].astype(np.int64))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def main(argv: list[str]) -> int:
    """Try models and print a table; exit code 3 where one is different or fails."""
    parser = argparse.ArgumentParser(prog="peft-dist models --check", description=main.__doc__)
    parser.add_argument("types", nargs="*", help="model types (default: all)")
    parser.add_argument("--classify", action="store_true", help="classifiers, not decoders")
    parser.add_argument("--nf4", action="store_true", help="with a base in 4 bits")
    options = parser.parse_args(argv)
    logs.begin(on_screen=False)  # standard output holds the table alone
    return run_worker(lambda _: _check_all(options))


def _check_all(options: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    world = read_world()
    process_group.start(world)
    counts: dict[str, int] = {}
    dense: list[bool] = []
    quantization = "nf4" if options.nf4 else "none"
    for name in options.types or known_to_transformers(classify=options.classify):
        with tempfile.TemporaryDirectory(prefix="peft-dist-") as folder:
            result = check(
                name,
                Path(folder),
                world,
                quantization=quantization,
                classify=options.classify,
            )
        counts[result.kind] = counts.get(result.kind, 0) + 1
        if result.dense:
            dense.append(result.kind == "equal")
        show(f"{name:28} {result.kind:10} {result.detail}")
    show(", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))
    if dense and not options.classify:
        share = sum(dense) / len(dense)
        show(f"of {len(dense)} dense decoders {sum(dense)} equal, {share:.0%}")
    process_group.stop()
    wrong = counts.get("different", 0) + counts.get("failed", 0)
    if wrong:
        raise TrainingError(f"{wrong} of these are wrong", remedy="please report this")


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
