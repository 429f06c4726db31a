"""What `status` says of jobs that wait, and of the GPU hours that runs have had."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.run import job_events
from peft_dist.slurm.pending import reason_in_words
from peft_dist.status.gpu_hours import gpu_hours
from tests.unit.run_folders import make_run, slurm_commands, submitted

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "some")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that has commands of Slurm answer; those that it names no more do not."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return lambda **commands: slurm_commands(tmp_path / "bin", **commands)


def test_a_job_that_waits_says_until_when_and_why_in_words(
    run: Path, slurm: Callable[..., Path], capsys: Capture
) -> None:
    submitted(run, "12", started=False)
    queue = "echo '12|gpu|100'; echo '13|gpu|300'; echo '14_|gpu|300'; echo '15|cpu|900'"
    rows = "echo '12|12|PENDING||2026-11-27T08:00:00|Priority'"
    slurm(
        squeue=f"case $* in *%Q*) {queue} ;; *) {rows} ;; esac",
        sshare="echo 'alice|0.25'",
    )
    assert main(["status", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "  ^ expected to start 2026-11-27 08:00:00; 2 jobs ahead of it; other jobs come first",
        "fair share of alice: 0.25 of 1",
    ]
    slurm(squeue=rows, sshare="exit 1")
    assert main(["status", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  ^ expected to start 2026-11-27 08:00:00; other jobs come first"
    ]


def test_every_word_of_a_limit_is_told_as_one() -> None:
    for reason in ("QOSMaxGRESPerUser", "AssocGrpGRES", "QOSGrpNodeLimit", "MaxJobsPerAccount"):
        assert reason_in_words(reason) == "a limit of your account or QOS is reached"
    assert reason_in_words("ReqNodeNotAvail, UnavailableNodes:node1").startswith("a node that")
    assert reason_in_words("SomethingNew") == "SomethingNew"


def note(event: str, time_s: float, restart: int = 0, **facts: object) -> dict[str, object]:
    return {"event": event, "job": "12", "time": time_s, "restart": restart, **facts}


def test_gpu_hours_are_those_of_all_starts() -> None:
    asked = {"by": "submit", "gpus": 8, "time_limit": "02:00:00"}
    history = [
        note("submitted", 0, **asked),
        note("started", 3600),
        note("ended", 2 * 3600),
        note("started", 3 * 3600, 1),  # killed: it counts until its limit
        note("started", 10 * 3600, 2),
    ]
    assert gpu_hours(history, 10.5 * 3600, is_at_work=True) == 8 * (1 + 2 + 0.5)
    assert gpu_hours(history, 99 * 3600, is_at_work=False) == 8 * (1 + 2)
    assert (
        gpu_hours([note("submitted", 0, by="submit"), *history[1:]], 1e6, is_at_work=True) is None
    )


def test_gpu_hours_stand_in_the_table_and_are_summed_up(tmp_path: Path, capsys: Capture) -> None:
    for name, hours in (("a", 1), ("b", 2)):
        folder = make_run(tmp_path / name)
        for event in (
            note("submitted", 0, by="submit", gpus=4),
            note("started", 0),
            note("ended", 3600 * hours, decision="stop"),
        ):
            job_events.record(folder, event)
    assert main(["status", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    titles, *rows, total = capsys.readouterr().out.splitlines()
    at = titles.index("gpu-h")
    assert [row[at : at + 5].strip() for row in rows] == ["4.0", "8.0"]
    assert total == "GPU hours in all: 12.0"
