"""Products of tokens with their experts' weights in one call, where a GPU has a kernel for it.

Expert by expert, a layer of 128 is a thousand launches, and the host waits to hear which are hit.
Here it waits for nothing: no more experts are dequantized than tokens could hit, those that are hit
first, and of each so many rows at a time that they take little memory.
"""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import grouped_mm, pad

from peft_dist.model.nf4 import dequantize

KERNEL_MAJORS = (9, 10)
"""Major compute capabilities of GPUs that torch's kernel is built for (H100, B200).

Elsewhere, and in other dtypes than bfloat16, `grouped_mm` waits for the sizes and multiplies one by
one (aten/src/ATen/native/cuda/GroupedBlas.cpp, _grouped_mm_cuda)."""
ALIGNED = 8
"""Elements that the sides of a matrix are a multiple of: 16 bytes."""
MOST_BYTES = 1 << 29
"""Of dequantized weights at a time."""


class Groups(NamedTuple):
    """Tokens that are sorted by their experts."""

    experts: torch.Tensor | None
    """int64 [n], first those that are hit, in order; None for all there are."""
    ends: torch.Tensor
    """int32 [n], where the tokens of each end."""


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device multiplies groups in one call, without the host."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device)[0] in KERNEL_MAJORS
    )


def groups_of(experts: torch.Tensor, count: int) -> Groups:
    """Return the groups of tokens whose experts, int64 [S] of `count`, are sorted."""
    every = torch.arange(count, device=experts.device)
    ends = torch.searchsorted(experts, every, right=True)
    if count <= len(experts):
        return Groups(None, ends.to(torch.int32))
    sizes = ends.diff(prepend=ends.new_zeros(1))
    some = (sizes == 0).to(torch.uint8).sort(stable=True).indices[: len(experts)]
    return Groups(some, sizes[some].cumsum(0).to(torch.int32))


def times_frozen(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    groups: Groups,
    *,
    block_size: int,
    turned: bool,
) -> torch.Tensor:
    """Multiply tokens with weights in 4 bits; the gradient is for x alone.

    Args:
        x: [S, in], sorted by expert.
        packed: uint8 [E, rows, columns / 2].
        absmax: uint8 [E, rows, columns / block_size * 4].
        groups: Of the tokens.
        block_size: Values that have a scale.
        turned: Whether weights are stored as [in, out].

    Returns:
        [S, out].
    """
    product: torch.Tensor = _FrozenGroupedMatmul.apply(  # type: ignore[no-untyped-call]
        x, packed, absmax, *groups, block_size, turned
    )
    return product


class _FrozenGroupedMatmul(torch.autograd.Function):
    """As `nf4._FrozenMatmul`: the parameters are saved, which an engine frees and gathers."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        experts: torch.Tensor,
        ends: torch.Tensor,
        block_size: int,
        turned: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, absmax, experts, ends)
        ctx.facts = block_size, turned
        return _in_parts(x, packed, absmax, Groups(experts, ends), block_size, turned)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        packed, absmax, experts, ends = ctx.saved_tensors
        block_size, turned = ctx.facts
        groups = Groups(experts, ends)
        own = _in_parts(grad.contiguous(), packed, absmax, groups, block_size, not turned)
        return own, *[None] * 6


def _in_parts(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    groups: Groups,
    block_size: int,
    as_stored: bool,
) -> torch.Tensor:
    """Multiply with weights [rows, columns] as they are stored, or with their transpose."""
    count, rows, columns = len(groups.ends), packed.shape[1], 2 * packed.shape[2]
    at_once = MOST_BYTES // (count * columns * x.element_size()) // ALIGNED * ALIGNED
    at_once = max(at_once, ALIGNED)
    parts: list[torch.Tensor] = []
    for start in range(0, rows, at_once):
        some = slice(start, min(start + at_once, rows))
        weight = dequantize(
            _of(groups, packed[:, some]).flatten(0, 1),
            _of(groups, absmax[:, some]).flatten(0, 1),
            block_size=block_size,
            dtype=x.dtype,
        ).view(count, -1, columns)
        if not as_stored:
            parts.append(grouped_mm(x, weight.transpose(1, 2), offs=groups.ends))
            continue
        product = grouped_mm(x[:, some], weight, offs=groups.ends)
        parts = [product if not parts else parts[0] + product]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _of(groups: Groups, weights: torch.Tensor) -> torch.Tensor:
    return weights if groups.experts is None else weights[groups.experts]


def times(x: torch.Tensor, weight: torch.Tensor, groups: Groups, *, turned: bool) -> torch.Tensor:
    """Multiply tokens [S, in] with weights [E, out, in], or [E, in, out] where they are turned."""
    some = _of(groups, weight)
    product: torch.Tensor = grouped_mm(
        x, some if turned else some.transpose(1, 2), offs=groups.ends
    )
    return product * 1  # whose gradient lies as `grouped_mm` wants it


def times_low_rank(
    x: torch.Tensor, left: torch.Tensor, right: torch.Tensor, groups: Groups, *, turned: bool
) -> torch.Tensor:
    """Multiply tokens [S, in] with left [E, rows, r] @ right [E, r, columns], or its transpose."""
    missing = -left.shape[2] % ALIGNED
    left = pad(left.to(x.dtype), (0, missing)).contiguous()
    right = pad(right.to(x.dtype), (0, 0, 0, missing)).contiguous()
    first, second = (left, right) if turned else (right, left)
    return times(times(x, first, groups, turned=turned), second, groups, turned=turned)
