"""The jobs of a run as its directory remembers them."""

import fcntl
import stat
from pathlib import Path

import pytest

from peft_dist.common.errors import RunDirError
from peft_dist.run.job_events import candidates, events, jobs_file, newest_job, record
from tests.unit.run_folders import submitted


def test_events_are_read_back_in_order_and_belong_to_their_owner_alone(tmp_path: Path) -> None:
    record(tmp_path, {"event": "submitted", "job": "12", "time": 7, "nodes": 2, "by": "submit"})
    record(tmp_path, {"event": "started", "job": "12", "restart": 0})
    first, second = events(tmp_path)
    assert first == {"event": "submitted", "job": "12", "time": 7, "nodes": 2, "by": "submit"}
    assert second["event"] == "started" and second["time"] > 1e9
    file = jobs_file(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_half_line_costs_itself_and_not_the_next_one(tmp_path: Path) -> None:
    record(tmp_path, {"event": "submitted", "job": "12"})
    with jobs_file(tmp_path).open("a") as file:
        file.write('{"event": "started", "jo')
    assert [event["event"] for event in events(tmp_path)] == ["submitted"]
    record(tmp_path, {"event": "ended", "job": "12"})
    assert [event["event"] for event in events(tmp_path)] == ["submitted", "ended"]


@pytest.mark.parametrize("line", ["[]", "7", '{"event": "started"}', '{"job": "1"}', "\xff", ""])
def test_a_line_that_is_no_event_is_passed_over(tmp_path: Path, line: str) -> None:
    record(tmp_path, {"event": "started", "job": "12"})
    with jobs_file(tmp_path).open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    assert newest_job(tmp_path) == "12"


def test_of_two_writers_one_waits_for_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS finds the end of a file for two writers at once only under a lock."""
    record(tmp_path, {"event": "submitted", "job": "12"})
    asked = []
    flock = fcntl.flock

    def counted(file: int, what: int) -> None:
        asked.append(what)
        if len(asked) == 3:
            flock(other.fileno(), fcntl.LOCK_UN)
        flock(file, what)

    with jobs_file(tmp_path).open("a") as other:
        flock(other.fileno(), fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", counted)
        record(tmp_path, {"event": "started", "job": "12"})
        assert asked == [fcntl.LOCK_EX | fcntl.LOCK_NB] * 3
        flock(other.fileno(), fcntl.LOCK_EX)
        monkeypatch.setattr("peft_dist.run.job_events.LOCK_WAIT_S", -1.0)
        record(tmp_path, {"event": "ended", "job": "12"})  # who holds it may never let go
    assert [event["event"] for event in events(tmp_path)] == ["submitted", "started", "ended"]


def test_the_newest_job_is_the_last_one_submitted_or_started_whatever_its_number(
    tmp_path: Path,
) -> None:
    assert newest_job(tmp_path) is None
    submitted(tmp_path, "99", started=False)
    assert newest_job(tmp_path) == "99"
    record(tmp_path, {"event": "started", "job": "3_1"})
    record(tmp_path, {"event": "ended", "job": "99"})
    assert newest_job(tmp_path) == "3_1"


@pytest.mark.parametrize(("job", "successor"), [("12", "13"), ("12_3", "13_3")])
def test_a_successor_counts_from_its_submission_on(
    tmp_path: Path, job: str, successor: str
) -> None:
    assert candidates(tmp_path, []) == []
    submitted(tmp_path, job)
    assert candidates(tmp_path, events(tmp_path)) == [job]
    (tmp_path / "slurm" / "successor").write_text("13\n")
    assert candidates(tmp_path, events(tmp_path)) == [job, successor]
    record(tmp_path, {"event": "started", "job": successor})
    assert candidates(tmp_path, events(tmp_path)) == [successor]


def test_what_cannot_be_written_or_read_is_told_in_one_line(tmp_path: Path) -> None:
    jobs_file(tmp_path).mkdir(parents=True)
    with pytest.raises(RunDirError, match=r"jobs\.jsonl: cannot be written: Is a directory"):
        record(tmp_path, {"event": "started", "job": "12"})
    with pytest.raises(RunDirError, match=r"jobs\.jsonl: cannot be read: Is a directory"):
        events(tmp_path)
