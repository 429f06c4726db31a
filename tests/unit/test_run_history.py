"""What a run directory says of how its starts ended."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.env import FAILURES
from peft_dist.common.errors import DataError, TrainingError
from peft_dist.run import job_events
from peft_dist.run.attempt_records import record_path, records, write_json
from peft_dist.run.directory import RunDir
from peft_dist.run.failure_files import WorkerFailure, read_failure, write_failure
from peft_dist.run.history import (
    LaunchMark,
    crash_notes,
    ending_of_launch,
    ending_of_run,
    is_superseded,
    mark_launch,
    note_crash,
    read_history,
    was_interrupted,
)
from peft_dist.run.lease import Attempt
from peft_dist.run.restart_policy import Ending, Kind, decide_by_attempts
from tests.unit.run_folders import make_run

CRASH = Ending(Kind.CRASHED, "a worker failed")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(make_run(tmp_path / "run"))


@pytest.fixture
def folder(run: RunDir) -> Path:
    return run.attempts


def crash(folder: Path, number: int, **facts: Any) -> None:
    """Leave what an attempt leaves that crashed: its record, without an outcome."""
    folder.mkdir(exist_ok=True)
    write_json(record_path(folder, number), {"attempt": number, "pid": -1, "host": "h", **facts})


def checkpoint(run: RunDir, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def test_an_attempt_ends_as_its_record_and_its_ranks_notes_say(run: RunDir, folder: Path) -> None:
    crash(folder, 1, outcome="done")
    crash(folder, 2, outcome="interrupted", signal="SIGTERM")
    crash(folder, 3, from_step=40)
    note_crash(folder, 3, rank=0, kind=Kind.LOST_PEER, step=43, error="reset")
    note_crash(folder, 3, rank=1, kind=Kind.OUT_OF_MEMORY, step=43, error="tried\n2 GiB")
    crash(folder, 4)
    note_crash(folder, 4, rank=2, kind=Kind.HUNG, step=7, error="stuck")
    crash(folder, 5, outcome="failed", error="loss nan")
    assert read_history(run).attempts == (
        Ending(Kind.DONE),
        Ending(Kind.INTERRUPTED, "stopped by SIGTERM", "SIGTERM"),
        Ending(Kind.OUT_OF_MEMORY, "tried 2 GiB", rank=1, step=43, began_at=40),
        Ending(Kind.HUNG, "stuck", rank=2, step=7),
        Ending(Kind.CRASHED, "loss nan"),
    )


def test_the_present_attempt_and_those_before_a_person_started_do_not_count(
    run: RunDir, begin: Callable[..., Attempt]
) -> None:
    checkpoint(run, 40)
    for number in (1, 2, 3):
        crash(run.attempts, number, from_step=40, outcome="failed")
    decision = decide_by_attempts(read_history(run))
    assert decision is not None and decision.word == "stop"
    by_hand = begin(after_verdict=True)
    assert read_history(run, before=by_hand.number).attempts == ()
    by_hand.note(from_step=40)
    by_hand.end("failed")
    for allowed in (True, True, False):
        again = begin()
        decision = decide_by_attempts(read_history(run, before=again.number))
        assert decision is not None and decision.again is allowed
        again.note(from_step=40)
        again.end("failed")


def test_a_checkpoint_since_then_is_progress(run: RunDir, folder: Path) -> None:
    for number in (1, 2, 3):
        crash(folder, number, from_step=40)
    checkpoint(run, 40)
    assert (decide_by_attempts(read_history(run)) or CRASH) and not decided_again(run)
    checkpoint(run, 60)
    assert decided_again(run)


def decided_again(run: RunDir) -> bool:
    decision = decide_by_attempts(read_history(run))
    return decision is not None and decision.again


def test_memory_that_ran_out_before_the_first_step_is_a_crash(run: RunDir, folder: Path) -> None:
    crash(folder, 1)
    note_crash(folder, 1, rank=1, kind=Kind.OUT_OF_MEMORY, step=None, error="no memory")
    assert read_history(run).attempts == (Ending(Kind.CRASHED, "no memory", rank=1),)


def test_starts_of_jobs_count_since_a_person_submitted_the_run(run: RunDir) -> None:
    def event(name: str, restart: int, **facts: Any) -> None:
        job_events.record(run.path, {"event": name, "job": "7", "restart": restart, **facts})

    event("submitted", 0)
    event("started", 0)
    event("decided", 0, step=0, reason="of another version")
    event("started", 1)
    event("decided", 1, step=10, kind="oom", error="node1 ran out", reason="node1 ran out; goes on")
    event("started", 2)
    history = read_history(run)
    assert history.job_starts == 3
    assert history.starts == (
        Ending(Kind.CRASHED, "of another version", checkpoint=0),
        Ending(Kind.OUT_OF_MEMORY, "node1 ran out", checkpoint=10),
    )
    job_events.record(run.path, {"event": "submitted", "job": "8", "by": "resume"})
    assert (read_history(run).starts, read_history(run).job_starts) == ((), 0)


def test_crash_notes_that_are_half_written_are_passed_over(folder: Path) -> None:
    crash(folder, 3)
    for rank in (10, 2):
        assert note_crash(folder, 3, rank=rank, kind=Kind.HUNG, step=None, error="stuck")
    (folder / "00000003-rank-1.json").write_text('{"rank"', encoding="utf-8")
    assert [note["rank"] for note in crash_notes(folder, 3)] == [2, 10]
    assert [record["attempt"] for record in records(folder)] == [3]


STOPPED, LOST_PEER = Kind.INTERRUPTED, Kind.LOST_PEER


@pytest.mark.parametrize(
    ("words", "stopped"),
    [
        ([(STOPPED, "SIGUSR1"), None], True),
        ([None, (STOPPED, "SIGINT")], True),
        ([(STOPPED, "SIGTERM"), (STOPPED, "SIGTERM")], True),
        ([(LOST_PEER, "reset"), (STOPPED, "SIGTERM")], True),
        ([(STOPPED, "SIGTERM"), None], False),  # the other one was killed
        ([(STOPPED, "SIGTERM"), (Kind.CRASHED, "bug")], False),
        ([(LOST_PEER, "reset"), (LOST_PEER, "reset")], False),
        ([None, None], False),
    ],
)
def test_ranks_that_a_signal_ended_while_they_loaded_have_not_crashed(
    run: RunDir, folder: Path, words: list[tuple[Kind, str] | None], stopped: bool
) -> None:
    for number in (1, 2, 3):
        crash(folder, number, world_size=2)
        for rank, word in enumerate(words):
            if word is not None:
                note_crash(folder, number, rank=rank, kind=word[0], step=None, error=word[1])
    assert was_interrupted(folder, records(folder)[-1]) == stopped
    assert decided_again(run) == stopped


def test_a_launch_ended_as_the_run_says_and_only_then_as_its_launcher_does(
    run: RunDir, folder: Path
) -> None:
    fault = WorkerFailure(2, "no rows", 0, "h", 0.0)

    def ending(**known: Any) -> Ending:
        given = {"before": LaunchMark(None, 0), "signal": None, "failure": None, **known}
        return ending_of_launch(run, otherwise=CRASH, **given)

    assert ending() == CRASH
    assert ending(failure=fault) == Ending(Kind.USER_ERROR, "no rows")
    crash(folder, 1, outcome="interrupted", signal="SIGUSR1")
    assert ending(failure=fault) == Ending(Kind.INTERRUPTED, "stopped by SIGUSR1", "SIGUSR1")
    assert ending(signal="SIGINT").error == "stopped by SIGINT"
    run.record_failure(TrainingError("loss nan"))
    assert ending(signal="SIGINT") == Ending(Kind.TRAINING_FAILED, "loss nan")
    assert ending(before=mark_launch(run), failure=fault).kind is Kind.USER_ERROR
    assert ending(before=mark_launch(run)) == CRASH, "an older attempt was stopped, not this one"
    assert ending_of_run(run) == Ending(Kind.TRAINING_FAILED, "loss nan")
    run.result.write_text("{}", encoding="utf-8")
    assert ending(signal="SIGINT") == ending_of_run(run) == Ending(Kind.DONE)


def test_the_error_of_rank_0_is_the_one_that_counts_and_else_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_failure(DataError("nobody asked"), rank=0)
    monkeypatch.setenv(FAILURES, str(tmp_path))
    assert read_failure(tmp_path) is None
    write_failure(DataError("no rows"), rank=3, by="rank 3 on host h: ")
    write_failure(TrainingError("loss nan"), rank=1)
    write_failure(DataError("of its second start"), rank=3)
    (tmp_path / "rank-2.json").write_text("{", encoding="utf-8")
    found = read_failure(tmp_path)
    assert found is not None and (found.exit_code, found.error) == (2, "rank 3 on host h: no rows")
    write_failure(TrainingError("loss nan"), rank=0)
    found = read_failure(tmp_path)
    assert found is not None and (found.exit_code, found.rank) == (3, 0)
    monkeypatch.setenv(FAILURES, str(tmp_path / "gone"))
    write_failure(DataError("a full disk"), rank=0)


def test_a_job_whose_run_another_job_holds_is_superseded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that was cut off lives on, and its launcher would start its processes again."""
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    folder.mkdir(exist_ok=True)
    assert not is_superseded(folder)
    for number, restarts in ((1, 0), (2, 1)):
        record = {"attempt": number, "slurm_job_id": "4", "slurm_restart_count": restarts}
        write_json(record_path(folder, number), record)
        assert is_superseded(folder) is (number == 2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not is_superseded(folder)
