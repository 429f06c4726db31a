"""Checkpoints: whole, exact to the bit, and never in the way of training."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.checkpoint import directory
from peft_dist.checkpoint.checkpointer import OPTIMIZER_FILE, Checkpointer
from peft_dist.checkpoint.state import STATE_FILE, held_out_loss, read_state
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.errors import Interrupted, RunDirError, Superseded, TrainingError
from peft_dist.common.manifest import MANIFEST_FILE, seal, verify
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.entrypoints.check_models import build_tiny
from peft_dist.evaluation.scoring import Score
from peft_dist.ledger.events import LedgerEvent
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.trainer import Trainer
from tests.faults.long import IS_LONG
from tests.tiny import completion_rows, tiny_model, tiny_recipe, tiny_tokenizer, write_jsonl

STEPS = 6
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": {"rank": 4, "dropout": 0.1}},
    "pissa": {"method": {"rank": 4, "init": "pissa"}, "quantization": "none"},
    "lora_ga": {"method": {"rank": 4, "init": "lora_ga"}, "quantization": "none"},
    "muon": {"method": {"rank": 4, "dora": True}, "train": {"optimizer": "muon"}},
    "prefix": {"method": {"kind": "prefix", "virtual_tokens": 4, "projection": True}},
    "bottleneck": {"method": {"kind": "bottleneck", "bottleneck_size": 8}},
    "bitfit": {"method": {"kind": "bitfit"}, "quantization": "none"},
    "experts": {"method": {"rank": 2, "target_parameters": ["gate_up_proj", "down_proj"]}},
}

if IS_LONG:  # compiles for minutes
    METHODS["compiled"] = METHODS["lora"] | {"model": {"compile": "blocks"}}


class Records(list[dict[str, Any]]):
    """A tracker that keeps what the ledger would hold."""

    def write(self, event: LedgerEvent) -> None:
        """Keep one."""
        self.append(event.fields())

    def close(self) -> None:
        """Nothing is held back."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return those of one event."""
        return [record for record in self if record["event"] == event]


class StopAfter:
    """TrainerHooks in which a signal comes during a step."""

    def __init__(self, step: int) -> None:
        self.wanted, self.now = step, 0

    def stop_requested(self) -> bool:
        """Whether that step has come."""
        return self.now >= self.wanted

    def phase(self, _name: str, step: int) -> None:
        """Note the step."""
        self.now = step


def training(
    folder: Path,
    world: World,
    *,
    stop_after: int | None = None,
    may_publish: Callable[[], None] = lambda: None,
    sync_ledger: Callable[[], None] = lambda: None,
    checkpoints: str = "checkpoints",
    **sections: Any,
) -> tuple[Trainer, Records]:
    """Open a model setup and all that trains it, as a new process would."""
    method = sections.get("method", {})
    architecture = "qwen2" if method.get("kind") == "bitfit" else "llama"
    if method.get("target_parameters"):
        architecture = "mixtral"
    if not (folder / architecture).is_dir() and architecture == "mixtral":
        mixture = build_tiny(architecture)
        mixture.config.output_router_logits = True
        mixture.save_pretrained(folder / architecture)
        tiny_tokenizer(folder / architecture)
    elif not (folder / architecture).is_dir():
        tiny_model(folder / architecture, architecture)
    path = write_jsonl(folder / "rows.jsonl", completion_rows(20))
    train = {"steps": STEPS, "global_batch_size": 4, "learning_rate": 1e-2}
    sections["train"] = {**train, **sections.get("train", {})}
    recipe = tiny_recipe(folder / architecture, path, **sections)
    rows = tokenize_rows(recipe, "train", folder / "cache")
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"), rows=rows)
    checkpointer = Checkpointer(
        AdapterSaver(setup, rows),
        folder / checkpoints,
        recipe.checkpoint,
        attempt=1,
        facts={"recipe": {"a": 1}},
        may_publish=may_publish,
        sync_ledger=sync_ledger,
    )
    hooks = None if stop_after is None else StopAfter(stop_after)
    trainer = Trainer(setup, rows, None, checkpointer=checkpointer, hooks=hooks)
    records = Records()
    trainer.trackers = [records]
    return trainer, records


def go_on(trainer: Trainer) -> None:
    """Go on from the newest checkpoint, as a worker does."""
    assert trainer.checkpointer is not None
    newest = trainer.checkpointer.newest()
    assert newest is not None
    trainer.resume(newest)


def losses(records: Records) -> list[tuple[int, str, str]]:
    return [(r["step"], r["loss"].hex(), r["grad_norm"].hex()) for r in records.of("step")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_checkpoint_holds_adapter_optimizer_and_place(tmp_path: Path, alone: World) -> None:
    trainer, records = training(tmp_path, alone, checkpoint={"every_steps": 4})
    trainer.run()
    assert names(tmp_path / "checkpoints") == ["step-00000004"]
    folder = tmp_path / "checkpoints" / "step-00000004"
    assert names(folder) == ["adapter", MANIFEST_FILE, OPTIMIZER_FILE, STATE_FILE]
    assert names(folder / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    assert verify(folder) == {"step": 4, "attempt": 1}
    optimizer = load_file(folder / OPTIMIZER_FILE)
    adapter = trainer.setup.adapter
    expected = {f"{kind}.{name}" for kind in ("exp_avg", "exp_avg_sq") for name in adapter}
    assert optimizer.keys() == expected
    for name, parameter in adapter.items():
        assert optimizer[f"exp_avg.{name}"].shape == parameter.shape
    state = read_state(folder)
    wanted = {"format": 1, "step": 4, "cursor": 16, "epoch": 0, "updates": 4, "attempt": 1}
    assert wanted.items() <= state.items()
    assert state["recipe"] == {"a": 1}
    (taken,), (saved,) = records.of("checkpoint"), records.of("saved")
    assert taken["step"] == saved["step"] == 4
    assert saved["bytes"] == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert taken["stall_s"] > 0
    assert saved["write_s"] > 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.rglob("*")))


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_undisturbed_one_to_the_bit(
    tmp_path: Path, alone: World, method: str
) -> None:
    every: dict[str, Any] = {"checkpoint": {"every_steps": STEPS}, **METHODS[method]}
    whole, expected = training(tmp_path, alone, checkpoints="whole", **every)
    whole.run()
    before, first = training(tmp_path, alone, stop_after=3, checkpoints="cut", **every)
    with pytest.raises(Interrupted, match=f"stopped after step 3 of {STEPS}"):
        before.run()
    assert names(tmp_path / "cut") == ["step-00000003"]
    after, rest = training(tmp_path, alone, checkpoints="cut", **every)
    go_on(after)
    assert after.progress.step == 3
    after.run()
    assert losses(first) + losses(rest) == losses(expected)
    assert len(losses(expected)) == STEPS
    step = f"step-{STEPS:08d}"
    files = tensor_files(tmp_path / "whole" / step)
    assert len(files) == 2
    assert tensor_files(tmp_path / "cut" / step) == files
    state = read_state(tmp_path / "cut" / step)
    assert (state["updates"], state["cursor"], state["epoch"]) == (STEPS, 24, 1)  # of 20 rows
    ours, theirs = (t.setup.engine.adapter_state() for t in (after, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert after.progress.tokens == whole.progress.tokens
    assert after.progress.final_loss == whole.progress.final_loss


def test_a_pissa_training_goes_on_to_the_bit_where_its_start_is_rounded_otherwise(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"checkpoint": {"every_steps": STEPS}, **METHODS["pissa"]}
    whole, expected = training(tmp_path, alone, checkpoints="whole", **sections)
    whole.run()
    before, first = training(tmp_path, alone, stop_after=3, checkpoints="cut", **sections)
    with pytest.raises(Interrupted):
        before.run()
    started = before.setup
    decompose = torch.svd_lowrank

    def rounded_otherwise(*args: Any, **options: Any) -> Any:
        # As another processor or another number of threads may round: the last bit of each value.
        u, s, v = decompose(*args, **options)
        return u, torch.nextafter(s, torch.full_like(s, torch.inf)), v

    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(torch, "svd_lowrank", rounded_otherwise)
        after, rest = training(tmp_path, alone, checkpoints="cut", **sections)
    assert after.setup.base_fingerprint != started.base_fingerprint
    assert after.setup.released_fingerprint == started.released_fingerprint
    go_on(after)
    assert after.setup.base_fingerprint == started.base_fingerprint
    after.run()
    after.setup.check_integrity()
    assert losses(first) + losses(rest) == losses(expected)
    step = f"step-{STEPS:08d}"
    assert tensor_files(tmp_path / "cut" / step) == tensor_files(tmp_path / "whole" / step)


def test_a_stop_before_the_first_step_saves_nothing(tmp_path: Path, alone: World) -> None:
    trainer, _ = training(tmp_path, alone, stop_after=0)
    trainer._stop = True
    with pytest.raises(Interrupted, match="stopped after step 0"):
        trainer.run()
    assert not (tmp_path / "checkpoints").exists()


def test_seconds_make_a_checkpoint_as_well_as_steps(tmp_path: Path, alone: World) -> None:
    trainer, records = training(
        tmp_path, alone, checkpoint={"every_seconds": 1e-6, "background": False, "keep_last": 99}
    )
    trainer.run()
    assert [record["step"] for record in records.of("saved")] == [1, 2, 3, 4, 5, 6]
    never, records = training(
        tmp_path, alone, checkpoints="never", checkpoint={"every_seconds": None}
    )
    never.run()
    assert not records.of("checkpoint")
    assert not (tmp_path / "never").exists()


def test_a_failed_write_is_told_and_leaves_the_one_before(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = {"checkpoint": {"every_steps": 1, "background": False, "keep_last": 1}}
    trainer, records = training(tmp_path, alone, train={"steps": 1}, **sections)
    trainer.run()
    publish, calls = directory.publish, [0]

    def sometimes(partial: Path, folder: Path) -> None:
        calls[0] += 1
        full_disk() if calls[0] in (1, 2) else publish(partial, folder)

    monkeypatch.setattr(directory, "publish", sometimes)
    trainer, records = training(tmp_path, alone, train={"steps": 4}, **sections)
    go_on(trainer)
    trainer.run()
    assert [(r["step"], r["reason"]) for r in records.of("save_failed")] == [
        (2, "No space left on device"),
        (3, "No space left on device"),
    ]
    assert [r["step"] for r in records.of("saved")] == [4]
    assert [r["step"] for r in records.of("step")] == [2, 3, 4]
    assert trainer.checkpointer.failed_in_a_row == 0  # type: ignore[union-attr]
    assert names(tmp_path / "checkpoints") == ["step-00000004"]


def test_a_ledger_that_cannot_be_synced_is_a_save_that_failed_and_is_tried_again(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    there: list[list[str]] = []

    def sync() -> None:
        checkpoints = names(tmp_path / "checkpoints")
        there.append([name for name in checkpoints if not name.startswith(".")])
        if len(there) in (2, 3):
            full_disk()

    sections: dict[str, Any] = {"checkpoint": {"every_steps": 1, "background": False}}
    trainer, records = training(tmp_path, alone, train={"steps": 4}, sync_ledger=sync, **sections)
    trainer.run()
    assert [r["step"] for r in records.of("step")] == [1, 2, 3, 4]
    assert [r["step"] for r in records.of("save_failed")] == [2, 3]
    assert [r["step"] for r in records.of("saved")] == [1, 4]
    assert there == [[], *[["step-00000001"]] * 3]
    assert "the checkpoint of step 2 was not written: No space left on device" in caplog.text


def test_too_many_failed_writes_in_a_row_end_the_run(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections: dict[str, Any] = {
        "checkpoint": {"every_steps": 1, "background": False, "max_failed_saves": 2}
    }
    trainer, _ = training(tmp_path, alone, train={"steps": 1}, **sections)
    trainer.run()
    before = tensor_files(tmp_path / "checkpoints")
    monkeypatch.setattr(directory, "publish", full_disk)
    trainer, records = training(tmp_path, alone, train={"steps": 30}, **sections)
    go_on(trainer)
    with pytest.raises(TrainingError, match="max_failed_saves: 2 checkpoints in a row could not"):
        trainer.run()
    assert [r["step"] for r in records.of("save_failed")] == [2, 3]
    assert records.of("step")[-1]["step"] == 4
    assert names(tmp_path / "checkpoints") == ["step-00000001"]
    assert tensor_files(tmp_path / "checkpoints") == before


def test_a_stop_whose_checkpoint_is_not_written_says_where_the_run_goes_on(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = directory.publish

    def full_from_step_5(partial: Path, folder: Path) -> None:
        full_disk() if folder.name == "step-00000005" else publish(partial, folder)

    monkeypatch.setattr(directory, "publish", full_from_step_5)
    trainer, _ = training(tmp_path, alone, stop_after=5, checkpoint={"every_steps": 4})
    with pytest.raises(Interrupted) as caught:
        trainer.run()
    assert str(caught.value) == (
        "stopped after step 5 of 6; that could not be saved, and the run goes on after step 4"
    )
    again, _ = training(tmp_path, alone, stop_after=5)
    go_on(again)
    with pytest.raises(Interrupted, match="not be saved, and the run goes on after step 4"):
        again.run()
    shutil.rmtree(tmp_path / "checkpoints")
    anew, _ = training(tmp_path, alone, stop_after=5)
    with pytest.raises(Interrupted, match="not be saved, and the run begins anew"):
        anew.run()


def test_a_checkpoint_of_another_format_is_refused(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = training(tmp_path, alone, checkpoint={"every_steps": 4})
    trainer.run()
    folder = tmp_path / "checkpoints" / "step-00000004"
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    (folder / STATE_FILE).write_text(json.dumps({**state, "format": 2}), encoding="utf-8")
    (folder / MANIFEST_FILE).unlink()
    seal(folder, {"step": 4, "attempt": 1})
    after, _ = training(tmp_path, alone)
    with pytest.raises(RunDirError, match="is of format 2, and this version reads format 1; go on"):
        go_on(after)
    assert held_out_loss(folder) is None
    assert "is not among the best" in caplog.text


def test_an_unforeseen_error_of_the_writer_is_a_failed_save(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(directory, "publish", broken)
    trainer, records = training(tmp_path, alone, checkpoint={"every_steps": 4})
    trainer.run()
    (failed,) = records.of("save_failed")
    assert (failed["step"], failed["reason"]) == (4, "a bug of ours")
    assert names(tmp_path / "checkpoints") == []


def test_a_run_that_is_another_attempts_publishes_nothing(tmp_path: Path, alone: World) -> None:
    def superseded() -> None:
        raise Superseded("attempt 1 was taken over")

    trainer, _ = training(tmp_path, alone, may_publish=superseded, checkpoint={"every_steps": 2})
    with pytest.raises(Superseded):
        trainer.run()
    assert names(tmp_path / "checkpoints") == []
    assert trainer.progress.step == 4  # known when the next one is due


def test_the_last_and_the_best_are_kept(tmp_path: Path, alone: World) -> None:
    trainer, _ = training(
        tmp_path,
        alone,
        checkpoint={"keep_last": 2, "keep_best": 1, "background": False},
        evaluate={"every_steps": 1},
        data={"eval": str(tmp_path / "rows.jsonl")},
    )
    checkpointer, progress = trainer.checkpointer, trainer.progress
    assert checkpointer is not None
    for step, loss in ((1, 0.5), (2, 0.2), (3, 0.4), (4, 0.1), (5, 0.3), (6, 0.6)):
        progress.step = step
        # of step 4 there was no evaluation: its loss is an older one
        progress.evaluated = 2 if step == 4 else step
        progress.last = Score(loss=loss, accuracy=None, rows=3)
        checkpointer.take(dataclasses.asdict(progress), trainer.optimizer)
    assert names(tmp_path / "checkpoints") == ["step-00000002", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("foreign", [99, 3, 1])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_folder_that_is_no_checkpoint_stands_for_none_that_is_kept(
    tmp_path: Path,
    alone: World,
    caplog: pytest.LogCaptureFixture,
    foreign: int,
    keep_last: int,
) -> None:
    """Whatever lies under a step's name, the newest `keep_last` that verify stay."""
    trainer, _ = training(tmp_path, alone, checkpoint={"keep_last": keep_last, "background": False})
    checkpointer, progress = trainer.checkpointer, trainer.progress
    assert checkpointer is not None
    for step in (2, 4, 6):
        progress.step = step
        checkpointer.take(dataclasses.asdict(progress), trainer.optimizer)
        if step == 2:
            (tmp_path / "checkpoints" / f"step-{foreign:08d}").mkdir()
    kept = [name for name in names(tmp_path / "checkpoints") if name.startswith("step-")]
    assert kept == [f"step-{step:08d}" for step in (2, 4, 6)][-keep_last:]
    for name in kept:
        verify(tmp_path / "checkpoints" / name)
    assert (tmp_path / "checkpoints" / f"bad-step-{foreign:08d}").is_dir()
    assert f"step-{foreign:08d} is damaged" in caplog.text


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = training(tmp_path, alone)
    checkpointer = trainer.checkpointer
    assert checkpointer is not None
    may_write, publish = threading.Event(), directory.publish

    def slow(partial: Path, folder: Path) -> None:
        assert may_write.wait(30)
        publish(partial, folder)

    monkeypatch.setattr(directory, "publish", slow)
    state = trainer.setup.engine.adapter_state()
    trainer.progress.step = 1
    checkpointer.take(dataclasses.asdict(trainer.progress), trainer.optimizer)
    assert checkpointer.busy
    assert checkpointer.results() == []
    with torch.no_grad():  # the copy in flight is a copy
        trainer.setup.engine._values.add_(1.0)
    trainer.progress.step = 2
    second = threading.Thread(
        target=checkpointer.take, args=(dataclasses.asdict(trainer.progress), trainer.optimizer)
    )
    second.start()
    second.join(0.5)
    assert second.is_alive()
    may_write.set()
    second.join(30)
    checkpointer.wait()
    assert [event.step for event in checkpointer.results()] == [1, 2]
    assert names(tmp_path / "checkpoints") == ["step-00000001", "step-00000002"]
    trainer.setup.engine.load_adapter_state({name: t + 9 for name, t in state.items()})
    checkpointer.load(tmp_path / "checkpoints" / "step-00000001", trainer.optimizer)
    now = trainer.setup.engine.adapter_state()
    assert all(torch.equal(now[name], state[name]) for name in state)


def test_a_checkpoint_in_the_foreground_is_there_when_the_step_goes_on(
    tmp_path: Path, alone: World
) -> None:
    trainer, _ = training(tmp_path, alone, checkpoint={"background": False})
    checkpointer = trainer.checkpointer
    assert checkpointer is not None
    checkpointer.take(dataclasses.asdict(trainer.progress), trainer.optimizer)
    assert not checkpointer.busy
    assert names(tmp_path / "checkpoints") == ["step-00000000"]


def resealed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the optimizer's file, and seal it anew: it is whole, but of something else."""
    tensors = load_file(folder / OPTIMIZER_FILE)
    change(tensors)
    save_file(tensors, folder / OPTIMIZER_FILE)
    (folder / MANIFEST_FILE).unlink()
    seal(folder, {"step": 4, "attempt": 1})


@pytest.mark.parametrize("kind", ["missing", "strange", "renamed"])
def test_an_optimizer_of_another_model_is_refused(tmp_path: Path, alone: World, kind: str) -> None:
    trainer, _ = training(tmp_path, alone, checkpoint={"every_steps": 4})
    trainer.run()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = sorted(tensors)[0]
        value = tensors[name] if kind == "strange" else tensors.pop(name)
        if kind == "strange":
            tensors["momentum.x"] = value.clone()
        if kind == "renamed":
            tensors[f"{name}.more"] = value

    resealed(tmp_path / "checkpoints" / "step-00000004", change)
    after, _ = training(tmp_path, alone)
    before = after.setup.engine.adapter_state()
    with pytest.raises(TrainingError, match=r"stands in optimizer.safetensors or in the model"):
        go_on(after)
    now = after.setup.engine.adapter_state()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = training(tmp_path, alone, checkpoint={"every_steps": 2, "keep_last": 3})
    trainer.run()
    folder = tmp_path / "checkpoints"
    assert names(folder) == ["step-00000002", "step-00000004", "step-00000006"]
    file = folder / "step-00000006" / OPTIMIZER_FILE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    (folder / "step-00000004" / STATE_FILE).unlink()
    after, _ = training(tmp_path, alone)
    go_on(after)
    assert after.progress.step == 2
    assert names(folder) == ["bad-step-00000004", "bad-step-00000006", "step-00000002"]
    assert OPTIMIZER_FILE in caplog.text
    assert "going on from step-00000002" in caplog.text


def test_where_every_checkpoint_is_damaged_training_begins_anew(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = training(tmp_path, alone, checkpoint={"every_steps": 4})
    trainer.run()
    (tmp_path / "checkpoints" / "step-00000004" / MANIFEST_FILE).write_text("{}")
    after, _ = training(tmp_path, alone)
    assert after.checkpointer is not None
    assert after.checkpointer.newest() is None
    assert "going on from the beginning" in caplog.text


def test_old_checkpoints_that_cannot_be_removed_do_not_fail_the_new_one(
    tmp_path: Path,
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(directory, "prune", full_disk)
    trainer, records = training(tmp_path, alone, checkpoint={"every_steps": 2, "keep_last": 1})
    trainer.run()
    assert len(records.of("saved")) == 3
    assert "old checkpoints cannot be removed: No space left on device" in caplog.text


def test_a_checkpoint_says_nothing_of_where_it_lay(tmp_path: Path, alone: World) -> None:
    trainer, _ = training(tmp_path, alone, checkpoint={"every_steps": 4})
    trainer.run()
    moved = tmp_path / "elsewhere" / "step-00000004"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000004", moved)
    after, records = training(tmp_path, alone, checkpoints="elsewhere")
    go_on(after)
    after.run()
    assert [r["step"] for r in records.of("step")] == [5, 6]
    assert json.loads((moved / STATE_FILE).read_text(encoding="utf-8"))["step"] == 4
