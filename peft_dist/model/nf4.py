"""A frozen linear layer stored in 4 bits whose bytes shard like any other parameter.

The bytes are exactly bitsandbytes' NF4 codes and scales; its kernels do the arithmetic. This
layer is never trained, merged or repacked.
"""

import functools
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import nn

BLOCK_SIZES = (64, 32)
"""Values per scale, in order of preference. A block must not cross a row, or rows cannot shard."""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]

_ZEROS = 0x77
"""Two codes of the value 0."""

_WEIGHTS_PER_BYTE = {"packed": 2, "absmax": 0}


def weights_per_element(name: str) -> int:
    """Return how many weights of the model an element of a parameter of this name holds."""
    return _WEIGHTS_PER_BYTE.get(name.replace(".", "_").rpartition("_")[2], 1)


def block_size_for(in_features: int) -> int | None:
    """Return the block size that tiles one row exactly, or None where NF4 is impossible."""
    return next((size for size in BLOCK_SIZES if in_features % size == 0), None)


def quantize_rows(rows: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float rows [n, in] to NF4 (QLoRA, arXiv 2305.14314).

    Because no block crosses a row, the result for rows [a, b) is rows [a, b) of the result for
    the whole tensor.

    Returns:
        packed: uint8 [n, in / 2], two codes per byte.
        absmax: uint8 [n, in / block_size * 4], the float32 scales as bytes.
    """
    n, in_features = rows.shape
    if n == 0:
        return (
            torch.empty(0, in_features // 2, dtype=torch.uint8, device=rows.device),
            torch.empty(0, in_features // block_size * 4, dtype=torch.uint8, device=rows.device),
        )
    packed, state = bnb.quantize_4bit(rows.contiguous(), blocksize=block_size, quant_type="nf4")
    scales = state.absmax.reshape(n, in_features // block_size)
    # Of a block of zeros a GPU makes codes of 0 / 0, which are other bytes than a CPU's.
    codes = packed.reshape(*scales.shape, block_size // 2)
    codes = torch.where(scales[..., None] == 0.0, _ZEROS, codes)
    return codes.reshape(n, in_features // 2), scales.view(torch.uint8)


@functools.cache
def levels(device: torch.device) -> torch.Tensor:
    """Return what the 16 codes stand for where the scale is 1, float32 [16]; not to be changed."""
    return bnb.get_4bit_type("nf4", device=device)  # type: ignore[no-any-return]


def dequantize(
    packed: torch.Tensor, absmax: torch.Tensor, *, block_size: int, dtype: torch.dtype
) -> torch.Tensor:
    """Return the float weight [out, in] of `packed` and `absmax` as `quantize_rows` made them."""
    shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
    if packed.is_meta:
        return torch.empty(shape, dtype=dtype, device="meta")
    state = bnb.QuantState(
        absmax=absmax.view(torch.float32).reshape(-1),
        shape=shape,
        blocksize=block_size,
        quant_type="nf4",
        dtype=dtype,
    )
    return bnb.dequantize_4bit(packed.reshape(-1, 1), state)


def _product(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return x [..., in] @ dequantize(packed).T."""
    return x @ dequantize(packed, absmax, block_size=block_size, dtype=x.dtype).t()


def _product_backward(
    grad: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> torch.Tensor:
    """Return grad [..., out] @ dequantize(packed)."""
    return grad @ dequantize(packed, absmax, block_size=block_size, dtype=grad.dtype)


class _FrozenMatmul(torch.autograd.Function):
    """x @ dequantize(packed).T, with a gradient for x alone.

    The parameters themselves are saved, not the float weight: an engine that frees them after
    forward gathers them again before backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, absmax)
        ctx.block_size = block_size
        return _product(x, packed, absmax, block_size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        packed, absmax = ctx.saved_tensors
        return _product_backward(grad, packed, absmax, ctx.block_size), None, None, None


# The same for a compiler, as operators of torch, one each way: one that sees the weight dequantized
# twice would keep the first for backward, which takes as much memory as a base that is not
# quantized. Elsewhere each call of an operator of Python would cost some 25 microseconds more.
_operator = torch.library.custom_op("peft_dist::frozen_product", _product, mutates_args=())
_operator_backward = torch.library.custom_op(
    "peft_dist::frozen_product_backward", _product_backward, mutates_args=()
)


@_operator.register_fake
def _(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


@_operator_backward.register_fake
def _(
    grad: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, block_size: int
) -> torch.Tensor:
    return grad.new_empty(*grad.shape[:-1], packed.shape[1] * 2)


def _save_parameters(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, packed, absmax, ctx.block_size = inputs
    ctx.save_for_backward(packed, absmax)


def _gradient_of_x(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    packed, absmax = ctx.saved_tensors
    return _operator_backward(grad, packed, absmax, ctx.block_size), None, None, None


_operator.register_autograd(_gradient_of_x, setup_context=_save_parameters)


class FrozenLinear4bit(nn.Module):
    """A linear layer y = x W^T + b whose W is frozen in NF4.

    Attributes:
        packed: uint8 [out, in / 2], frozen.
        absmax: uint8 [out, in / block_size * 4], frozen; float32 scales kept as bytes because a
            mixed precision policy would cast a float parameter.
        bias: float [out] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        """Make an empty layer; `dtype` is that of bias and of `weight`."""
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.block_size, self.dtype = block_size, dtype
        scales = in_features // block_size * 4
        self.packed = nn.Parameter(
            torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device),
            requires_grad=False,
        )
        self.absmax = nn.Parameter(
            torch.empty(out_features, scales, dtype=torch.uint8, device=device),
            requires_grad=False,
        )
        self.bias: nn.Parameter | None = None
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [out, in]; made anew at each access (DoRA needs its norm)."""
        return dequantize(self.packed, self.absmax, block_size=self.block_size, dtype=self.dtype)

    def forward(self, x: torch.Tensor, product: Product | None = None) -> torch.Tensor:
        """Map x [..., in] to [..., out] in x's dtype, or autocast's where that is on.

        Args:
            x: [..., in].
            product: Takes x, `packed`, `absmax` and the block size. Default: x W^T.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        ours = _operator if torch.compiler.is_compiling() else _FrozenMatmul.apply
        y: torch.Tensor = (product or ours)(x, self.packed, self.absmax, self.block_size)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Show the shape and block size in the model's printout."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block_size={self.block_size}"
        )
