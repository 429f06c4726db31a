"""LoRA whose update is added to the weight computes what products of its own do.

The kernel needs a GPU; torch stands in for it here. Its own values are tested in `tests/fakecuda`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.methods.lora_layer import LoraOn4bit
from peft_dist.model import fused_lora
from peft_dist.model.fused_lora import WeightUpdate
from peft_dist.model.nf4 import dequantize, quantize_rows
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

ROUNDING = {"float32": 1e-5, "bfloat16": 0.03}


class TorchKernel:
    """What the kernel does, by torch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        low: WeightUpdate,
        *,
        block_size: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return the updated weight."""
        self.calls += 1
        weight = dequantize(packed, absmax, block_size=block_size, dtype=torch.float32)
        return weight.addmm_(low.b.detach(), low.a.detach(), alpha=low.factor).to(dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> TorchKernel:
    kernel = TorchKernel()
    monkeypatch.setattr(fused_lora, "has_kernel", lambda *_: True)
    monkeypatch.setattr(fused_lora, "updated_weight", kernel)
    return kernel


def set_up(folder: Path, alone: World, architecture: str = "llama", **sections: Any) -> ModelSetup:
    if not (folder / "model").exists():
        tiny_model(folder / "model", architecture)
    file = write_jsonl(folder / "rows.jsonl", completion_rows(12))
    recipe = tiny_recipe(folder / "model", file, **sections)
    return set_up_model(recipe, alone, find_base(recipe, folder / "cache"))


def learn(setup: ModelSetup, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses of a micro-batch, and the gradient of their sum where no B is zero."""
    rows = tokenize_rows(setup.recipe, "train", folder / "cache")
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in setup.adapter.values():
            parameter.copy_(torch.randn(parameter.shape, generator=source) * 0.05)
    setup.model.train()
    with setup.autocast():
        nll = setup.model(setup.pack(rows, np.arange(6))).nll
    setup.engine.backward(nll.sum())
    return nll.detach(), setup.engine.gradients.clone()


CASES = [
    ("llama", "float32", {"train": {"activation_checkpointing": True}}),
    ("qwen2", "float32", {"parallel": {"strategy": "fsdp"}}),  # it has biases
    ("gpt2", "bfloat16", {"method": {"rank_pattern": {"c_proj": 3}}}),
]


@pytest.mark.slow
@pytest.mark.parametrize("many_tokens", [True, False])
@pytest.mark.parametrize(("architecture", "dtype", "sections"), CASES)
def test_losses_and_gradients_are_those_of_separate_products(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: World,
    kernel: TorchKernel,
    architecture: str,
    dtype: str,
    sections: dict[str, Any],
    many_tokens: bool,
) -> None:
    found = []
    for fused in ("off", "auto"):
        method = {"kind": "lora", "fused": fused} | sections.get("method", {})
        own = sections | {"model": {"name": str(tmp_path / "model"), "dtype": dtype}}
        setup = set_up(tmp_path, alone, architecture, **own | {"method": method})
        layers = [m for m in setup.peft.modules() if isinstance(m, LoraOn4bit)]
        assert {layer.fused for layer in layers} == {fused == "auto"}
        if fused == "auto" and not many_tokens:
            monkeypatch.setattr(fused_lora, "fewest_tokens", lambda *_: 1 << 30)
        kernel.calls = 0
        found.append(learn(setup, tmp_path))
    assert bool(kernel.calls) == many_tokens
    for apart, one in zip(*found, strict=True):
        assert float((apart - one).norm() / apart.norm()) < ROUNDING[dtype]
        assert float(apart.norm()) > 0


@pytest.mark.parametrize("tokens", [3, 300])
def test_torch_may_rely_on_the_operator(kernel: TorchKernel, tokens: int) -> None:
    """It traces it, with sizes that vary, and gets shapes and gradients right."""
    source = torch.Generator().manual_seed(0)
    packed, absmax = quantize_rows(torch.randn(48, 128, generator=source), 64)
    x, a, b = (
        torch.randn(shape, generator=source, requires_grad=True)
        for shape in ((1, tokens, 128), (64, 128), (48, 64))
    )
    assert 3 < fused_lora.fewest_tokens(packed.shape, 64, x.dtype) < 300
    arguments = (x, packed, absmax, a, b, 0.5, 64)
    torch.library.opcheck(fused_lora._operator, arguments)
    assert bool(kernel.calls) == (tokens == 300)


def test_a_small_update_is_not_lost(kernel: TorchKernel) -> None:
    """Added to an output that is rounded already, half of one a thousandth as large is."""
    source = torch.Generator().manual_seed(0)
    rows, columns, rank, tokens = 256, 1024, 16, 512
    packed, absmax = quantize_rows(torch.randn(rows, columns, generator=source) * 0.02, 64)
    weight = dequantize(packed, absmax, block_size=64, dtype=torch.float32)
    a, b = (torch.randn(size, generator=source) for size in ((rank, columns), (rows, rank)))
    factor = 1e-3 * float(weight.norm() / (b @ a).norm())
    x = torch.randn(tokens, columns, generator=source).bfloat16()
    before = x @ weight.bfloat16().t()
    wanted = x.double() @ (factor * b @ a).double().t()
    low = x @ (a * factor).bfloat16().t()
    apart = torch.addmm(before, low, b.bfloat16().t())
    fused = WeightUpdate(a, b, factor).product(x, packed, absmax, 64)
    shares = [
        float(((y.double() - before.double()) * wanted).sum() / wanted.square().sum())
        for y in (apart, fused)
    ]
    assert shares[0] < 0.7
    assert shares[1] == pytest.approx(1.0, abs=0.1)


def test_without_a_gpu_it_says_so_and_products_stay_apart(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    setup = set_up(tmp_path, alone, method={"kind": "lora", "fused": "auto"})
    assert not any(m.fused for m in setup.peft.modules() if isinstance(m, LoraOn4bit))
    assert "method.fused: not used, it needs a GPU of NVIDIA" in caplog.text


def test_it_pays_from_more_tokens_on_where_ranks_are_high() -> None:
    shape = torch.Size((4096, 2048))
    few, many = (fused_lora.fewest_tokens(shape, rank, torch.bfloat16) for rank in (16, 64))
    assert few == 683
    assert many == 2731
