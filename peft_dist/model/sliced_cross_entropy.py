"""Cross-entropy against a vocabulary of which every process holds a slice, for the rows of all.

Hidden states travel to the slices, three numbers a position come of each, and the gradients of the
hidden states travel back. All of it in forward: an objective may weigh positions as it likes, and a
process that has none in its backward keeps nobody waiting.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as torch_dist
from torch.nn import functional

from peft_dist.distributed.collectives import Shard
from peft_dist.model.cross_entropy import (
    HALF_SCALE,
    LOGIT_BYTES_PER_CHUNK,
    After,
    logits_of,
    times_vocabulary,
)
from peft_dist.model.token_rows import OutputMatrix

ID_DTYPE = torch.int32
"""Of the targets that processes tell each other."""
NUMBERS = 3
"""Float32, of each position and slice: largest logit, logarithm of its share of the slice, logit of
the target."""
LEAST_SPARED_BYTES = 4 << 20
"""Of fewer, the collectives that slices take in place of one gather take longer than these bytes:
four, of some 25 microseconds, at 45 GB/s."""


def can_be_slices(vocabulary: int, shards: int) -> bool:
    """Whether every one of so many shards has a row; of 32,000, the last of 512 have none."""
    return shards > 1 and (shards - 1) * -(-vocabulary // shards) < vocabulary


def scored_bytes(targets: int, hidden_bytes: int, shards: int, *, learns: bool) -> int:
    """Return what scoring in slices carries to and from one process.

    Args:
        targets: Most of any process.
        hidden_bytes: Of the hidden states of a position.
        shards: Processes that hold one copy of the matrix.
        learns: Whether gradients travel back.
    """
    numbers = shards * NUMBERS * torch.float32.itemsize
    each = hidden_bytes * (2 if learns else 1) + ID_DTYPE.itemsize + numbers
    return shards * targets * each


class Slices(NamedTuple):
    """How a vocabulary is divided: by rows, as `torch.chunk` does."""

    vocabulary: int
    """Rows of the whole matrix."""
    shard: Shard
    """Who holds which."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """The context of what may be waiting for other processes."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return [shards * N, ...] of the tensors [N, ...] of all. Collective."""
        out = own.new_empty(self.shard.count * len(own), *own.shape[1:])
        with self.waiting():
            torch_dist.all_gather_into_tensor(out, own, group=self.shard.group)
        return out

    def gather_rows(self, own: torch.Tensor, most: int) -> torch.Tensor:
        """Return [shards * most, ...] of tensors of at most so many rows each. Collective."""
        padding = [0, 0] * (own.dim() - 1) + [0, most - len(own)]
        return self.gather(functional.pad(own, padding).contiguous())

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Return what all have for this process of tensors [shards * N, ...]. Collective."""
        out = torch.empty_like(parts)
        with self.waiting():
            torch_dist.all_to_all_single(out, parts, group=self.shard.group)
        return out


def sliced_cross_entropy(
    hidden: torch.Tensor,
    matrix: OutputMatrix,
    targets: torch.Tensor,
    after: After | None,
    *,
    most: int,
    slices: Slices,
) -> torch.Tensor:
    """Return the negative log-likelihood, float32 [N], of targets [N]. Collective.

    Args:
        hidden: [N, H]; N may be 0.
        matrix: This process's rows of a frozen one, as `torch.chunk` divides it.
        targets: int64 [N], token ids of the whole vocabulary.
        after: Maps products to logits, each by itself.
        most: N of the process that has most.
        slices: Who holds which rows.
    """
    nll: torch.Tensor = _SlicedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # it is torch's
        hidden, targets, matrix, after, most, slices
    )
    return nll


class _SlicedCrossEntropy(torch.autograd.Function):
    """The gradients of all positions are made in forward, as in one process; see `cross_entropy`.

    Backward scales those of this process's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        matrix: OutputMatrix,
        after: After | None,
        most: int,
        slices: Slices,
    ) -> torch.Tensor:
        shard, own = slices.shard, len(hidden)
        first, _ = shard.rows(slices.vocabulary)
        asked = slices.gather_rows(hidden, most)
        ids = slices.gather_rows(targets.to(ID_DTYPE), most).long() - first
        rows = matrix.weight.shape[0]
        elsewhere, at = (ids < 0) | (ids >= rows), ids.clamp(0, rows - 1)[:, None]
        learns, is_half = ctx.needs_input_grad[0], hidden.dtype == torch.float16
        step_dtype = torch.float32 if is_half else hidden.dtype
        ctx.scale = HALF_SCALE if is_half else 1.0
        nll = asked.new_empty(len(asked), dtype=torch.float32)
        grad = torch.empty_like(asked) if learns else None
        # All have as many parts, whatever rows they have themselves.
        size = max(1, LOGIT_BYTES_PER_CHUNK // (4 * -(-slices.vocabulary // shard.count)))
        for start in range(0, len(asked), size):
            part = slice(start, start + size)
            target = elsewhere[part], at[part]
            nll[part], step = _losses(
                asked[part], matrix, target, after, slices, step_dtype if learns else None
            )
            if grad is not None and step is not None:
                step = step.mul_(HALF_SCALE) if is_half else step
                grad[part] = times_vocabulary(step.to(hidden.dtype), matrix)
            del step
        back = None
        if grad is not None:
            parts = slices.exchange(grad).view(shard.count, most, -1)
            # Summed here and not on the way, where 16 bits would be rounded at every process.
            back = parts[:, :own].sum(0, dtype=torch.float32)
            back = back.to(hidden.dtype)
        ctx.save_for_backward(back)
        return nll[shard.index * most :][:own].clone()

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        to_hidden = None
        if back is not None:
            to_hidden = back * (grad_nll[:, None] / ctx.scale).to(back.dtype)
        return to_hidden, None, None, None, None, None


def _losses(
    hidden: torch.Tensor,
    matrix: OutputMatrix,
    target: tuple[torch.Tensor, torch.Tensor],
    after: After | None,
    slices: Slices,
    step_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the losses [N], and their gradient by this slice's products [N, rows], if any.

    Args:
        hidden: [N, H].
        matrix: The slice.
        target: bool [N], whether another slice has it, and int64 [N, 1], which row it is here.
        after: Maps products to logits.
        slices: Who holds which.
        step_dtype: Of the gradient; None where none is asked for.
    """
    (elsewhere, at), learns = target, step_dtype is not None
    products = logits_of(hidden, matrix)
    logits = products
    if after is not None:
        with torch.set_grad_enabled(learns):
            logits = after(products.requires_grad_(learns))
    values = logits.detach()
    top, mine = values.amax(1), values.gather(1, at).squeeze(1)
    log_shares = torch.log_softmax(values, dim=1)  # of what this slice has
    numbers = torch.stack([top, log_shares.amax(1), mine.masked_fill_(elsewhere, 0.0)])
    tops, largest, picked = slices.gather(numbers).view(slices.shard.count, NUMBERS, -1).unbind(1)
    highest = tops.amax(0)
    parts = tops - highest - largest  # of each slice, the logarithm of its sum
    of_slices = torch.log_softmax(parts, dim=0)
    # As one kernel has it, and exact where one slice is nearly all.
    total = parts.amax(0) - of_slices.amax(0)
    # One slice has the target's logit, the others 0; the largest logit is taken off beforehand, or
    # a token that is nearly certain would be lost to rounding.
    nll = total - (picked.sum(0) - highest)
    if not learns:
        return nll, None
    log_shares += of_slices[slices.shard.index][:, None]
    step = torch.empty_like(log_shares, dtype=step_dtype if after is None else torch.float32)
    torch.exp(log_shares, out=step)
    del log_shares
    # As there, exp(x) - 1 is computed as one. Of other slices' targets, what stands there stays.
    there = step.gather(1, at).squeeze(1)
    certain = torch.where(elsewhere, there, torch.expm1(-nll).to(step.dtype))
    step.scatter_(1, at, certain[:, None])
    if after is not None:
        (step,) = torch.autograd.grad(logits, products, step)
    return nll, step.to(step_dtype)
