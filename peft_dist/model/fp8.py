"""Products of frozen weights in FP8 (e4m3, arXiv 2209.05433); adapters stay in bfloat16.

Tokens and rows of a weight have a scale each, and sums are made in float32. In the backward pass
the scales of rows are multiplied into the gradient before that is rounded, so that a weight has the
same 8 bits in either pass. A product of random numbers is off by 4 % of its norm.
"""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import ScalingType, scaled_mm

from peft_dist.common.errors import RecipeError
from peft_dist.common.screen import stage
from peft_dist.config import Recipe
from peft_dist.distributed.collectives import gather_objects
from peft_dist.model.nf4 import FrozenLinear4bit, Product, dequantize

log = logging.getLogger(__name__)

FP8 = torch.float8_e4m3fn
LEAST_CAPABILITY = (8, 9)
"""Of the first cards that multiply FP8 (L4, then H100)."""
ROUNDING = 0.06
"""By what a product may be off, relative to its norm."""
_LARGEST = torch.finfo(FP8).max
_SMALLEST = 1e-20
"""What a token or a row of zeros counts as."""
_MULTIPLE = 16
"""Of which both sides of a weight must be one."""


class Rounded(NamedTuple):
    """A matrix in 8 bits.

    Attributes:
        values: e4m3 [n, m].
        scale: float32 [n, 1], what each row was divided by.
    """

    values: torch.Tensor
    scale: torch.Tensor


def refuse_fp8(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse to multiply in FP8 where that is not to be had.

    Raises:
        RecipeError: For a card that has no such products, or another compute dtype than bfloat16.
    """
    problem = ""
    if dtype != torch.bfloat16:
        problem = f"its products are those of bfloat16, and this computes in {dtype}".replace(
            "torch.", ""
        )
    elif device.type == "cuda" and torch.version.hip is not None:
        problem = "it has not been tried on GPUs of AMD"
    elif device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            problem = f"{torch.cuda.get_device_name(device)} has no such products"
    if problem:
        raise RecipeError(problem, where="model.fp8", remedy="set it to false")


def rounded(rows: torch.Tensor) -> Rounded:
    """Round a float matrix [n, m] to 8 bits, each of its rows with its own scale."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True)
    factor = _LARGEST / largest.clamp(min=_SMALLEST)
    return Rounded((rows * factor).to(FP8), factor.float().reciprocal())


def _weight(stored: torch.Tensor, absmax: torch.Tensor | None, block_size: int) -> Rounded:
    """Return a weight [out, in] in 8 bits, from bfloat16 or, with its scales, from 4 bits."""
    if absmax is None:
        return rounded(stored)
    # The largest of a block is its scale: nothing is read but scales, and nothing is divided twice.
    scales = absmax.view(torch.float32)
    of_row = scales.amax(dim=1, keepdim=True).clamp(min=_SMALLEST) / _LARGEST
    values = dequantize(
        stored, (scales / of_row).view(torch.uint8), block_size=block_size, dtype=torch.bfloat16
    )
    return Rounded(values.to(FP8), of_row)


def _product(
    x: torch.Tensor, stored: torch.Tensor, absmax: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    """Return x [..., in] @ W.T."""
    weight, tokens = _weight(stored, absmax, block_size), rounded(x.flatten(0, -2))
    y = _multiply(tokens, weight.values, weight.scale.t(), x.dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def _product_backward(
    grad: torch.Tensor, stored: torch.Tensor, absmax: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    """Return grad [..., out] @ W."""
    weight = _weight(stored, absmax, block_size)
    tokens = rounded(grad.flatten(0, -2) * weight.scale.t().to(grad.dtype))
    columns = weight.values.t().contiguous()  # cards multiply by what lies so alone
    y = _multiply(tokens, columns, weight.scale.new_ones(1, len(columns)), grad.dtype)
    return y.view(*grad.shape[:-1], y.shape[-1])


def _multiply(
    tokens: Rounded, rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return tokens @ rows.T, with the scales [1, n] of rows, in a dtype."""
    by_row = ScalingType.RowWise
    return scaled_mm(
        tokens.values, rows.t(), tokens.scale, by_row, scale, by_row, output_dtype=dtype
    )


class _Fp8Matmul(torch.autograd.Function):
    """x @ W.T, with a gradient for x alone; W is saved as it is stored."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:
        y = _product(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        stored, absmax = ctx.saved_tensors
        return _product_backward(grad, stored, absmax, ctx.block_size), None, None, None


# The same for a compiler, as operators of torch; see `nf4`.
_operator = torch.library.custom_op("peft_dist::fp8_product", _product, mutates_args=())
_operator_backward = torch.library.custom_op(
    "peft_dist::fp8_product_backward", _product_backward, mutates_args=()
)


@_operator.register_fake
def _(x: torch.Tensor, stored: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], stored.shape[0])


@_operator_backward.register_fake
def _(
    grad: torch.Tensor, stored: torch.Tensor, absmax: torch.Tensor | None, _block_size: int
) -> torch.Tensor:
    per_element = 1 if absmax is None else 2
    return grad.new_empty(*grad.shape[:-1], stored.shape[1] * per_element)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, stored, absmax, ctx.block_size = inputs
    ctx.save_for_backward(stored, absmax)


def _gradient_of_x(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return _operator_backward(grad, *ctx.saved_tensors, ctx.block_size), None, None, None


_operator.register_autograd(_gradient_of_x, setup_context=_save)


def _times(
    x: torch.Tensor, stored: torch.Tensor, absmax: torch.Tensor | None, block_size: int
) -> torch.Tensor:
    multiply = _operator if torch.compiler.is_compiling() else _Fp8Matmul.apply
    y: torch.Tensor = multiply(x, stored, absmax, block_size)  # type: ignore[no-untyped-call]
    return y


class Fp8Linear4bit(FrozenLinear4bit):
    """A frozen linear in 4 bits that multiplies in 8."""

    def forward(self, x: torch.Tensor, product: Product | None = None) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        return super().forward(x, product or _times)


class Fp8Linear(nn.Linear):
    """A frozen linear that multiplies in 8 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., in] to [..., out]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _times(x, self.weight, None, 0)
        return y if self.bias is None else y + self.bias.to(y.dtype)


_IN_8_BITS: dict[type[nn.Module], type[nn.Module]] = {
    FrozenLinear4bit: Fp8Linear4bit,
    nn.Linear: Fp8Linear,
}


def linears_in_fp8(
    recipe: Recipe, blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype
) -> list[nn.Module]:
    """Return the linears of bare blocks that are to multiply in FP8: none, unless it is wanted.

    Raises:
        RecipeError: Where it is not to be had, or fits no linear of the model.
    """
    if not recipe.model.fp8:
        return []
    refuse_fp8(device, dtype)
    found = linears_for_fp8(blocks)
    if not found:
        raise RecipeError("no linear of the model fits it", where="model.fp8", remedy="remove it")
    return found


def linears_for_fp8(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the linears of bare blocks that FP8 is for.

    Those whose weights have sides that 16 does not divide are none, and routers are none.
    """
    return [module for block in blocks for module in block.modules() if _is_fit(module)]


def multiply_in_fp8(linears: Iterable[nn.Module], device: torch.device) -> None:
    """Let linears, all but those that are trained, multiply in FP8 from now on. Collective.

    Raises:
        RecipeError: Where a product of one of their shapes is wrong here.
    """
    found = [one for one in linears if not any(p.requires_grad for p in one.parameters())]
    if not found:
        return
    with stage("comparing products in FP8 with others", log) as told:
        shapes = sorted({_shape(module) for module in found})
        problem = next(filter(None, (find_problem(*shape, device) for shape in shapes)), "")
        problem = next(filter(None, gather_objects(problem)), "")
        if problem:
            raise RecipeError(problem, where="model.fp8", remedy="set it to false")
        told.append(f"model.fp8: {len(found)} linears of {len(shapes)} shapes, compared")
    for module in found:
        module.__class__ = _IN_8_BITS[type(module)]


def _shape(module: nn.Module) -> tuple[int, int, int]:
    """Return rows, columns and the block size, 0 for a weight that is not in 4 bits."""
    assert isinstance(module, nn.Linear | FrozenLinear4bit)
    return module.out_features, module.in_features, getattr(module, "block_size", 0)


def _is_fit(module: nn.Module) -> bool:
    if type(module) not in _IN_8_BITS:
        return False
    rows, columns, _ = _shape(module)
    return rows % _MULTIPLE == 0 == columns % _MULTIPLE


def find_problem(rows: int, columns: int, block_size: int, device: torch.device) -> str:
    """Return what is wrong with products of a shape in one line; empty where nothing is."""
    source = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=source, device=device)

    dtype = torch.bfloat16
    if block_size:
        size = (rows, columns // 2)
        stored = torch.randint(256, size, generator=source, device=device, dtype=torch.uint8)
        # Rows of other sizes, so that a scale at another row shows.
        absmax = (normal(rows, columns // block_size).abs() + 0.5) * (normal(rows, 1).abs() + 0.1)
        scales = absmax.view(torch.uint8)
        plain = dequantize(stored, scales, block_size=block_size, dtype=dtype)
    else:
        stored, scales = (normal(rows, columns) * (normal(rows, 1).abs() + 0.1)).to(dtype), None
        plain = stored
    x, grad = normal(17, columns).to(dtype), normal(17, rows).to(dtype)
    pairs = {
        "product": (_product(x, stored, scales, block_size), x @ plain.t()),
        "gradient": (_product_backward(grad, stored, scales, block_size), grad @ plain),
    }
    for what, (ours, theirs) in pairs.items():
        theirs = theirs.float()
        off = float((ours.float() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if not off <= ROUNDING:
            return f"{rows} x {columns}: the {what} in FP8 differs by {off:.2g} of its norm"
    return ""
