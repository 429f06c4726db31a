"""A worker process: nobody answers for it, and at its end it writes only into its own run."""

import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.common.errors import EXIT_CRASHED, EXIT_USER_ERROR, DataError
from peft_dist.config import Recipe
from peft_dist.run.attempt_records import record_path, write_json
from peft_dist.run.directory import RunDir
from peft_dist.run.history import crash_notes, ending_of_run
from peft_dist.run.lease import Attempt
from peft_dist.run.restart_policy import Kind
from peft_dist.worker.process import WorkerContext, _report
from tests.processes import environment

ASKS = """
from peft_dist.worker.process import run_worker
def work(context):
    print(repr(input("run this code? ")))
raise SystemExit(run_worker(work))
"""
FAULT = DataError("no rows", where="data.train")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "d"}})
    return RunDir.create(tmp_path / "run", recipe)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_is_noted_by_any_rank_of_the_attempt_that_holds_the_run(
    run: RunDir, rank: int
) -> None:
    attempt = Attempt.begin(run.attempts)
    context = WorkerContext(rank, 2, run_dir=run, attempt_number=1 if rank == 0 else 0)
    try:
        assert _report(FAULT, context) == EXIT_USER_ERROR
        found = run.read_failure()
        assert found is not None
        assert found.exit_code == EXIT_USER_ERROR
        assert found.error.startswith("rank 1 on host ") == (rank == 1)
        context.note_crash(Kind.CRASHED, "x")
        assert [note["rank"] for note in crash_notes(run.attempts, 1)] == [rank]
    finally:
        attempt.end("interrupted")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_an_attempt_that_was_taken_over_no_fault_is_noted(run: RunDir, rank: int) -> None:
    attempt = Attempt.begin(run.attempts)
    context = WorkerContext(rank, 2, run_dir=run, attempt_number=1, has_met=True)
    write_json(record_path(run.attempts, 2), {"attempt": 2})
    try:
        assert _report(FAULT, context) == EXIT_USER_ERROR
        context.note_crash(Kind.CRASHED, "x")
        assert run.read_failure() is None
        assert not crash_notes(run.attempts, 1)
    finally:
        attempt.end("interrupted")


def test_a_start_that_was_refused_notes_nothing_in_the_run_of_its_holder(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = Attempt.begin(run.attempts)
    monkeypatch.setenv("MASTER_PORT", "4711")  # the second start meets elsewhere
    try:
        for rank in (0, 1):
            context = WorkerContext(rank, 2, run_dir=run, started_s=float("-inf"))
            assert _report(FAULT, context) == EXIT_USER_ERROR
            context.stopped_in_setup("SIGINT")
        assert run.read_failure() is None
        assert ending_of_run(run) is None
    finally:
        attempt.end("interrupted")


def test_a_rank_that_is_told_to_stop_before_rank_0_has_the_run_waits_for_that(
    run: RunDir,
) -> None:
    context = WorkerContext(1, 2, run_dir=run)
    run.attempts.mkdir()
    other = {"attempt": 1, "group": "another start"}
    write_json(record_path(run.attempts, 1), other)
    context.stopped_in_setup("SIGUSR1")
    assert ending_of_run(run) is None, "that was of another start"
    write_json(record_path(run.attempts, 1), {**other, "outcome": "done"})  # lets go of the run
    attempt = Attempt.begin(run.attempts)
    try:
        context.stopped_in_setup("SIGUSR1")
        assert context.attempt_number == attempt.number == 2
        ending = ending_of_run(run)
        assert ending is not None and ending.kind is Kind.INTERRUPTED
    finally:
        attempt.end("done")


def test_a_question_of_a_library_has_no_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASKS], input="y\n" * 9, capture_output=True, text=True,
        check=False, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == EXIT_CRASHED
    assert "EOFError" in done.stderr
    assert "y" not in done.stdout.replace("run this code? ", "")
