"""Run one rank's start and a step on fake tensors: exact bytes, without having them.

One CPU process stands for a rank of any world, in a process group that carries nothing. What runs
is the product's own `set_up_model` and `Trainer`; only what reads values is left out.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from peft_dist.common.errors import LaunchError
from peft_dist.config import Recipe
from peft_dist.config.batch_shape import longest_rows_of_step
from peft_dist.data.counts import SourceRows
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.world import World
from peft_dist.metrics.step import StepMetricsReader
from peft_dist.model import architectures, attention, experts
from peft_dist.model.proof import Way
from peft_dist.model.source import BaseSource
from peft_dist.model.weights import StoredTensor, WeightFiles
from peft_dist.model_setup import set_up_model
from peft_dist.sharding import ENGINES, Engine
from peft_dist.simulation.meter import Meter
from peft_dist.trainer import Trainer


@dataclass(frozen=True)
class Simulated:
    """What one rank does in a step, once everything is there."""

    peak_bytes: int
    """Most bytes of tensors at once."""
    start_peak_bytes: int
    """Most of them while the model is set up; reading and quantizing not counted."""
    base_bytes: int
    """Of the base, on this rank."""
    base_parameters: int
    trained_parameters: int
    flops: int
    carried_bytes: dict[str, int]
    """By collective: bytes of whole gathered tensors, and of summed vectors."""
    collectives: dict[str, int]
    """By collective: how many."""


class ShapeFiles(WeightFiles):
    """Stands where a model's files would: names, shapes and a dtype from its config alone."""

    def __init__(self, folder: Path, skeleton: PreTrainedModel, dtype: str) -> None:
        """Take every parameter of a model on `meta` for a tensor that is stored."""
        self.folder, self.files = folder, ()
        skeleton.tie_weights()
        self.tensors = {
            name: StoredTensor(folder, tuple(parameter.shape), dtype)
            for name, parameter in skeleton.named_parameters()
        }


class _NoSource(BaseSource):
    """Fills nothing."""

    def fill(self, *_args: Any, **_kwargs: Any) -> None:
        """Leave the parameters as they are."""


class _SilentReader(StepMetricsReader):
    def put(self, *_args: Any) -> None:
        """Keep nothing: metrics of fake tensors have no values."""


class _Trainer(Trainer):
    """A trainer whose metrics nobody reads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader = _SilentReader(self.world.device)

    def one_step(self) -> None:
        """Do the first step of a run, as full as any later one."""
        # AdamW makes its moments in its first update, which may change nothing.
        self.optimizer.step(torch.zeros((), dtype=torch.bool, device=self.world.device))
        self.setup.model.train()
        self._step(next(iter(self.rows.batches(self.plan.steps()))))


def simulate(recipe: Recipe, folder: Path, world: World) -> Simulated:
    """Run the start and a step of one rank, every row as long as `data.max_length` allows.

    Args:
        recipe: What to train.
        folder: Has the model's config.json; its weights are not read.
        world: The rank to stand for; its device is the CPU.

    Raises:
        LaunchError: For DeepSpeed's engines, which do not run on fake tensors.
    """
    if recipe.parallel.strategy.startswith("zero"):
        raise LaunchError(
            f"{recipe.parallel.strategy} cannot be simulated",
            where="parallel.strategy",
            remedy="plan it without --simulate",
        )
    torch_dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.size)
    try:
        return measure(recipe, folder, world, mode=FakeTensorMode(allow_non_fake_inputs=True))
    finally:
        torch_dist.destroy_process_group()


def measure(
    recipe: Recipe,
    folder: Path,
    world: World,
    *,
    mode: AbstractContextManager[object],
    steps: int = 1,
) -> Simulated:
    """Run a start and a step with a base that is not read; return what was counted. Collective.

    Routers choose by values, which there are none of: every expert gets as many tokens.

    Args:
        recipe: What to train.
        folder: Has the model's config.json; its weights are not read.
        world: This process's rank and world; the process group has been started.
        mode: What the steps run in: fake tensors, or nothing to use real ones.
        steps: How many; DeepSpeed fetches ahead from the second one on.
    """
    recipe, meter = _settled(recipe, world), Meter()
    one_call = nullcontext() if recipe.model.dtype == "float32" else _attention_of_gpus()
    with ExitStack() as stack, _one_thread(), _even_experts(), one_call:
        engines = _engines(stack, meter, mode)
        setup = set_up_model(
            recipe, world, _source(recipe, folder), engines=engines, prover=_first_way
        )
        rows = _rows(recipe, world.size)
        scores = np.zeros(rows.n_rows, dtype=np.float32)  # of a reference, where one is asked for
        trainer = _Trainer(setup, rows, None, reference=scores)
        meter.phase = "step"
        for _ in range(steps):
            trainer.one_step()
    return Simulated(
        peak_bytes=meter.peak_bytes["step"],
        start_peak_bytes=meter.peak_bytes["start"],
        base_bytes=setup.base_bytes_by_rank[world.rank],
        base_parameters=setup.base_parameters,
        trained_parameters=sum(p.numel() for p in setup.adapter.values()),
        flops=meter.flops["step"],
        carried_bytes={
            name: carried
            for (phase, name), carried in meter.carried_bytes.items()
            if phase == "step"
        },
        collectives={name: n for (phase, name), n in meter.collectives.items() if phase == "step"},
    )


def _of_step(counted: Mapping[tuple[str, str], int]) -> dict[str, int]:
    return {name: count for (phase, name), count in counted.items() if phase == "step"}


def _first_way(_run: Any, ways: list[Way], *_: Any) -> Way:
    """Return the way that is tried first: of fake tensors no losses can be compared."""
    return ways[0]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _even_experts() -> Iterator[None]:
    def evenly(chosen: torch.Tensor, count: int) -> list[int]:
        tokens, more = divmod(chosen.numel(), count)
        return [tokens + (expert < more) for expert in range(count)]

    before = experts.tokens_of_experts
    experts.tokens_of_experts = evenly
    try:
        yield
    finally:
        experts.tokens_of_experts = before


@contextmanager
def _attention_of_gpus() -> Iterator[None]:
    """Let attention keep what it keeps on GPUs, in 16 bits: no scores where it caps them."""

    def uncapped(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window: int | None,
        dropout: float,
        scaling: float | None,
        softcap: float,
    ) -> torch.Tensor:
        return scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=True
        )

    before = attention.capped_attention, attention.FLOAT32_TOKENS
    attention.capped_attention, attention.FLOAT32_TOKENS = uncapped, 0
    try:
        yield
    finally:
        attention.capped_attention, attention.FLOAT32_TOKENS = before


def _settled(recipe: Recipe, world: World) -> Recipe:
    """Return the recipe with what a start would find out on the nodes, and one step."""
    # Code for this machine would be other code, and says nothing of the bytes on a GPU.
    model = recipe.model.model_copy(update={"compile": "off"})
    train = recipe.train.model_copy(update={"steps": 1, "epochs": None})
    method = recipe.method
    if hasattr(
        method, "virtual_tokens"
    ):  # words to start from need a tokenizer, and change no size
        method = method.model_copy(update={"init": "random", "text": None})
    return recipe.model_copy(update={"model": model, "train": train, "method": method})


def _source(recipe: Recipe, folder: Path) -> BaseSource:
    if any(folder.glob("*.safetensors")):
        return _NoSource(WeightFiles(folder), None, folder)
    config = architectures.read_config(folder, task=recipe.model.task)
    stored = "F32" if getattr(config, "dtype", None) in (None, torch.float32) else "BF16"
    skeleton = architectures.build_skeleton(
        config, task=recipe.model.task, dtype=torch.bfloat16, attention="auto"
    )
    return _NoSource(ShapeFiles(folder, skeleton, stored), None, folder)


def _engines(
    stack: ExitStack, meter: Meter, mode: AbstractContextManager[object]
) -> dict[str, type[Engine]]:
    """Return engines that enter the mode, and begin to count, where parameters get memory.

    The model is built and wrapped on `meta` as ever: PEFT cannot move modules of fake tensors.
    """

    def measured(engine: type[Engine]) -> type[Engine]:
        class Measured(engine):  # type: ignore[valid-type, misc]
            def materialize(self, model: nn.Module) -> None:
                stack.enter_context(mode)
                stack.enter_context(meter)
                meter.phase = "start"
                super().materialize(model)

            def fingerprint(self, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
                return dict.fromkeys(parameters, 0)  # there are no values

            def adapters_agree(self) -> bool:
                return True

        return Measured

    return {name: measured(engine) for name, engine in ENGINES.items()}


def _rows(recipe: Recipe, processes: int) -> TokenizedRows:
    """Return rows of the longest length that the recipe allows, enough for a step."""
    length = recipe.data.max_length
    examples = max(longest_rows_of_step(recipe), processes)
    count = examples * recipe.rows_per_example
    tokens = np.zeros(count * length, dtype=np.int32)
    return TokenizedRows(
        tokens=tokens,
        trained=np.ones(len(tokens), dtype=bool),
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        class_ids=np.zeros(count, dtype=np.int32)
        if recipe.model.task == "sequence-classification"
        else None,
        label_names=(),
        pad_id=0,
        sources=(SourceRows("made up", examples, 0, 0, 0, count, count, ()),),
        fingerprint="",
        rows_per_example=recipe.rows_per_example,
        desirable=np.ones(examples, dtype=bool),
    )
