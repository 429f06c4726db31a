"""Which run a worker trains, and whether it may, decided before anything is loaded."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.common.env import LAUNCH_MARK
from peft_dist.common.errors import DataError, LaunchError, RunDirError, TrainingError
from peft_dist.config import Recipe, load_recipe
from peft_dist.entrypoints import train
from peft_dist.run.attempt_records import latest, record_path
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import Attempt
from peft_dist.tracking.attempt import _require_trackers
from peft_dist.worker.process import WorkerContext
from tests.processes import ROOT, environment, run

RAW = {"model": {"name": "m"}, "data": {"train": "d"}}


@pytest.fixture
def prepared(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", Recipe.model_validate(RAW))


def started(
    recipe: Path, *overrides: str, run_dir: Path | None = None, fresh: bool = False
) -> argparse.Namespace:
    return argparse.Namespace(
        recipe=recipe, overrides=list(overrides), run_dir=run_dir, fresh=fresh, allow_changed=[]
    )


def taken(options: argparse.Namespace, **train_section: object) -> WorkerContext:
    """Take a run as rank 0 does, and leave it again."""
    context = WorkerContext()
    recipe = Recipe.model_validate(RAW | {"train": train_section})
    try:
        train._take(options, recipe, context)
    finally:
        if context.attempt is not None:
            context.attempt.end("interrupted")
    return context


def exit_code_of(options: argparse.Namespace) -> int | None:
    return train._exit_code_before_start(options)


def test_the_recipe_of_a_prepared_run_trains_in_its_own_folder(prepared: RunDir) -> None:
    context = taken(started(prepared.recipe))
    assert context.run_dir == prepared
    assert context.attempt_number == 1
    assert taken(started(prepared.recipe)).attempt_number == 2


def test_a_run_that_has_finished_is_never_trained_over(prepared: RunDir) -> None:
    prepared.result.write_text("{}", encoding="utf-8")
    with pytest.raises(RunDirError, match="has finished; name another folder"):
        taken(started(prepared.recipe))
    with pytest.raises(RunDirError, match="has finished; choose another folder"):
        taken(started(prepared.recipe, run_dir=prepared.path))
    assert not prepared.attempts.exists()


def test_an_old_recipe_with_changes_is_the_start_of_another_run(prepared: RunDir) -> None:
    assert train._run_of(started(prepared.recipe)) == (prepared, True)
    _, is_own = train._run_of(started(prepared.recipe, "train.seed=1"))
    assert not is_own
    other = prepared.path.parent / "b"
    assert train._run_of(started(prepared.recipe, run_dir=other)) == (RunDir(other), False)


def test_a_prepared_run_goes_on_by_the_recipe_it_was_claimed_with(
    prepared: RunDir, tmp_path: Path
) -> None:
    assert train._recipe_of(started(prepared.recipe)) == prepared.recipe
    prepared.next_recipe.write_bytes(prepared.recipe.read_bytes())
    assert train._recipe_of(started(prepared.recipe)) == prepared.next_recipe
    other = started(prepared.recipe, run_dir=tmp_path / "another")
    assert train._recipe_of(other) == prepared.recipe


def test_any_other_recipe_is_in_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: {name: m}\n", encoding="utf-8")
    assert train._run_of(started(recipe)) == (RunDir(tmp_path / "runs" / "mine"), False)


def test_a_worker_of_any_launcher_goes_on_with_the_run_that_is_there(tmp_path: Path) -> None:
    options = started(tmp_path / "mine.yaml", run_dir=tmp_path / "run")
    assert [taken(options).attempt_number for _ in range(2)] == [1, 2]
    context = taken(started(tmp_path / "mine.yaml", run_dir=tmp_path / "run", fresh=True), seed=1)
    assert context.attempt_number == 1
    assert (tmp_path / "run.old-1" / "attempts" / "00000002.json").is_file()
    assert load_recipe(tmp_path / "run" / "recipe.yaml", check_paths=False).train.seed == 1


def test_fresh_sets_nothing_aside_when_torchrun_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = started(tmp_path / "mine.yaml", run_dir=tmp_path / "run", fresh=True)
    taken(options)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert taken(options).attempt_number == 2
    assert not (tmp_path / "run.old-1").exists()


def test_a_run_that_another_process_trains_is_refused(prepared: RunDir) -> None:
    holder = Attempt.begin(prepared.attempts)
    try:
        with pytest.raises(RunDirError, match=f"process {os.getpid()}|pid {os.getpid()}"):
            taken(started(prepared.recipe))
        assert (latest(prepared.attempts) or {})["attempt"] == 1
    finally:
        holder.end("interrupted")


def test_a_run_that_another_process_trains_is_not_set_aside_or_changed(prepared: RunDir) -> None:
    (prepared.checkpoints / "step-00000002").mkdir(parents=True)
    holder = Attempt.begin(prepared.attempts)
    before = prepared.recipe.read_bytes()
    try:
        for fresh in (False, True):
            with pytest.raises(RunDirError, match="is in use by attempt 1"):
                taken(started(Path("mine.yaml"), run_dir=prepared.path, fresh=fresh), steps=7)
        assert prepared.recipe.read_bytes() == before
        assert not prepared.next_recipe.exists()
    finally:
        holder.end("interrupted")


def test_a_fresh_start_after_a_verdict_tries_again(prepared: RunDir) -> None:
    prepared.record_failure(TrainingError("loss nan"))
    assert taken(started(prepared.recipe)).attempt_number == 1
    assert prepared.read_failure() is None


def test_crashes_without_progress_end_in_a_verdict_and_a_new_start_is_not_held_to_it(
    prepared: RunDir,
) -> None:
    """The verdict of the crash loop is what a run gives up with; a person may overrule it once."""
    told = ""
    for _ in range(10):
        context = WorkerContext()
        try:
            train._take(started(prepared.recipe), Recipe.model_validate(RAW), context)
        except TrainingError as error:
            told = str(error)
            assert context.attempt is not None
            prepared.record_failure(error)
            context.attempt.end("failed")
            break
        assert context.attempt is not None
        context.attempt.end("crashed")  # no outcome that anything knows: it ended by itself
        record = json.loads(record_path(prepared.attempts, context.attempt_number).read_text())
        assert record["outcome"] == "crashed"
    assert "start again once that is fixed" in told
    assert taken(started(prepared.recipe)).run_dir == prepared


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_start_by_a_machine_honours_what_the_run_came_to(
    prepared: RunDir, monkeypatch: pytest.MonkeyPatch, count: str
) -> None:
    options = started(prepared.recipe)
    monkeypatch.setenv(count, "0")
    prepared.record_failure(DataError("no rows"))
    assert exit_code_of(options) is None  # a person's start
    monkeypatch.setenv(count, "1")
    assert exit_code_of(options) == 2
    prepared.failure.write_text("half a line", encoding="utf-8")
    assert exit_code_of(options) == 3
    prepared.result.write_text("{}", encoding="utf-8")
    assert exit_code_of(options) == 0


def test_torchrun_does_not_undo_a_stop_and_a_requeue_does(
    prepared: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LAUNCH_MARK, raising=False)
    options = started(prepared.recipe)
    Attempt.begin(prepared.attempts).end("interrupted", signal="SIGTERM")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert exit_code_of(options) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert exit_code_of(options) == 75
    monkeypatch.setenv(LAUNCH_MARK, "x")  # then torchrun must think that all is well
    assert exit_code_of(options) == 0


def test_a_worker_that_may_not_run_has_not_imported_torch(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "r.yaml").write_text(
        "model: {name: model}\ndata: {train: rows.jsonl}\n", encoding="utf-8"
    )
    made = RunDir.create(tmp_path / "run", load_recipe(tmp_path / "r.yaml"))
    made.result.write_text("{}", encoding="utf-8")
    code = (
        "import sys\n"
        "from peft_dist.entrypoints import train\n"
        "code = train.main(['r.yaml', '--run-dir', 'run'])\n"
        "print(code, 'torch' in sys.modules)\n"
    )
    done = run([sys.executable, "-c", code], cwd=tmp_path, environment=environment(tmp_path))
    assert done.stdout.split() == ["2", "False"], done.stderr
    assert "has finished" in done.stderr


def test_the_age_of_this_process_counts_its_interpreters_start() -> None:
    code = (
        "import time; from peft_dist.entrypoints.train import process_age_s; print(process_age_s())"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import time; time.sleep(1); {code}"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert 1.0 <= float(done.stdout) < 60.0


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offline = Recipe.model_validate(RAW | {"tracking": {"wandb": {"mode": "offline"}}})
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.path_importer_cache", {})
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    with pytest.raises(LaunchError, match="tracking.wandb.mode: wandb is not installed"):
        _require_trackers(offline)
    _require_trackers(Recipe.model_validate(RAW))
