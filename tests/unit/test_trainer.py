"""The loop's arithmetic: learning rates, optimizer groups, clipping, and the finite-loss guard."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.config.recipe import Train
from peft_dist.data.tokenize import tokenize_rows
from peft_dist.dist import World
from peft_dist.errors import TrainingError
from peft_dist.model.source import find_base
from peft_dist.session import Session, open_session
from peft_dist.trainer import Trainer, learning_rate, make_optimizer
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl


def trainer(folder: Path, world: World, architecture: str = "llama", **sections: Any) -> Trainer:
    if not (folder / architecture).is_dir():
        tiny_model(folder / architecture, architecture)
    rows = write_jsonl(folder / "rows.jsonl", completion_rows(24))
    recipe = tiny_recipe(folder / architecture, rows, **sections)
    session = open_session(recipe, world, find_base(recipe, folder / "cache"))
    tokens = tokenize_rows(recipe, "train", folder / "cache")
    return Trainer(session, tokens, None, save=lambda step: None)


class Records(list[dict[str, Any]]):
    """A tracker that keeps the records."""

    def write(self, record: dict[str, Any]) -> None:
        """Keep one."""
        self.append(dict(record))

    def close(self) -> None:
        """Nothing is held back."""


def rates(steps: int, **settings: Any) -> list[float]:
    train = Train.model_validate({"warmup_fraction": 0.0, **settings})
    return [learning_rate(train, step, steps, peak=1.0) for step in range(1, steps + 1)]


def test_warm_up_rises_to_the_peak_and_begins_above_zero() -> None:
    assert rates(20, warmup_fraction=0.2, schedule="constant")[:6] == [0.25, 0.5, 0.75, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decay_falls_all_the_way_and_would_end_at_zero(schedule: str) -> None:
    found = rates(50, schedule=schedule, warmup_fraction=0.1)
    peak = found.index(max(found))
    assert found[peak] == 1.0
    assert peak in (4, 5)
    assert all(a > b for a, b in zip(found[5:], found[6:], strict=False))
    assert 0 < found[-1] < 0.05


def test_the_middle_of_both_decays_is_half_the_peak() -> None:
    assert rates(10, schedule="linear")[5] == pytest.approx(0.5)
    assert rates(10, schedule="cosine")[5] == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_short_trainings_have_positive_rates(steps: int, warmup: float) -> None:
    for schedule in ("cosine", "linear", "constant"):
        found = rates(steps, schedule=schedule, warmup_fraction=warmup)
        assert all(0 < rate <= 1 for rate in found)


def test_matrices_decay_and_vectors_do_not(tmp_path: Path, alone: World) -> None:
    both = trainer(tmp_path, alone, "qwen2", train={"weight_decay": 0.1}, method={"bias": "all"})
    groups = make_optimizer(both.session).param_groups
    groups.sort(key=lambda group: -group["weight_decay"])
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    adapter = both.session.adapter.values()
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert counts == [
        sum(p.numel() for p in adapter if p.dim() > 1),
        sum(p.numel() for p in adapter if p.dim() == 1),
    ]


def test_a_group_without_parameters_is_left_out(tmp_path: Path, alone: World) -> None:
    session = trainer(tmp_path, alone, train={"weight_decay": 0.1}).session
    (group,) = make_optimizer(session).param_groups
    assert group["weight_decay"] == 0.1


def plain_training(session: Session, found: Trainer, steps: int) -> list[float]:
    """Train with torch's own pieces: padded rows, one pass, whole-vocabulary loss, AdamW."""
    parameters = list(session.adapter.values())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
    )
    losses = []
    for step, _, ids in found.plan.steps():
        total, count = torch.zeros(()), 0
        for row in ids:
            part = slice(found.rows.offsets[row], found.rows.offsets[row + 1])
            tokens = torch.from_numpy(found.rows.tokens[part].astype("int64"))
            trained = torch.from_numpy(found.rows.trained[part].copy())[1:]
            logits = session.peft(input_ids=tokens[None], row_lengths=None).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            total, count = total + nll[trained].sum(), count + int(trained.sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(session.recipe.train, step, steps, peak=5e-3)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_the_loop_is_plain_adamw_on_the_mean_token_loss(tmp_path: Path, alone: World) -> None:
    sections: dict[str, Any] = {
        "train": {
            "steps": 6, "global_batch_size": 7, "micro_batch_size": 3, "weight_decay": 0.1,
            "max_grad_norm": 0.5, "learning_rate": 5e-3,
        },
        "method": {"bias": "all"},
        "parallel": {"strategy": "ddp"},
    }  # fmt: skip
    ours, theirs = (trainer(tmp_path, alone, "qwen2", **sections) for _ in range(2))
    records = Records()
    ours.trackers = [records]
    ours.run()
    expected = plain_training(theirs.session, theirs, 6)
    assert [r["loss"] for r in records] == pytest.approx(expected, abs=1e-5)
    assert max(r["grad_norm"] for r in records) > 0.5  # so the clipping was at work
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for name, parameter in ours.session.adapter.items():
        torch.testing.assert_close(
            parameter.detach(), theirs.session.adapter[name].detach(), atol=1e-4, rtol=1e-3
        )


def test_a_record_counts_rows_and_real_tokens(tmp_path: Path, alone: World) -> None:
    found = trainer(tmp_path, alone, train={"epochs": 1, "global_batch_size": 10})
    records = Records()
    found.trackers = [records]
    outcome = found.run()
    assert [r["rows"] for r in records] == [10, 10, 4]
    assert sum(r["tokens"] for r in records) == outcome.tokens == len(found.rows.tokens)
    assert outcome.final_loss == records[-1]["loss"]
    assert all(r["peak_memory_bytes"] > 0 and r["tokens_per_s"] > 0 for r in records)


def test_copies_are_saved_when_the_recipe_says(tmp_path: Path, alone: World) -> None:
    saved: list[int] = []
    found = trainer(
        tmp_path, alone, train={"steps": 7, "global_batch_size": 4}, checkpoint={"every_steps": 3}
    )
    found.save = saved.append
    found.run()
    assert saved == [3, 6]


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path, alone: World) -> None:
    found = trainer(tmp_path, alone, train={"steps": 50, "learning_rate": 1e30,
                                            "max_grad_norm": 0.0})  # fmt: skip
    records = Records()
    found.trackers = [records]
    with pytest.raises(TrainingError, match=r"train: loss .* at step \d+; lower train.learning"):
        found.run()
    assert len(records) < 50
    assert all(torch.isfinite(p).all() for p in found.session.adapter.values())
