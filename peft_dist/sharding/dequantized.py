"""Weights of 4 bits that stay dequantized on every process; their bytes stay where they were.

A frozen weight does not change, so what is dequantized once serves every pass. Where the base is
sharded, those bytes are no part of a unit that is gathered.
"""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from peft_dist.common.errors import TrainingError
from peft_dist.common.sizes import megabytes
from peft_dist.model.nf4 import FrozenLinear4bit, dequantize
from peft_dist.sharding.engine import Engine

log = logging.getLogger(__name__)


class UngatheredWeights(nn.Module):
    """The 4-bit parameters of a block, for `fully_shard`: sharded like others, never gathered."""

    def __init__(self, block: nn.Module) -> None:
        """Take a block on `meta`."""
        super().__init__()
        self.linears = nn.ModuleList(linears_of([block]))

    def others(self) -> set[nn.Parameter]:
        """Return what is whole in a pass all the same: biases."""
        mine = {p for one in self.linears for p in (one.packed, one.absmax)}
        return set(self.parameters()) - mine


def linears_of(modules: Iterable[nn.Module]) -> list[FrozenLinear4bit]:
    """Return the 4-bit linears in some modules, in order."""
    return [m for one in modules for m in one.modules() if isinstance(m, FrozenLinear4bit)]


def keep_dequantized(blocks: Sequence[nn.Module], engine: Engine, dtype: torch.dtype) -> None:
    """Dequantize the 4-bit linears in some blocks for good. Collective.

    Args:
        blocks: Their base has been read.
        engine: Holds it.
        dtype: What the model computes in.
    """
    kept_bytes = 0
    for linear in linears_of(blocks):
        linear.kept = _dequantized(linear, engine, dtype)
        kept_bytes += linear.kept.nbytes
    if kept_bytes:
        log.info("base: %d blocks stay dequantized, %s", len(blocks), megabytes(kept_bytes))


def verify_dequantized(model: nn.Module, engine: Engine) -> None:
    """Dequantize again what was kept, and compare the bits. Collective.

    Raises:
        TrainingError: Naming the first weight that changed.
    """
    for name, linear in model.named_modules():
        if not isinstance(linear, FrozenLinear4bit) or linear.kept is None:
            continue
        if not torch.equal(_dequantized(linear, engine, linear.kept.dtype), linear.kept):
            raise TrainingError(
                f"the dequantized weight of {name} changed in training",
                remedy="the adapter is not to be trusted; please report this",
            )


def _dequantized(linear: FrozenLinear4bit, engine: Engine, dtype: torch.dtype) -> torch.Tensor:
    packed, absmax = engine.full_tensor(linear.packed), engine.full_tensor(linear.absmax)
    return dequantize(packed, absmax, block_size=linear.block_size, dtype=dtype)
