"""The loop's arithmetic: learning rates, optimizer groups, clipping, and the finite-loss guard."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_dist.checkpoint.checkpointer import Checkpointer
from peft_dist.checkpoint.progress import NoHooks
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.errors import Interrupted, TrainingError
from peft_dist.config.recipe import Train
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.evaluation.scoring import make_eval_set
from peft_dist.ledger.events import LedgerEvent
from peft_dist.metrics.step import StepInputs, StepMetricsReader
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.optim.lr_schedule import learning_rate
from peft_dist.optim.optimizer import make_adamw
from peft_dist.trainer import Trainer
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl


def trainer(folder: Path, world: World, architecture: str = "llama", **sections: Any) -> Trainer:
    if not (folder / architecture).is_dir():
        tiny_model(folder / architecture, architecture)
    rows = write_jsonl(folder / "rows.jsonl", completion_rows(24))
    recipe = tiny_recipe(folder / architecture, rows, **sections)
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    tokens = tokenize_rows(recipe, "train", folder / "cache")
    return Trainer(setup, tokens, None)


class Records(list[dict[str, Any]]):
    """A tracker that keeps what the ledger would hold."""

    def write(self, event: LedgerEvent) -> None:
        """Keep one."""
        self.append(event.fields())

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


def test_no_step_asks_the_file_system_for_source_files(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As whatever formats a stack does; they may lie on a file system that many nodes share."""
    dropping = trainer(tmp_path, alone, train={"steps": 3}, method={"dropout": 0.1})
    asked, stat = list[Any](), os.stat

    def asking(path: Any, **how: Any) -> os.stat_result:
        asked.append(path)
        return stat(path, **how)

    monkeypatch.setattr(os, "stat", asking)
    dropping.run()
    assert not [path for path in asked if str(path).endswith(".py")]


def test_matrices_decay_and_vectors_do_not(tmp_path: Path, alone: World) -> None:
    both = trainer(tmp_path, alone, "qwen2", train={"weight_decay": 0.1}, method={"bias": "all"})
    setup = both.setup
    groups = make_adamw(setup.engine.flat_parameters(), setup.recipe.train).param_groups
    groups.sort(key=lambda group: -group["weight_decay"])
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    adapter = both.setup.adapter.values()
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert counts == [
        sum(p.numel() for p in adapter if p.dim() > 1),
        sum(p.numel() for p in adapter if p.dim() == 1),
    ]


def test_a_group_without_parameters_is_left_out(tmp_path: Path, alone: World) -> None:
    setup = trainer(tmp_path, alone, train={"weight_decay": 0.1}).setup
    (group,) = make_adamw(setup.engine.flat_parameters(), setup.recipe.train).param_groups
    assert group["weight_decay"] == 0.1


def plain_training(setup: ModelSetup, found: Trainer, steps: int) -> list[float]:
    """Train with torch's own pieces: padded rows, one pass, whole-vocabulary loss, AdamW."""
    parameters = list(setup.adapter.values())
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
            logits = setup.peft(input_ids=tokens[None], row_lengths=None).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            total, count = total + nll[trained].sum(), count + int(trained.sum())
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(setup.recipe.train, step, steps, peak=5e-3)
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
    expected = plain_training(theirs.setup, theirs, 6)
    assert [r["loss"] for r in records] == pytest.approx(expected, abs=1e-5)
    assert max(r["grad_norm"] for r in records) > 0.5  # so the clipping was at work
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for name, parameter in ours.setup.adapter.items():
        torch.testing.assert_close(
            parameter.detach(), theirs.setup.adapter[name].detach(), atol=1e-4, rtol=1e-3
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


def test_a_record_has_time_and_memory_of_the_one_process_there_is(
    tmp_path: Path, alone: World
) -> None:
    found = trainer(tmp_path, alone, train={"steps": 4, "global_batch_size": 4})
    records = Records()
    found.trackers = [records]
    found.run()
    for record in records:
        (own_s,), (memory,) = record["rank_step_s"], record["rank_memory_bytes"]
        assert 0 < own_s < 1.05 * record["tokens"] / record["tokens_per_s"] + 0.01
        assert memory == pytest.approx(record["peak_memory_bytes"], rel=0.2)
        assert memory > 50e6
        assert record["mfu"] is None


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_parameters_of_the_base_are_counted_however_they_are_stored(
    tmp_path: Path, alone: World, quantization: str
) -> None:
    setup = trainer(tmp_path, alone, quantization=quantization).setup
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert setup.base_parameters == sum(p.numel() for p in plain.parameters())


def with_checkpointer(found: Trainer, folder: Path) -> Checkpointer:
    """Let a training make checkpoints in a folder."""
    found.checkpointer = Checkpointer(
        AdapterSaver(found.setup, found.rows),
        folder,
        found.recipe.checkpoint,
        attempt=1,
        facts={},
        may_publish=lambda: None,
        sync_ledger=lambda: None,
    )
    return found.checkpointer


def broken_at(found: Trainer, *steps: int, how: str = "loss") -> None:
    """Make the loss or the gradient of some steps infinite or not a number."""
    engine, reduce = found.setup.engine, found.setup.engine.reduce

    def poisoned(extras: torch.Tensor) -> torch.Tensor:
        summed = reduce(extras)
        if found.progress.step + 1 in steps:
            if how == "loss":
                summed[0] = math.nan
            else:
                engine.gradients[3] = math.inf
        return summed

    engine.reduce = poisoned  # type: ignore[method-assign]


def state_of(found: Trainer) -> tuple[bytes, bytes, bytes, int]:
    """Return weights, both moments and the count of updates, to the bit."""
    engine, moments = found.setup.engine, found.optimizer.moments()
    weights = engine.flat(engine.adapter_state())
    parts = (weights, moments.mean, moments.square)
    a, b, c = (part.numpy().tobytes() for part in parts)
    return a, b, c, moments.updates


def states_after_steps(found: Trainer) -> dict[int, tuple[bytes, bytes, bytes, int]]:
    """Note the state after every step of the training that follows."""
    states, after = {0: state_of(found)}, found._after

    def noted(step: int) -> None:
        states[step] = state_of(found)
        after(step)

    found._after = noted  # type: ignore[method-assign]
    return states


def test_checkpoints_are_made_when_the_recipe_says(tmp_path: Path, alone: World) -> None:
    found = trainer(
        tmp_path, alone, train={"steps": 7, "global_batch_size": 4}, checkpoint={"every_steps": 3}
    )
    with_checkpointer(found, tmp_path / "checkpoints")
    records = Records()
    found.trackers = [records]
    found.run()
    assert [r["step"] for r in records if r["event"] == "checkpoint"] == [3, 6]
    assert [r["step"] for r in records if r["event"] == "saved"] == [3, 6]


POISONED = {"steps": 6, "global_batch_size": 4, "learning_rate": 1e-2}


def test_under_stop_a_loss_that_is_not_finite_ends_the_run_before_the_update(
    tmp_path: Path, alone: World
) -> None:
    found = trainer(
        tmp_path, alone,
        train={"steps": 50, "learning_rate": 1e30, "max_grad_norm": 0.0, "non_finite": "stop"},
    )  # fmt: skip
    records = Records()
    found.trackers = [records]
    told = r"train.non_finite: loss .* at step \d+; lower train.learning_rate"
    with pytest.raises(TrainingError, match=told) as caught:
        found.run()
    assert caught.value.exit_code == 3
    assert len(records) < 50
    assert all(torch.isfinite(p).all() for p in found.setup.adapter.values())


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(
    tmp_path: Path, alone: World, how: str
) -> None:
    found = trainer(tmp_path, alone, train=POISONED)
    records = Records()
    found.trackers = [records]
    broken_at(found, 3, 5, how=how)
    states = states_after_steps(found)
    progress = found.run()
    for step in (3, 5):
        assert states[step] == states[step - 1]
    for step in (1, 2, 4, 6):
        assert states[step] != states[step - 1]
    assert [states[step][3] for step in range(1, 7)] == [1, 2, 2, 3, 3, 4]
    assert [r["event"] for r in records] == ["step", "step", "skipped", "step", "skipped", "step"]
    skipped = records[2]
    assert (skipped["step"], skipped["cursor"], skipped["rows"]) == (3, 12, 4)
    wanted = "loss nan, gradient norm 3." if how == "loss" else "gradient norm inf at step 3"
    assert wanted in skipped["reason"]
    json.dumps(records, allow_nan=False)
    counted = sum(r["tokens"] for r in records if r["event"] == "step")
    assert progress.tokens == counted < counted + skipped["tokens"]
    assert progress.skipped_in_a_row == 0


def test_a_first_step_that_is_skipped_leaves_adamw_at_its_start(
    tmp_path: Path, alone: World
) -> None:
    found = trainer(tmp_path, alone, train=POISONED)
    broken_at(found, 1)
    states = states_after_steps(found)
    found.run()
    assert states[1] == states[0]
    assert states[6][3] == 5


def test_a_skipped_step_is_as_if_its_update_had_never_been(tmp_path: Path, alone: World) -> None:
    """The twin does everything but the update, by other means than the one under test."""
    found, twin = (trainer(tmp_path, alone, train=POISONED) for _ in range(2))
    books = [Records(), Records()]
    found.trackers, twin.trackers = [books[0]], [books[1]]
    broken_at(found, 3)
    update = twin.optimizer.step

    def without_one(finite: torch.Tensor) -> None:
        if twin.progress.step + 1 != 3:
            update(finite)

    twin.optimizer.step = without_one  # type: ignore[method-assign]
    found.run()
    twin.run()
    assert state_of(found) == state_of(twin)
    left = [{r["step"]: r["loss"].hex() for r in book if r["event"] == "step"} for book in books]
    assert left[0].keys() == {1, 2, 4, 5, 6}
    assert all(left[1][step] == loss for step, loss in left[0].items())


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path: Path, alone: World) -> None:
    found = trainer(tmp_path, alone, train={**POISONED, "steps": 9, "max_skipped_steps": 2})
    records = Records()
    found.trackers = [records]
    broken_at(found, 2, 3, 5, 6, 7)  # the finite step 4 begins the count anew
    with pytest.raises(TrainingError, match="at step 7, not finite 3 times in a row; lower"):
        found.run()
    skipped = [r["step"] for r in records if r["event"] == "skipped"]
    assert skipped == [2, 3, 5, 6]


class LateReader(StepMetricsReader):
    """Has a step's metrics when those of a GPU are there: with the step after it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.is_late = True

    def put(self, inputs: StepInputs, metrics: torch.Tensor) -> None:
        """Take metrics that are on the host already."""
        self._unread.append((inputs, metrics, None))


@pytest.mark.parametrize("late", [False, True])
def test_a_rollback_goes_back_to_the_newest_checkpoint_and_on_with_later_rows(
    tmp_path: Path, alone: World, late: bool
) -> None:
    found = trainer(
        tmp_path,
        alone,
        train={**POISONED, "non_finite": "rollback"},
        checkpoint={"every_steps": 2},
    )
    with_checkpointer(found, tmp_path / "checkpoints")
    if late:
        found._reader = LateReader()
    records = Records()
    found.trackers = [records]
    broken_at(found, 4)
    states = states_after_steps(found)
    found.run()
    assert states[4] == states[2] != states[3]
    (told,) = [r for r in records if r["event"] == "rollback"]
    assert (told["step"], told["back_to"], told["cursor"]) == (4, 2, 16)
    assert "at step 4" in told["reason"]
    assert [r["step"] for r in records if r["event"] == "step"] == [1, 2, 3, 5, 6]
    assert [r["cursor"] for r in records if r["event"] == "step"] == [4, 8, 12, 20, 24]
    assert states[6][3] == 4


def test_a_rollback_without_a_checkpoint_ends_the_run(tmp_path: Path, alone: World) -> None:
    for keeps in (False, True):
        found = trainer(tmp_path, alone, train={**POISONED, "non_finite": "rollback"})
        if keeps:
            with_checkpointer(found, tmp_path / "checkpoints")
        broken_at(found, 2)
        with pytest.raises(TrainingError, match="there is no checkpoint to roll back to; set ch"):
            found.run()


def test_rollbacks_in_a_row_are_counted_although_they_go_back_to_a_checkpoint(
    tmp_path: Path, alone: World
) -> None:
    found = trainer(
        tmp_path,
        alone,
        train={**POISONED, "non_finite": "rollback", "max_skipped_steps": 2},
        checkpoint={"every_steps": 1},
    )
    with_checkpointer(found, tmp_path / "checkpoints")
    broken_at(found, 3, 4, 5)
    with pytest.raises(TrainingError, match="not finite 3 times in a row"):
        found.run()


class StopDuringEvaluation:
    """TrainerHooks in which a signal comes while held-out rows are scored."""

    def __init__(self, step: int) -> None:
        self.wanted, self.now = ("evaluation", step), ("", 0)

    def stop_requested(self) -> bool:
        """Whether it has come."""
        return self.now == self.wanted

    def phase(self, name: str, step: int) -> None:
        """Note where the training is."""
        self.now = (name, step)


def with_held_out_rows(
    folder: Path, world: World, **sections: Any
) -> tuple[Trainer, Checkpointer, Records]:
    """Return a training that evaluates and makes checkpoints, and its records."""
    held = write_jsonl(folder / "held.jsonl", completion_rows(9, seed=1))
    found = trainer(folder, world, data={"eval": str(held)}, **sections)
    found.eval_set = make_eval_set(
        found.recipe, tokenize_rows(found.recipe, "eval", folder / "cache")
    )
    records = Records()
    found.trackers = [records]
    return found, with_checkpointer(found, folder / "checkpoints"), records


def test_the_best_of_all_evaluations_is_kept_although_no_checkpoint_was_due(
    tmp_path: Path, alone: World
) -> None:
    found, _, records = with_held_out_rows(
        tmp_path,
        alone,
        evaluate={"every_steps": 2},
        train={**POISONED, "steps": 9},
        checkpoint={"keep_best": 1, "keep_last": 1, "every_seconds": None},
    )
    found.run()
    assert [r["step"] for r in records if r["event"] == "saved"] == [2, 4, 6, 8, 9]
    losses = {
        r["step"]: r["eval_loss"] for r in records if r["event"] == "evaluation" and r["step"]
    }
    kept = {int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {9, min(losses, key=lambda step: losses[step])}


def test_a_stop_during_an_evaluation_saves_and_the_next_start_evaluates_again(
    tmp_path: Path, alone: World
) -> None:
    sections: dict[str, Any] = {
        "evaluate": {"every_steps": 2, "micro_batch_size": 2},
        "train": POISONED,
    }
    found, _, first = with_held_out_rows(tmp_path, alone, **sections)
    found.hooks = StopDuringEvaluation(4)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        found.run()
    assert [r["step"] for r in first if r["event"] == "evaluation"] == [0, 2]
    after, checkpointer, rest = with_held_out_rows(tmp_path, alone, **sections)
    newest = checkpointer.newest()
    assert newest is not None
    after.resume(newest)
    progress = after.run()
    assert [r["step"] for r in rest if r["event"] == "evaluation"] == [4, 6]
    assert progress.first is not None
    assert progress.first.loss == first[0]["eval_loss"]


class StopOnceEvaluated(NoHooks):
    """TrainerHooks in which a signal comes when the last held-out rows are scored already."""

    def __init__(self, records: Records, step: int) -> None:
        self.records, self.step = records, step

    def stop_requested(self) -> bool:
        """Whether it has come."""
        return any(r["event"] == "evaluation" and r["step"] == self.step for r in self.records)


def test_a_stop_at_the_end_of_an_evaluation_trains_no_further_step_and_keeps_it(
    tmp_path: Path, alone: World
) -> None:
    sections: dict[str, Any] = {"evaluate": {"every_steps": 2}, "train": POISONED}
    found, _, first = with_held_out_rows(tmp_path, alone, **sections)
    found.hooks = StopOnceEvaluated(first, 4)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        found.run()
    after, checkpointer, rest = with_held_out_rows(tmp_path, alone, **sections)
    newest = checkpointer.newest()
    assert newest is not None
    after.resume(newest)
    after.run()
    assert [r["step"] for r in rest if r["event"] == "evaluation"] == [6]


@pytest.mark.parametrize("every", [None, 3])
def test_the_evaluation_before_the_first_step_can_be_left_out(
    tmp_path: Path, alone: World, every: int | None
) -> None:
    found, _, records = with_held_out_rows(
        tmp_path, alone, evaluate={"at_start": False, "every_steps": every}, train=POISONED
    )
    progress = found.run()
    steps = [r["step"] for r in records if r["event"] == "evaluation"]
    assert steps == ([6] if every is None else [3, 6])
    assert progress.first is None and progress.last is not None
    assert {r["step"] for r in records if r["event"] == "sample"} == {6}
