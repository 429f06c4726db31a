"""What DeepSpeed is told, and that an engine which says otherwise is not trained with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peft_dist.common.errors import TrainingError
from peft_dist.sharding.deepspeed_zero import _check_arithmetic


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
