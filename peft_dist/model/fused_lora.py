"""LoRA on a 4-bit weight without a product of its own: x @ (W + s B A)^T.

The update is added while the weight is dequantized, as it is in each pass anyway. What products of
[T, out] and [T, in] of its own would read and write falls away, and their launches; the gradients
of A and B are products as before. An update that is too small for an output in 16 bits is not lost:
W + s B A is rounded once, from values that have more digits, and not added to what is rounded.

A product that dequantizes what it needs would do so once for each tile of tokens, which takes more
time from some 2,000 tokens on; see `benchmarks/weight_kernel.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peft_dist.model.nf4 import dequantize

LEAST_CAPABILITY = (8, 0)
"""Of the first cards that multiply TF32 (A100)."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PRODUCTS_PER_BYTE = 8
"""Products of A and B that take as long as a byte of the card's memory: a tile of the kernel reads
4 (1 / 64 + 1 / 128) bytes for each, in either pass, from a cache that is 1.5 times as fast."""


@dataclass(frozen=True)
class WeightUpdate:
    """An update of a weight.

    Attributes:
        a: float32 [r, in].
        b: float32 [out, r].
        factor: What B A is multiplied by.
    """

    a: torch.Tensor
    b: torch.Tensor
    factor: float

    def product(
        self, x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        """Return x [..., in] times the updated weight; there are gradients of x, a and b."""
        multiply = _operator if torch.compiler.is_compiling() else _Product.apply
        y: torch.Tensor = multiply(x, packed, absmax, self.a, self.b, self.factor, block_size)  # type: ignore[no-untyped-call]
        return y


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is made for a device and a dtype; it may fail on it all the same."""
    if device.type != "cuda" or torch.version.hip is not None or dtype not in DTYPES:
        return False
    return torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def fewest_tokens(shape: torch.Size, rank: int, dtype: torch.dtype) -> int:
    """Return from how many tokens on the kernel takes less time than products of their own.

    Those read and write [T, out] once more in the forward pass, and [T, in] twice in the backward.

    Args:
        shape: Of `packed`, [out, in / 2].
        rank: Of the update.
        dtype: Of x.
    """
    rows, columns = shape[0], shape[1] * 2
    spared_bytes_per_token = dtype.itemsize * (2 * rows + 4 * columns)
    read_bytes = rank * rows * columns / _PRODUCTS_PER_BYTE
    return math.ceil(read_bytes / spared_bytes_per_token)


def updated_weight(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    low: WeightUpdate,
    *,
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return dequantize(packed) + factor * b @ a, [out, in], rounded once; by the kernel."""
    # Imports Triton, which is there for CUDA alone.
    from peft_dist.model import nf4_kernel

    return nf4_kernel.updated_weight(
        packed, absmax, low.a, low.b, factor=low.factor, block_size=block_size, dtype=dtype
    )


def _in_float32(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Return one @ two in float32, without a copy where torch can."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.mm(one, two, out_dtype=torch.float32)
    return (one @ two).float()


def _scaled(one: torch.Tensor, two: torch.Tensor, factor: float) -> torch.Tensor:
    """Return factor * (one @ two), as one call of the library."""
    return torch.addmm(one.new_empty(()), one, two, beta=0, alpha=factor)


def _product(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    factor: float,
    block_size: int,
) -> torch.Tensor:
    """Return x [..., in] @ (dequantize(packed) + factor * b @ a).T."""
    tokens = x.flatten(0, -2)
    if len(tokens) >= fewest_tokens(packed.shape, len(a), x.dtype):
        low = WeightUpdate(a, b, factor)
        weight = updated_weight(packed, absmax, low, block_size=block_size, dtype=x.dtype)
        y = tokens @ weight.t()
    else:
        y = tokens @ dequantize(packed, absmax, block_size=block_size, dtype=x.dtype).t()
        y.addmm_(_scaled(tokens, a.to(x.dtype).t(), factor), b.to(x.dtype).t())
    return y.view(*x.shape[:-1], packed.shape[0])


def _gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    factor: float,
    block_size: int,
    of_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, empty unless asked for, a and b."""
    dtype, tokens, above = x.dtype, x.flatten(0, -2), grad.flatten(0, -2)
    own_a, own_b = a.to(dtype), b.to(dtype)
    low = _scaled(tokens, own_a.t(), factor)
    low_grad = _scaled(above, own_b, factor)
    of_a = _in_float32(low_grad.t(), tokens)
    of_b = _in_float32(above.t(), low)
    if not of_x:
        return x.new_empty(0), of_a, of_b
    if len(tokens) >= fewest_tokens(packed.shape, len(a), dtype):
        update = WeightUpdate(a, b, factor)
        found = above @ updated_weight(packed, absmax, update, block_size=block_size, dtype=dtype)
    else:
        found = above @ dequantize(packed, absmax, block_size=block_size, dtype=dtype)
        found.addmm_(low_grad, own_a)
    return found.view(x.shape), of_a, of_b


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Save the parameters themselves: an engine that frees them gathers them again."""
    *tensors, ctx.factor, ctx.block_size = inputs
    ctx.save_for_backward(*tensors)


def _go_back(
    ctx: Any, grad: torch.Tensor, gradients: Callable[..., tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor | None, ...]:
    of_x = ctx.needs_input_grad[0]
    found, of_a, of_b = gradients(grad, *ctx.saved_tensors, ctx.factor, ctx.block_size, of_x)
    return found if of_x else None, None, None, of_a, of_b, None, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        y = _product(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _go_back(ctx, grad, _gradients)


# The same for a compiler, as operators of torch, one each way: one that sees the weight made twice
# would keep the first for backward, which takes as much memory as a base that is not quantized.
# Elsewhere a call of an operator of Python would cost some 25 microseconds more.
_operator = torch.library.custom_op("peft_dist::fused_lora", _product, mutates_args=())
_operator_of_gradients = torch.library.custom_op(
    "peft_dist::fused_lora_backward", _gradients, mutates_args=()
)


@_operator.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@_operator_of_gradients.register_fake
def _(_grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    _packed, _absmax, a, b, _factor, _block_size, of_x = rest
    return x.new_empty(x.shape if of_x else 0), torch.empty_like(a), torch.empty_like(b)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _go_back(ctx, grad, _operator_of_gradients)


_operator.register_autograd(_backward, setup_context=_save)
