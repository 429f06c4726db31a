"""`peft-dist logs`: the right files, their last lines, and what real writers add to them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import DataError, RunDirError
from peft_dist.run.directory import RunDir
from peft_dist.status import logs
from peft_dist.status.log_tail import BLOCK_BYTES, Tail, printable
from peft_dist.status.logs import log_files, natural
from tests.unit.run_folders import array, lease, make_run, slurm_commands, submitted

ROOT = Path(__file__).resolve().parents[2]

# Holds the run as rank 0 does, and says something now and then.
WRITER = """
import sys, time
from pathlib import Path
from peft_dist.run.lease import Attempt
run = Path(sys.argv[1])
lease = Attempt.begin(run / "attempts")
with (run / "logs" / "launcher.log").open("a") as log:
    for number in range(20):
        log.write(f"line {number}\\n")
        log.flush()
        time.sleep(0.02)
    log.write("no end")
lease.end(sys.argv[2]) if sys.argv[2] else sys.exit(1)
"""

Follow = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "some")


@pytest.fixture
def follow(run: Path) -> Iterator[Follow]:
    """Return a function that follows the run's logs in another process."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-m", "peft_dist", "logs", "--follow", *arguments, str(run)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **environment},
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def write(path: Path, text: str, *, age_s: float = 0.0) -> Path:
    """Write a log that was last written to so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for some in (path, path.parent):
        os.utime(some, (time.time() - age_s,) * 2)
    return path


def names(paths: list[Path]) -> list[str]:
    return [f"{path.parent.name}/{path.name}" for path in paths]


def lines_of(process: "subprocess.Popen[str]", count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().rstrip("\n") for _ in range(count)]


# ---- which files ----


def test_numbers_in_names_sort_by_their_value() -> None:
    found = ["12-10", "12-9", "12_10-0", "12_9-1", "node10", "node9", "node"]
    assert sorted(found, key=natural) == [
        "12-9", "12-10", "12_9-1", "12_10-0", "node", "node9", "node10",
    ]  # fmt: skip


def test_the_newest_start_shows_its_job_and_every_node_in_order(run: Path) -> None:
    submitted(run, "12")
    write(run / "logs" / "12-9" / "node1.log", "old")
    for node in ("node10", "node9"):
        write(run / "logs" / "12-10" / f"{node}.log", "new", age_s=60)  # restarts count, not clocks
    write(run / "logs" / "12-10" / "node9.rank-3.0.log", "rank")
    write(run / "logs" / "job-12.log", "job")
    write(run / "logs" / "job-9.log", "another job")
    assert names(log_files(run)) == ["logs/job-12.log", "12-10/node9.log", "12-10/node10.log"]


def test_of_two_jobs_the_one_that_wrote_last_is_the_newer(run: Path) -> None:
    write(run / "logs" / "99-0" / "node1.log", "before the numbers began anew", age_s=500)
    write(run / "logs" / "3-0" / "node1.log", "after", age_s=100)
    write(run / "logs" / "3-1" / "node1.log", "after", age_s=90)
    assert names(log_files(run)) == ["3-1/node1.log"]


def test_an_elements_job_log_is_in_the_folder_of_the_array(tmp_path: Path) -> None:
    elements = array(tmp_path / "sweep", [["train.seed=1"], ["train.seed=2"]])
    for index, path in enumerate(elements):
        submitted(path, f"12_{index}")
        write(tmp_path / "sweep" / "logs" / f"job-12_{index}.log", "job")
    assert names(log_files(elements[1])) == ["logs/job-12_1.log"]
    write(elements[1] / "logs" / "12_1-0" / "node1.log", "node")
    assert names(log_files(elements[1])) == ["logs/job-12_1.log", "12_1-0/node1.log"]


def test_a_local_run_has_its_launchers_log_before_and_after_a_job(run: Path) -> None:
    launcher = write(run / "logs" / "launcher.log", "local", age_s=50)
    assert log_files(run) == [launcher]
    write(run / "logs" / "12-0" / "node1.log", "job")
    assert names(log_files(run)) == ["12-0/node1.log"]
    os.utime(launcher)
    os.utime(run / "logs" / "12-0" / "node1.log", (1, 1))
    os.utime(run / "logs" / "12-0", (1, 1))
    assert log_files(run) == [launcher]


def test_a_ranks_newest_log_is_shown_wherever_it_ran(run: Path) -> None:
    start = run / "logs" / "12-1"
    write(run / "logs" / "12-0" / "node1.rank-5.0.log", "before")
    write(start / "node1.rank-3.0.log", "before it moved", age_s=60)
    write(start / "node2.rank-3.1.log", "now")
    write(start / "node1.rank-30.0.log", "another")
    write(start / "node1.log", "node")
    (start / "node1.rank-0.0.log").symlink_to("node1.log")
    assert names(log_files(run, rank=3)) == ["12-1/node2.rank-3.1.log"]
    assert names(log_files(run, rank=5)) == ["12-0/node1.rank-5.0.log"]
    assert log_files(run, rank=0)[0].read_text() == "node"
    with pytest.raises(RunDirError, match=r"no log of rank 7: ranks 0, 3, 5, 30 have one; leave"):
        log_files(run, rank=7)


def test_a_rank_of_a_local_run_is_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(run), "--rank", "1"]) == 2
    assert "has no log of rank 1; leave out --rank" in capsys.readouterr().err
    write(run / "logs" / "launcher.log", "x")
    assert main(["logs", str(run), "--rank", "1", "--follow"]) == 2
    assert "rank 1: all ranks write to launcher.log; leave" in capsys.readouterr().err


@pytest.mark.parametrize("rank", ["-1", "x", "9" * 30])
def test_a_rank_that_is_no_number_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], rank: str
) -> None:
    assert main(["logs", str(run), f"--rank={rank}"]) == 2
    assert "must be a whole number from 0" in capsys.readouterr().err


def test_a_run_without_logs_and_an_array_say_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(run)]) == 2
    assert "has no logs yet; see how it is: peft-dist status" in capsys.readouterr().err
    array(tmp_path / "sweep", [["train.seed=1"]])
    assert main(["logs", str(tmp_path / "sweep")]) == 2
    assert "is an array; name one of its runs" in capsys.readouterr().err


# ---- what is shown of them ----


def test_several_logs_are_shown_under_their_names(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(run, "12")
    write(run / "logs" / "job-12.log", "a\nb\nc\n")
    write(run / "logs" / "12-0" / "node1.log", "d\ne")
    write(run / "logs" / "12-0" / "node2.log", "")
    assert main(["logs", str(run), "--lines", "2"]) == 0
    shown = "==> job-12.log <==\nb\nc\n\n==> 12-0/node1.log <==\nd\ne\n"
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize("end", ["\n", ""])
def test_as_many_lines_as_asked_for_are_shown(tmp_path: Path, count: int, end: str) -> None:
    path = tmp_path / "log"
    lines = [f"{number}:" + "x" * (BLOCK_BYTES // 3) for number in range(12)]
    path.write_text("\n".join(lines) + end)
    tail = Tail(path, count)
    assert (tail.more() + tail.rest()).splitlines() == lines[-count:]


def test_nothing_of_a_log_steers_the_terminal() -> None:
    text = "\x1b[31mred\x1b[0m\x1b]0;title\x07\x1b[2J\x08 bell\x07 \x9b1m\ttab\r\n\0\x7f"
    assert printable(text) == "red bell 1m\ttab\n"
    assert printable("\x1b]0;never ended\nnext") == "]0;never ended\nnext"
    assert printable("1%\r50%\r100%\ndone") == "100%\ndone"


def test_a_tail_gives_whole_lines_and_notices_a_file_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path, None)
    assert tail.more() == ""
    path.write_bytes("eins\nzw\u00f6".encode()[:-1])  # half a character
    assert tail.more() == "eins\n"
    path.write_text("eins\nzw\u00f6lf\n", encoding="utf-8")
    assert tail.more() == "zw\u00f6lf\n"
    path.write_text("anew\n")
    assert tail.more() == "anew\n"
    other = tmp_path / "other"
    other.write_text("another file of more text\n")
    other.replace(path)
    assert tail.more() == "another file of more text\n"
    assert tail.rest() == ""


# ---- following ----


def test_following_shows_every_line_once_and_ends_with_the_run(run: Path, follow: Follow) -> None:
    process = follow()
    assert process.stderr is not None
    assert "has no logs yet" in process.stderr.readline()
    subprocess.run([sys.executable, "-c", WRITER, str(run), "done"], cwd=ROOT, check=True)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert output.splitlines() == [*(f"line {number}" for number in range(20)), "no end"]


def test_following_a_run_that_is_over_shows_its_end(run: Path, follow: Follow) -> None:
    write(run / "logs" / "launcher.log", "a\nb\nc\n")
    lease(run, outcome="interrupted")
    output, errors = follow("--lines=2").communicate(timeout=20)
    assert (output, errors) == ("b\nc\n", "")


def test_following_waits_whether_crashed_processes_are_started_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run([sys.executable, "-c", WRITER, str(run), ""], cwd=ROOT, check=False)
    monkeypatch.setattr(logs, "RESTART_S", 1.2)
    started = time.monotonic()
    assert main(["logs", "--follow", "--lines=1", str(run)]) == 0
    assert 1.2 <= time.monotonic() - started < 10
    assert capsys.readouterr().out == "no end\n"


def test_following_ends_quietly_with_an_interrupt(run: Path, follow: Follow) -> None:
    lease(run, here=True)
    write(run / "logs" / "launcher.log", "a\n")
    process = follow()
    assert lines_of(process, 1) == ["a"]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert (process.returncode, output, errors) == (0, "", "")


def test_following_a_job_takes_up_its_later_starts_until_it_is_over(
    run: Path, tmp_path: Path, follow: Follow
) -> None:
    state = tmp_path / "state"
    state.write_text("RUNNING")
    commands = slurm_commands(
        tmp_path / "bin", squeue=f'echo "12|12|$(cat {state})|node1|N/A|None"'
    )
    submitted(run, "12")
    write(run / "logs" / "12-0" / "node1.log", "first\n")
    code = (
        "import sys\n"
        "from peft_dist.status import logs\n"
        "logs.ASK_SLURM_EVERY_S = 0.5\n"
        "sys.exit(logs.show_logs(sys.argv[1], follow=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PATH": f"{commands}:/usr/bin:/bin"},
        text=True,
    )
    assert lines_of(process, 1) == ["first"]
    submitted(run, "12", restarts=1)
    (run / "result.json").write_text("{}")  # the job still has something to say
    write(run / "logs" / "12-1" / "node1.log", "second\n")
    assert lines_of(process, 3) == ["", "==> 12-1/node1.log <==", "second"]
    state.write_text("COMPLETED")
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (0, "")


def test_following_says_once_that_nobody_knows_the_job(
    run: Path, tmp_path: Path, follow: Follow
) -> None:
    commands = slurm_commands(tmp_path / "bin", squeue="echo 'no controller' >&2; exit 1")
    submitted(run, "12")
    write(run / "logs" / "12-0" / "node1.log", "first\n")
    process = follow(PATH=f"{commands}:/usr/bin:/bin")
    assert process.stderr is not None
    assert "state unknown: squeue: no controller; Ctrl-C ends" in process.stderr.readline()
    assert lines_of(process, 1) == ["first"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_why_a_run_ended_stands_before_its_log(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run / "logs" / "launcher.log", "a\nb\nc\n")
    RunDir(run).record_failure(DataError("no rows", where="train.jsonl"))
    assert main(["logs", str(run), "--lines", "1"]) == 0
    assert capsys.readouterr().out == "peft-dist: FAILED: train.jsonl: no rows\nc\n"
