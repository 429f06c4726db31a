"""Whether LoRA layers add their update to the weight while it is dequantized, proven on each card.

Values of the kernel are compared for every shape that the model has, with updates as large as the
weights: in the proof of the whole model B is zero, and rows are so short that the kernel would not
be chosen.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from peft_dist.common.cache_folder import code_folder
from peft_dist.common.errors import line_of
from peft_dist.common.screen import stage
from peft_dist.config import Recipe
from peft_dist.distributed.collectives import gather_objects
from peft_dist.distributed.world import World
from peft_dist.methods.lora_layer import LoraOn4bit
from peft_dist.model import fused_lora
from peft_dist.model.fused_lora import WeightUpdate
from peft_dist.model.nf4 import FrozenLinear4bit, dequantize

log = logging.getLogger(__name__)

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
"""By what a weight may be off, relative to the largest; a product, relative to its norm."""


class Shape(NamedTuple):
    """What the kernel is chosen and compiled by."""

    rows: int
    columns: int
    block_size: int
    rank: int


def fuse(recipe: Recipe, peft: PeftModel, world: World, dtype: torch.dtype, cache: Path) -> bool:
    """Let LoRA layers use the kernel where the recipe asks and all of their shapes are proven.

    Collective: all processes compute in the same way.

    Args:
        recipe: The recipe.
        peft: The model with its adapters; nothing needs to be loaded.
        world: Where it runs.
        dtype: What it computes in.
        cache: The cache folder, for what Triton compiles.

    Returns:
        Whether they do.
    """
    if getattr(recipe.method, "fused", "off") == "off":
        return False
    layers = [
        (module, name)
        for module in peft.modules()
        if isinstance(module, LoraOn4bit) and (name := module.plain_adapter) is not None
    ]
    if not fused_lora.has_kernel(world.device, dtype):
        problem = "it needs a GPU of NVIDIA, of the A100's generation or later"
    else:
        if (folder := code_folder(cache)) is not None:
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
        with stage("comparing a kernel with products of torch", log) as told:
            shapes = sorted({_shape(module, name) for module, name in layers})
            problem = next(filter(None, (find_problem(s, world.device, dtype) for s in shapes)), "")
            told.append(f"method.fused: {len(shapes)} shapes of weights compared")
    problem = next(filter(None, gather_objects(problem)), "")
    if problem:
        if world.is_main:
            log.warning("method.fused: not used, %s", problem)
        return False
    for module, _ in layers:
        module.fused = True
    return True


def _shape(module: LoraOn4bit, name: str) -> Shape:
    base = module.get_base_layer()
    assert isinstance(base, FrozenLinear4bit)
    rank: Any = module.r[name]
    return Shape(base.out_features, base.in_features, base.block_size, rank)


def find_problem(shape: Shape, device: torch.device, dtype: torch.dtype) -> str:
    """Return what is wrong with the kernel for a shape, in one line; empty where nothing is."""
    where = f"{shape.rows} x {shape.columns}, rank {shape.rank}"
    try:
        drawn = _Drawn(shape, device, dtype)
        off = drawn.weights_off()
        if not off <= ROUNDING[dtype]:
            return f"{where}: a weight differs by {off:.2g} of the largest"
        pairs = zip(drawn.values(drawn.fused), drawn.values(drawn.apart), strict=True)
    except Exception as error:  # a compiler, and what loads its code, fail in their own ways
        return f"{where}: {line_of(error)}"
    for name, (ours, theirs) in zip(("product", *"xAB"), pairs, strict=True):
        off = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
        if not off <= ROUNDING[dtype]:
            what = name if name == "product" else f"gradient of {name}"
            return f"{where}: the {what} differs by {off:.2g} of its norm"
    return ""


class _Drawn:
    """A weight, an update and tokens of random numbers."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        source = torch.Generator(device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=source, device=device)

        rows, columns, self.block_size, rank = shape
        size = (rows, columns // 2)
        self.packed = torch.randint(256, size, generator=source, device=device, dtype=torch.uint8)
        scales = normal(rows, columns // self.block_size).abs() + 0.5
        self.absmax = scales.view(torch.uint8)
        a, b = normal(rank, columns).requires_grad_(), normal(rows, rank).requires_grad_()
        self.update = WeightUpdate(a, b, rank**-0.5)
        # As few as the kernel is chosen for, and no multiple of any tile.
        tokens = fused_lora.fewest_tokens(self.packed.shape, rank, dtype) | 1
        self.x = normal(tokens, columns).to(dtype).requires_grad_()
        self.above = normal(tokens, rows).to(dtype) * 0.1  # so that float16 can hold its sums

    def weights_off(self) -> float:
        """Return how far the kernel's weights are from torch's in float32, of the largest."""
        with torch.no_grad():
            found = fused_lora.updated_weight(
                self.packed,
                self.absmax,
                self.update,
                block_size=self.block_size,
                dtype=self.x.dtype,
            )
            wanted = self._dequantized(torch.float32)
            wanted.addmm_(self.update.b, self.update.a, alpha=self.update.factor)
            return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))

    def fused(self) -> torch.Tensor:
        """Return the product by the kernel."""
        return self.update.product(self.x, self.packed, self.absmax, self.block_size)

    def apart(self) -> torch.Tensor:
        """Return the product by torch."""
        a, b = (part.to(self.x.dtype) for part in (self.update.a, self.update.b))
        low = (self.x @ a.t()) * self.update.factor
        return self.x @ self._dequantized(self.x.dtype).t() + low @ b.t()

    def values(self, product: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        """Return a product and its gradients of x, A and B, in float32."""
        y = product()
        found = torch.autograd.grad(y, (self.x, self.update.a, self.update.b), self.above)
        return [part.detach().float() for part in (y, *found)]

    def _dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(self.packed, self.absmax, block_size=self.block_size, dtype=dtype)
