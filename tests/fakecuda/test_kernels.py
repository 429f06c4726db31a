"""Triton kernels: their values by its interpreter, what they take of each card, their launches."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from peft_dist.methods.lora_layer import LoraOn4bit
from peft_dist.model import fused_lora
from tests.configs import CONFIGS
from tests.fakecuda.device import Counted, counting
from tests.fakecuda.rank import RANKS, live, of_shape, off_device, prepare, steps
from tests.fakecuda.test_cards import run

KERNEL = "weight_kernel"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What `interpreted.py` found, in a process whose kernels are interpreted."""
    script = "from tests.fakecuda.interpreted import main; main()"
    done = run(script, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_kernel_makes_the_weights_and_gradients_of_torch(interpreted: dict[str, Any]) -> None:
    assert len(interpreted["problems"]) == 18
    assert {case: line for case, line in interpreted["problems"].items() if line} == {}
    assert {case for case, same in interpreted["unchanged"].items() if not same} == set()


def test_a_kernel_that_is_wrong_or_does_not_run_is_found(interpreted: dict[str, Any]) -> None:
    found = interpreted["wrong"]
    assert "a weight differs by" in found["one tile"]
    assert "RuntimeError: no compiler" in found["no compiler"]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("weight_kernel")


@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_the_kernel_compiles_for_every_card_without_spilling(kernels: Any, capability: int) -> None:
    assert capability in kernels.CARDS
    for dtype in kernels.DTYPES:
        for rank in kernels.RANKS:
            use, ptx = kernels.compiled(capability, dtype, rank, 64)
            assert use.spilled_bytes == 0, (dtype, rank)
            if dtype != "fp32":  # two of 8 warps at once
                assert use.registers <= 128
                assert "tf32" in ptx
            # To the nearest, which the interpreter does not show.
            assert dtype != "bf16" or "cvt.rn.bf16" in ptx
            assert use.shared_bytes <= 48 << 10


EIGHT_B = CONFIGS["llama-3.1-8b"]


def counted_step(folder: Path, patch: pytest.MonkeyPatch, **method: Any) -> Counted:
    """Return what the second step of a layer of an 8B counts."""
    trainer = of_shape(
        folder,
        patch,
        EIGHT_B | {"num_hidden_layers": 1},
        [2048] * (8 * RANKS),
        quantization="nf4",
        method={"rank": 16, "alpha": 32, **method},
        parallel={"strategy": "fsdp"},
        train={"steps": 2, "global_batch_size": 4 * RANKS, "micro_batch_size": 4},
    )
    seen = []
    for step in steps(trainer):
        with counting() as counted:
            step()
        seen.append(counted)
    return seen[-1]


def test_a_fused_layer_launches_fewer_kernels_and_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {}
    for name in ("off", "auto"):
        (tmp_path / name).mkdir()
        counts[name] = counted_step(tmp_path / name, monkeypatch, fused=name)
    apart, one = counts["off"], counts["auto"]
    # Of each weight once forward and once backward; q, k and v of the first block need no gradient.
    weights = 7 + 4
    assert (apart.kernels_named(KERNEL), one.kernels_named(KERNEL)) == (0, weights)
    assert apart.kernels_named("kDequantize") - one.kernels_named("kDequantize") == weights
    # Forward A and B are not cast and nothing is scaled. Backward they are cast, but nothing is
    # scaled, no gradient is cast, and gradients of x are no sum.
    assert apart.kernels - one.kernels == 3 * 7 + (4 - 2) * 4 + (3 - 2) * 3
    # The update's product forward, and its gradient of x.
    assert apart.products - one.products == weights
    assert one.waits == apart.waits


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_fused_layers_live_on_engines_that_gather_differently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    rank = prepare(tmp_path, monkeypatch, method={"fused": "auto"}, parallel={"strategy": strategy})
    layers = [module for module in rank.setup.peft.modules() if isinstance(module, LoraOn4bit)]
    assert layers and all(layer.fused for layer in layers)
    monkeypatch.setattr(fused_lora, "fewest_tokens", lambda *_: 1)
    with counting() as counted:
        live(rank)
    assert counted.kernels_named(KERNEL) > 0
    assert off_device(rank) == []


def test_where_the_kernel_fails_a_run_goes_on_without_it_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without_compiler(*_: Any, **__: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("peft_dist.model.nf4_kernel.updated_weight", without_compiler)
    rank = prepare(tmp_path, monkeypatch, method={"fused": "auto"})
    assert not any(m.fused for m in rank.setup.peft.modules() if isinstance(m, LoraOn4bit))
    assert "method.fused: not used, 32 x 64, rank 8: RuntimeError: Failed to find C" in caplog.text
