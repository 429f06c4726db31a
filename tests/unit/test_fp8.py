"""Frozen linears that multiply in FP8: what they compute, what is refused, what is trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from peft_dist.common.errors import RecipeError
from peft_dist.config import Recipe
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model import fp8
from peft_dist.model.fp8 import FP8, Fp8Linear, Fp8Linear4bit, Rounded
from peft_dist.model.nf4 import FrozenLinear4bit, quantize_rows
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

CPU = torch.device("cpu")


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def test_a_row_is_rounded_by_its_own_largest_number() -> None:
    rows = (normal(5, 64) * torch.tensor([1e-6, 1.0, 3e4, 0.0, 1.0])[:, None]).bfloat16()
    rows[4] = torch.inf
    values, scale = fp8.rounded(rows)
    assert values.dtype == FP8 and scale.dtype == torch.float32
    back = values.float() * scale
    # 3 bits of mantissa, and 2^-6 of the largest is still a normal number.
    large = rows[:3].float().abs() > rows[:3].float().abs().amax(1, keepdim=True) / 64
    off = ((back[:3] - rows[:3].float()).abs() / rows[:3].float().abs())[large]
    assert float(off.max()) <= 2.0**-4 + 2.0**-7
    assert back[3].abs().max() == 0
    assert not back[4].isfinite().any(), "what is not finite is not hidden"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_linear_multiplies_what_is_rounded(alone: World, quantized: bool, bias: bool) -> None:
    """The same as products of float64 of the rounded factors, but for the rounding of sums."""
    weight = (normal(48, 128) * normal(48, 1).abs()).bfloat16()
    layer: FrozenLinear4bit | nn.Linear
    if quantized:
        layer = FrozenLinear4bit(
            128, 48, block_size=64, bias=bias, dtype=torch.bfloat16, device="cpu"
        )
        packed, absmax = quantize_rows(weight.float(), 64)
        layer.packed.data, layer.absmax.data = packed, absmax
        weight = layer.weight
    else:
        layer = nn.Linear(128, 48, bias=bias, dtype=torch.bfloat16)
        layer.weight.data = weight
    layer.requires_grad_(False)
    if layer.bias is not None:
        layer.bias.data = normal(48).bfloat16()
    fp8.multiply_in_fp8(fp8.linears_for_fp8([nn.ModuleList([layer])]), CPU)
    assert isinstance(layer, Fp8Linear4bit if quantized else Fp8Linear)

    x = normal(3, 7, 128).bfloat16().requires_grad_()
    above = normal(3, 7, 48).bfloat16()
    y = layer(x)
    (grad,) = torch.autograd.grad(y, x, above)

    def value(one: Rounded) -> torch.Tensor:
        return one.values.double() * one.scale.double()

    rows = fp8.rounded(weight)
    wanted = value(fp8.rounded(x.detach().flatten(0, 1))) @ value(rows).t()
    scaled = fp8.rounded(above.flatten(0, 1) * rows.scale.t().bfloat16())
    wanted_grad = value(scaled) @ rows.values.double()
    if layer.bias is not None:
        wanted = wanted + layer.bias.double()
    for found, expected in ((y.detach(), wanted), (grad, wanted_grad)):
        off = (found.flatten(0, 1).double() - expected).norm() / expected.norm()
        assert float(off) < (0.02 if quantized else 0.004), float(off)


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.find_problem(48, 128, 64, CPU) == fp8.find_problem(48, 128, 0, CPU) == ""
    right = fp8._multiply

    def without_scales(tokens: Rounded, rows: torch.Tensor, scale: Any, dtype: Any) -> Any:
        return right(tokens, rows, torch.full_like(scale, float(scale.mean())), dtype)

    monkeypatch.setattr(fp8, "_multiply", without_scales)
    assert "48 x 128: the product in FP8 differs by" in fp8.find_problem(48, 128, 0, CPU)


def set_up(folder: Path, alone: World, architecture: str, **sections: Any) -> ModelSetup:
    if not (folder / "model").exists():
        tiny_model(folder / "model", architecture)
    file = write_jsonl(folder / "rows.jsonl", completion_rows(12))
    recipe = tiny_recipe(folder / "model", file, **sections)
    return set_up_model(recipe, alone, find_base(recipe, folder / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "sections"),
    [
        ("llama", {"quantization": "nf4", "train": {"activation_checkpointing": True}}),
        ("qwen2", {"quantization": "none", "parallel": {"strategy": "fsdp"}}),  # it has biases
        ("qwen2", {"quantization": "nf4", "method": {"kind": "prefix"}}),
    ],
)
def test_losses_and_gradients_are_near_those_of_bfloat16(
    tmp_path: Path, alone: World, architecture: str, sections: dict[str, Any]
) -> None:
    found = []
    for on in (False, True):
        model = {"name": str(tmp_path / "model"), "dtype": "bfloat16", "fp8": on}
        setup = set_up(tmp_path, alone, architecture, **sections, model=model)
        kinds = (Fp8Linear, Fp8Linear4bit)
        assert sum(isinstance(one, kinds) for one in setup.peft.modules()) == 14 * on
        assert setup.method.settings.kind == "prefix" or all(
            type(m) is nn.Linear for n, m in setup.peft.named_modules() if n.endswith("A.default")
        )
        rows = tokenize_rows(setup.recipe, "train", tmp_path / "cache")
        with torch.no_grad():
            for number, parameter in enumerate(setup.adapter.values()):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                    * 0.05
                )
        setup.model.train()
        with setup.autocast():
            nll = setup.model(setup.pack(rows, np.arange(6))).nll
        setup.engine.backward(nll.sum())
        found.append((nll.detach(), setup.engine.gradients.clone()))
    (nll, gradients), (nll_in_8, gradients_in_8) = found
    off = float((nll - nll_in_8).norm() / nll.norm())
    assert 0 < off < 0.02, off
    alike = float(torch.cosine_similarity(gradients.flatten(), gradients_in_8.flatten(), dim=0))
    assert 0.95 < alike < 0.99999, alike


def test_what_has_no_fp8_is_refused(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match=r"model\.fp8: .*bfloat16, and this computes in float32"):
        set_up(tmp_path, alone, "llama", model={"name": str(tmp_path / "model"), "fp8": True})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    with pytest.raises(RecipeError, match="NVIDIA A100 has no such products"):
        fp8.refuse_fp8(torch.device("cuda", 0), torch.bfloat16)
    values = {"model": {"name": "m", "fp8": True}, "data": {"train": "r"}, "quantization": "nf4"}
    recipe = Recipe.model_validate(values)
    with pytest.raises(RecipeError, match="no linear of the model fits it"):
        fp8.linears_in_fp8(recipe, [nn.Linear(30, 20)], CPU, torch.bfloat16)
    with pytest.raises(ValueError, match="keep one of them"):
        Recipe.model_validate({**values, "method": {"kind": "lora", "fused": "auto"}})
