"""Muon: torch's own on every matrix of the adapter, AdamW on the rest, and no non-finite step."""

import pytest
import torch
from torch import nn

from peft_dist.common.errors import RecipeError
from peft_dist.config.recipe import Train
from peft_dist.optim.muon import MuonOptimizer
from peft_dist.optim.optimizer import Group
from peft_dist.sharding.chosen_optimizer import refuse_muon

SHAPES = {
    Group(True, 1.0): [torch.Size([4, 6]), torch.Size([8, 4])],
    Group(False, 1.0): [torch.Size([5])],
    Group(True, 16.0): [torch.Size([3, 3])],
}
TRAIN = Train(optimizer="muon", weight_decay=0.1, betas=(0.8, 0.9))
YES, NO = torch.tensor(True), torch.tensor(False)


def flat_parameters() -> dict[Group, nn.Parameter]:
    torch.manual_seed(1)
    found = {}
    for group, shapes in SHAPES.items():
        found[group] = nn.Parameter(torch.randn(sum(shape.numel() for shape in shapes)))
        found[group].grad = torch.zeros_like(found[group])
    return found


def step(
    optimizer: MuonOptimizer, flat: dict[Group, nn.Parameter], at: int, finite: torch.Tensor = YES
) -> None:
    torch.manual_seed(at)
    for parameter in flat.values():
        assert parameter.grad is not None
        parameter.grad.copy_(torch.randn_like(parameter))
        if not finite:
            parameter.grad[0] = torch.nan
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["rate_factor"]
    optimizer.step(finite)


def test_every_matrix_and_every_vector_moves_as_with_torchs_own_optimizers() -> None:
    flat = flat_parameters()
    optimizer = MuonOptimizer(flat, SHAPES, TRAIN)
    plain: list[tuple[torch.optim.Optimizer, list[nn.Parameter], Group]] = []
    for group, shapes in SHAPES.items():
        parts = flat[group].detach().clone().split([shape.numel() for shape in shapes])
        own = [nn.Parameter(p.view(s).clone()) for p, s in zip(parts, shapes, strict=True)]
        lr = 0.01 * group.rate_factor
        if group.decays:
            muon = torch.optim.Muon(
                own, lr, 0.1, 0.8, eps=TRAIN.epsilon, adjust_lr_fn="match_rms_adamw"
            )
            plain.append((muon, own, group))
        else:
            adamw = torch.optim.AdamW(own, lr, betas=(0.8, 0.9), weight_decay=0.0)
            plain.append((adamw, own, group))
    for at in range(3):
        step(optimizer, flat, at)
        for other, own, group in plain:
            gradient = flat[group].grad
            assert gradient is not None
            sizes = [parameter.numel() for parameter in own]
            for parameter, part in zip(own, gradient.split(sizes), strict=True):
                parameter.grad = part.view(parameter.shape).clone()
            other.step()
    for _, own, group in plain:
        expected = torch.cat([parameter.detach().flatten() for parameter in own])
        torch.testing.assert_close(flat[group].detach(), expected)
    assert optimizer.moments().updates == 3


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    flat = flat_parameters()
    optimizer = MuonOptimizer(flat, SHAPES, TRAIN)
    step(optimizer, flat, 0)
    before, moments = [p.detach().clone() for p in flat.values()], optimizer.moments()
    step(optimizer, flat, 1, NO)
    assert all(torch.equal(p, old) for p, old in zip(flat.values(), before, strict=True))
    after = optimizer.moments()
    assert torch.equal(after.mean, moments.mean)
    assert torch.equal(after.square, moments.square)
    assert after.updates == moments.updates == 1


def test_a_restored_state_goes_on_to_the_bit() -> None:
    whole, cut = flat_parameters(), flat_parameters()
    one, two = MuonOptimizer(whole, SHAPES, TRAIN), MuonOptimizer(cut, SHAPES, TRAIN)
    for at in range(2):
        step(one, whole, at)
        step(two, cut, at)
    again = MuonOptimizer(cut, SHAPES, TRAIN)
    again.restore(two.moments())
    step(one, whole, 2)
    step(again, cut, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.values(), cut.values(), strict=True))
    assert again.moments().updates == 3


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_launcher_that_shares_the_optimizer_out_is_refused(strategy: str) -> None:
    with pytest.raises(RecipeError, match=f"train.optimizer: muon needs whole .* {strategy} shar"):
        refuse_muon(TRAIN, strategy)
    refuse_muon(Train(), strategy)
    refuse_muon(TRAIN, "fsdp")
