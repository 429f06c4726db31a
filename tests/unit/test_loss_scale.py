"""A training in float16: the loss is scaled, overflows are left out, a resume is to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.checkpoint.state import read_state
from peft_dist.common.errors import Interrupted, TrainingError
from peft_dist.distributed.world import World
from peft_dist.model.cross_entropy import cross_entropy
from peft_dist.model.token_rows import OutputMatrix
from peft_dist.optim import loss_scale
from peft_dist.optim.loss_scale import FIRST, LEAST, MOST, LossScale
from tests.unit.test_checkpointer import Records, go_on, losses, training

CPU = torch.device("cpu")
HALF: dict[str, Any] = {"model": {"dtype": "float16"}}


def after(*finite: bool) -> list[float]:
    """Return the scale after each of some steps."""
    scale, found = LossScale(CPU, torch.float16), []
    for one in finite:
        scale.update(torch.tensor(one))
        found.append(scale.value.item())
    return found


def test_it_halves_at_an_overflow_and_doubles_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "DOUBLES_AFTER", 3)
    steps = [True, True, False, True, True, True, True, True, True, False]
    expected = [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1]
    assert after(*steps) == [FIRST * factor for factor in expected]


def test_it_stays_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert after(*[False] * 30)[-1] == LEAST
    monkeypatch.setattr(loss_scale, "DOUBLES_AFTER", 1)
    assert after(*[True] * 30)[-1] == MOST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_not_scaled(dtype: torch.dtype) -> None:
    scale, one = LossScale(CPU, dtype), torch.ones(())
    scale.update(torch.tensor(False))
    assert scale.scaled(one) is one and scale.value == 1 and scale.facts() == {}


def test_scaling_rounds_nothing() -> None:
    scale, gradients = LossScale(CPU, torch.float16), torch.randn(1000)
    scaled = scale.scaled(gradients)
    scale.unscale(scaled)
    assert torch.equal(scaled, gradients)


def test_gradients_of_sure_tokens_do_not_vanish_in_float16() -> None:
    """Of a token that has 1 - 1e-7, no difference of logits would be a number of float16."""
    weight = torch.zeros(8, 4)
    weight[3, 0] = weight[5, 1] = 1.0
    targets, scale = torch.tensor([3]), 2.0**16
    found = []
    for dtype in (torch.float16, torch.float32):
        hidden = torch.tensor([[18.0, 0, 0, 0]], dtype=dtype, requires_grad=True)
        nll = cross_entropy(hidden, OutputMatrix(weight.to(dtype), None), targets, None)
        (nll.sum() * scale).backward()
        assert hidden.grad is not None
        found.append(hidden.grad.float() / scale)
    assert 0 < found[1][0, 1] < 2.0**-24
    torch.testing.assert_close(*found, rtol=0.01, atol=0)


def overflowing(trainer: Any, *steps: int) -> None:
    """Let the gradients of some steps overflow."""
    engine, reduce = trainer.setup.engine, trainer.setup.engine.reduce

    def poisoned(extras: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = reduce(extras)
        if trainer.progress.step + 1 in steps:
            engine.gradients[3] = torch.inf
        return summed

    engine.reduce = poisoned


def test_a_training_in_float16_is_near_one_in_float32(tmp_path: Path, alone: World) -> None:
    books: dict[str, Records] = {}
    for dtype in ("float16", "float32"):
        trainer, books[dtype] = training(tmp_path, alone, model={"dtype": dtype})
        trainer.run()
    pairs = zip(books["float16"].of("step"), books["float32"].of("step"), strict=True)
    for half, full in pairs:
        assert half["loss"] == pytest.approx(full["loss"], abs=5e-3)
        assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=2e-2)


@pytest.mark.parametrize("policy", ["skip", "stop", "rollback"])
def test_an_overflow_is_left_out_and_halves_the_scale(
    tmp_path: Path, alone: World, policy: str
) -> None:
    trainer, records = training(tmp_path, alone, **HALF, train={"non_finite": policy})
    overflowing(trainer, 2, 3)
    trainer.run()
    skipped = records.of("skipped")
    assert [one["step"] for one in skipped] == [2, 3]
    assert "loss scale 65536" in skipped[0]["reason"] and "32768" in skipped[1]["reason"]
    assert trainer.passes.loss_scale.value == FIRST / 4
    assert trainer.optimizer.moments().updates == len(records.of("step"))


def test_overflows_without_end_end_the_run(tmp_path: Path, alone: World) -> None:
    trainer, _ = training(tmp_path, alone, **HALF, train={"max_skipped_steps": 2})
    overflowing(trainer, 1, 2, 3)
    with pytest.raises(TrainingError, match="loss scale 16384, not finite 3 times in a row"):
        trainer.run()


def test_a_resumed_training_has_its_scale_to_the_bit(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "DOUBLES_AFTER", 4)
    whole, expected = training(tmp_path, alone, checkpoints="whole", **HALF)
    overflowing(whole, 1)
    whole.run()
    before, first = training(tmp_path, alone, stop_after=3, checkpoints="cut", **HALF)
    overflowing(before, 1)
    with pytest.raises(Interrupted):
        before.run()
    state = read_state(tmp_path / "cut" / "step-00000003")
    assert (state["loss_scale"], state["loss_scale_sound_steps"]) == (FIRST / 2, 2)
    resumed, rest = training(tmp_path, alone, checkpoints="cut", **HALF)
    go_on(resumed)
    resumed.run()
    assert losses(first) + losses(rest) == losses(expected)
    assert resumed.passes.loss_scale.facts() == whole.passes.loss_scale.facts()
    assert resumed.passes.loss_scale.value == FIRST
    ours, theirs = (one.setup.engine.adapter_state() for one in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
