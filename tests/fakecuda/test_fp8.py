"""Products in FP8 on a CUDA device: no engine waits for them, and how many kernels they take."""

from pathlib import Path

import pytest
import torch

from peft_dist.common.errors import RecipeError
from peft_dist.model.fp8 import Fp8Linear, Fp8Linear4bit, refuse_fp8
from tests.configs import CONFIGS
from tests.fakecuda.device import Counted, counting
from tests.fakecuda.rank import RANKS, live, of_shape, off_device, prepare, steps
from tests.fakecuda.test_step import no_waits

EIGHT_B = CONFIGS["llama-3.1-8b"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_rank_lives_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, quantization: str
) -> None:
    rank = prepare(
        tmp_path,
        monkeypatch,
        quantization=quantization,
        model={"fp8": True},
        parallel={"strategy": strategy},
    )
    kind = Fp8Linear4bit if quantization == "nf4" else Fp8Linear
    assert sum(isinstance(one, kind) for one in rank.setup.peft.modules()) == 2 * 7
    assert off_device(rank) == []
    live(rank)


def step(folder: Path, patch: pytest.MonkeyPatch, **model: object) -> Counted:
    folder.mkdir()
    trainer = of_shape(
        folder,
        patch,
        EIGHT_B | {"num_hidden_layers": 1},
        [2048] * (8 * RANKS),
        quantization="nf4",
        model=model,
        method={"rank": 16, "alpha": 32},
        parallel={"strategy": "fsdp"},
        train={"steps": 2, "global_batch_size": 4 * RANKS, "micro_batch_size": 4},
    )
    seen = []
    for index, one in enumerate(steps(trainer)):
        if index == 0:
            one()
            continue
        with no_waits(), counting() as counted:
            one()
        seen.append(counted)
    return seen[-1]


def test_a_step_waits_for_nothing_and_makes_each_weight_once_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, fp8 = (
        step(tmp_path / str(on), monkeypatch, fp8=on, compile="off") for on in (False, True)
    )
    print(f"kernels of a layer's step: {plain.kernels}, in FP8 {fp8.kernels}")
    assert fp8.waits == plain.waits
    assert fp8.kernels_named("kDequantize") == plain.kernels_named("kDequantize")
    print({name: fp8.kernels_named(name) for name in ("kDequantize", "cutlass", "nvjet", "gemm")})


def test_a_card_that_has_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    refuse_fp8(device, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(RecipeError, match=r"has no such products.*model.fp8|model.fp8.*has no"):
        refuse_fp8(device, torch.bfloat16)
