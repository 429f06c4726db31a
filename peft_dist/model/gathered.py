"""Modules whose parameters are whole only while they are used: embedding and head, where sharded.

An engine says how they become whole (`Gathers`); here is when.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from peft_dist.data.pack import Everyone


class Gathers(Protocol):
    """Holds the parameters of a module for an engine."""

    def gather(self) -> None:
        """Make them whole, where they are not. Collective."""

    def free(self) -> None:
        """Keep this process's part alone."""


class ScoresInSlices(Protocol):
    """Scores positions against a head of which every process holds a slice."""

    def most_targets(self, hidden_bytes: int, *, learns: bool) -> int:
        """Return for how many labelled positions of a process slices carry fewer bytes at most."""

    def pays(self, everyone: Everyone, hidden_bytes: int) -> bool:
        """Whether to do so, instead of gathering the head."""

    def cross_entropy(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        after: Callable[[torch.Tensor], torch.Tensor] | None,
        most: int,
    ) -> torch.Tensor:
        """Return the losses, float32 [N], of targets [N]; N is at most `most`. Collective."""


def bytes_of_position(hidden: torch.Tensor) -> int:
    """Return the bytes of hidden states [..., H] of one position, in what is computed in."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.shape[-1] * dtype.itemsize


_HOLDER, _SCORER = "gathered_by", "scored_by"


def score_in_slices(head: nn.Module, scorer: ScoresInSlices) -> None:
    """Have a head's positions scored so where that pays."""
    head.__dict__[_SCORER] = scorer


def scorer_of(head: Any) -> ScoresInSlices | None:
    """Return what `score_in_slices` was told, if it was."""
    scorer: ScoresInSlices | None = head.__dict__.get(_SCORER)
    return scorer


def gather_for_use(module: nn.Module, holder: Gathers, *, free: bool = True) -> None:
    """Have a module's parameters whole in each of its calls, and inside `gathered`.

    Args:
        module: An embedding, whose backward does not need them, or a linear.
        holder: Gathers them.
        free: Whether they are freed after a call; else whoever uses them next has to. After the
            call of a linear that is to have a backward, the engine frees them at the step's end.
    """

    def after_forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not (isinstance(module, nn.Linear) and output.requires_grad):
            holder.free()

    module.__dict__[_HOLDER] = holder
    module.register_forward_pre_hook(lambda *_: holder.gather())
    if free:
        module.register_forward_hook(after_forward)


@contextmanager
def gathered(module: Any) -> Iterator[None]:
    """Have a module's parameters whole, for who reads them without a call. Collective."""
    holder: Gathers | None = module.__dict__.get(_HOLDER)
    if holder is not None:
        holder.gather()
    try:
        yield
    finally:
        if holder is not None:
            holder.free()
