"""What DeepSpeed is told, and that an engine which says otherwise is not trained with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peft_dist.common.errors import TrainingError
from peft_dist.distributed.world import World
from peft_dist.sharding.deepspeed_zero import (
    _check_arithmetic,
    _import_deepspeed,
    _share_optimizer,
)


def engine(own: torch.optim.AdamW, **shared: Any) -> Any:
    right: dict[str, Any] = {
        "clip_grad": 0.0,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": torch.float32,
        "loss_scale": 1.0,
        "optimizer": own,
    }
    return SimpleNamespace(
        optimizer=SimpleNamespace(**right | shared),
        gradient_clipping=lambda: 0.0,
        gradient_accumulation_steps=lambda: 1,
        postscale_gradients=lambda: True,
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_grad", 1.0),
        ("gradient_predivide_factor", 2.0),
        ("communication_data_type", torch.bfloat16),
        ("loss_scale", 65536.0),
        ("optimizer", torch.optim.AdamW([nn.Parameter(torch.zeros(1))])),
    ],
)
def test_an_engine_with_other_arithmetic_is_refused(name: str, value: object) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    _check_arithmetic(engine(optimizer), optimizer)
    with pytest.raises(TrainingError, match=f"DeepSpeed has {name}"):
        _check_arithmetic(engine(optimizer, **{name: value}), optimizer)


def test_a_step_that_is_not_finite_changes_nothing_and_is_not_counted(alone: World) -> None:
    """Nor does the host wait to learn of it: DeepSpeed steps all the same, on what is not used."""
    deepspeed = _import_deepspeed(alone)

    def made() -> nn.Parameter:
        flat = nn.Parameter(torch.linspace(-1, 1, 9))
        flat.grad = torch.full((9,), 0.5)
        return flat

    def adamw(flat: nn.Parameter) -> torch.optim.AdamW:
        return torch.optim.AdamW([{"params": [flat], "rate_factor": 1.0}], lr=0.1, fused=True)

    ours, wanted = made(), made()
    gradient = ours.grad
    assert gradient is not None
    values, plain = ours.detach(), adamw(wanted)
    shared = _share_optimizer(deepspeed, adamw(ours), alone)
    for bad in (None, float("nan"), float("inf"), None):
        gradient.fill_(0.5 if bad is None else bad)
        shared.step(torch.isfinite(gradient).all())
        if bad is None:
            plain.step()
        torch.testing.assert_close(values, wanted.detach())
        moments, state = shared.moments(), plain.state[wanted]
        assert moments.updates == int(state["step"])
        torch.testing.assert_close(moments.mean, state["exp_avg"])
        torch.testing.assert_close(moments.square, state["exp_avg_sq"])
