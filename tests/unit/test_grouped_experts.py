"""Experts that are multiplied in one call give what they give one by one.

The kernel is a GPU's; on a processor torch computes the same call in another way.
"""

from pathlib import Path

import pytest
import torch

from peft_dist.distributed.world import World
from peft_dist.entrypoints.check_models import check
from peft_dist.model import grouped
from peft_dist.model.nf4 import quantize_rows
from tests.unit.test_expert_lora import losses, set_up

EXPERTS, ROWS, COLUMNS = 4, 24, 64


@pytest.mark.parametrize("hit", [[0, 0, 2, 2, 2, 3], [1, 3], [2]])
@pytest.mark.parametrize("turned", [False, True])
def test_frozen_products_and_their_gradient_are_those_of_each_expert(
    monkeypatch: pytest.MonkeyPatch, hit: list[int], turned: bool
) -> None:
    monkeypatch.setattr(grouped, "MOST_BYTES", 8 * COLUMNS * 4)  # 8 rows of an expert at a time
    torch.manual_seed(0)
    packed, absmax = quantize_rows(torch.randn(EXPERTS * ROWS, COLUMNS), 64)
    weights = grouped.dequantize(packed, absmax, block_size=64, dtype=torch.float32)
    weights = weights.view(EXPERTS, ROWS, COLUMNS)
    experts = torch.tensor(hit)
    groups = grouped.groups_of(experts, EXPERTS)
    assert len(groups.ends) == min(EXPERTS, len(hit)) and groups.ends[-1] == len(hit)
    x = torch.randn(len(hit), ROWS if turned else COLUMNS, requires_grad=True)
    ours = grouped.times_frozen(
        x,
        packed.view(EXPERTS, ROWS, -1),
        absmax.view(EXPERTS, ROWS, -1),
        groups,
        block_size=64,
        turned=turned,
    )
    used = weights[experts] if turned else weights[experts].transpose(1, 2)
    expected = (x[:, None] @ used)[:, 0]
    torch.testing.assert_close(ours, expected)
    (found,) = torch.autograd.grad(ours.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "quantization"), [("qwen2_moe", "nf4"), ("gpt_oss", "none")]
)
def test_a_layer_of_experts_and_their_lora_compute_the_same_in_one_call(
    tmp_path: Path,
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    quantization: str,
) -> None:
    setup = set_up(tmp_path, alone, model_type, quantization=quantization)
    torch.manual_seed(1)
    state = {n: torch.randn_like(p) * 0.1 for n, p in setup.adapter.items()}
    setup.engine.load_adapter_state(state)
    setup.model.eval()
    found = {}
    for way in ("one by one", "in one call"):
        monkeypatch.setattr(grouped, "has_kernel", lambda *_, way=way: way == "in one call")
        nll = losses(setup, gradient=True)
        nll.sum().backward()
        gradients = {n: p.grad.clone() for n, p in setup.adapter.items() if p.grad is not None}
        assert sum("experts" in name for name in gradients) > 8
        setup.engine.zero_gradients()
        found[way] = nll.detach(), gradients
    torch.testing.assert_close(*found.values(), atol=1e-4, rtol=1e-4)


def test_the_proof_and_the_census_hold_for_it(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "has_kernel", lambda *_: True)
    found = check("mixtral", tmp_path, alone, quantization="nf4")
    assert found.kind == "equal", found.detail


def test_only_a_gpu_with_the_kernel_and_its_dtype_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert not grouped.has_kernel(torch.device("cpu"), half)
    for capability, has in (((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert grouped.has_kernel(gpu, half) == has
        assert not grouped.has_kernel(gpu, torch.float32)
