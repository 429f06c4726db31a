"""The lease of a run directory, with real processes: one holder, no clocks, zombies locked out."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common import atomic
from peft_dist.common.errors import (
    EXIT_DO_NOT_RETRY,
    EXIT_USER_ERROR,
    RunDirError,
    RunDirGone,
    Superseded,
)
from peft_dist.run import lease
from peft_dist.run.attempt_records import latest, record_path, records, write_json
from peft_dist.run.history import note_crash
from peft_dist.run.lease import Attempt, refuse_if_held
from peft_dist.run.restart_policy import Kind

HOLD = """
import sys, time
from pathlib import Path
from peft_dist.run.lease import Attempt
Attempt.begin(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(120)
"""
CONTEND = """
import os, sys
from pathlib import Path
from peft_dist.run import lease
from peft_dist.common import atomic
from peft_dist.common.errors import RunDirError
if sys.argv[2] == "no links":
    def link(*_):
        raise PermissionError(1, "Operation not permitted")
    os.link = link
print("ready", flush=True)
for line in sys.stdin:
    try:
        held = lease.Attempt.begin(Path(sys.argv[1]) / line.strip())
        print("won", held.number, flush=True)
    except RunDirError as error:
        print("lost", error, flush=True)
"""
CHECK = """
import sys, time
from pathlib import Path
from peft_dist.common.errors import Superseded
from peft_dist.run import lease
attempt = lease.Attempt.begin(Path(sys.argv[1]))
print("held", flush=True)
writes, step_s = 0, time.monotonic()
while time.monotonic() - step_s < 60:
    time.sleep(0.01)
    paused = time.monotonic() - step_s > 0.5
    step_s = time.monotonic()
    try:
        attempt.check()
    except Superseded:
        print("superseded after", writes, "writes", flush=True)
        break
    if paused or writes:
        writes += 1
"""
ELSEWHERE = {"host": "elsewhere", "boot_id": "another boot", "pid": 4242}

Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all of this process's times pass 20 times as fast; their ratio stays."""
    for name in (
        "HEARTBEAT_S",
        "STALE_AFTER_S",
        "LOOK_EVERY_S",
        "CHECK_EVERY_S",
        "PAUSE_S",
        "TICK_S",
    ):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "attempts"


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start small programs; end them all."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str, *arguments: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def hold(spawn: Spawn, folder: Path) -> Callable[[], "subprocess.Popen[str]"]:
    """Let another process hold the run."""

    def start() -> "subprocess.Popen[str]":
        holder = spawn(HOLD, str(folder))
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        return holder

    return start


def move_elsewhere(folder: Path) -> None:
    """Make the newest record look like one from another machine."""
    record = latest(folder)
    assert record is not None
    write_json(record_path(folder, record["attempt"]), {**record, **ELSEWHERE})


def beat_elsewhere(folder: Path, stop: threading.Event, *, counts: bool) -> None:
    """Beat as a holder on another machine, of this version or of one that counted its beats."""
    beat = 0
    while not stop.wait(lease.HEARTBEAT_S):
        record = latest(folder)
        assert record is not None
        path, beat = record_path(folder, record["attempt"]), beat + 1
        if counts:
            write_json(path, {**record, **ELSEWHERE, "beat": beat})
        else:
            os.utime(path)


def seconds_to_refusal(ask: Callable[[], object]) -> tuple[float, str]:
    began_s = time.monotonic()
    with pytest.raises(RunDirError) as caught:
        ask()
    return time.monotonic() - began_s, str(caught.value)


def crash(folder: Path, number: int, **facts: Any) -> None:
    """Leave what an attempt leaves that crashed: its record, without an outcome."""
    folder.mkdir(exist_ok=True)
    write_json(record_path(folder, number), {"attempt": number, "pid": -1, "host": "h", **facts})


@pytest.mark.parametrize("links", ["links", "no links"])
def test_of_four_at_once_exactly_one_gets_the_run(spawn: Spawn, tmp_path: Path, links: str) -> None:
    contenders = [spawn(CONTEND, str(tmp_path), links) for _ in range(4)]

    def answers() -> list[str]:
        return [contender.stdout.readline() for contender in contenders]  # type: ignore[union-attr]

    assert answers() == ["ready\n"] * 4
    for name in range(20):
        # Half of the races are for a new run, half for one whose holder has crashed.
        expected = 1 + name % 2
        if expected == 2:
            crash(tmp_path / str(name), 1, outcome="failed")
        for contender in contenders:
            assert contender.stdin is not None
            contender.stdin.write(f"{name}\n")
            contender.stdin.flush()
        said = answers()
        assert said.count(f"won {expected}\n") == 1, said
        assert sum(line.startswith("lost") and "is in use by attempt" in line for line in said) == 3
        assert len(records(tmp_path / str(name))) == expected
        assert not [path for path in (tmp_path / str(name)).iterdir() if ".json." in path.name]


@pytest.mark.parametrize("ask", [Attempt.begin, refuse_if_held])
def test_a_second_process_is_refused_at_once_and_told_who_holds_the_run(
    hold: Callable[[], "subprocess.Popen[str]"], folder: Path, ask: Callable[[Path], object]
) -> None:
    holder = hold()
    seconds, told = seconds_to_refusal(lambda: ask(folder))
    assert seconds < 0.5
    assert f"attempt 1, process {holder.pid} on host {os.uname().nodename}" in told
    assert told.startswith(f"{folder.parent}: ")
    assert len(records(folder)) == 1


@pytest.mark.parametrize("waited_for", [True, False])
def test_the_run_of_a_killed_process_is_taken_over_at_once(
    hold: Callable[[], "subprocess.Popen[str]"],
    begin: Callable[..., Attempt],
    folder: Path,
    waited_for: bool,
) -> None:
    holder = hold()
    holder.kill()
    if waited_for:
        holder.wait()
    else:  # as long as its parent does not ask, its pid stays taken
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    began_s = time.monotonic()
    refuse_if_held(folder)
    attempt = begin()
    assert time.monotonic() - began_s < 0.5
    assert attempt.number == 2
    assert attempt.previous is not None
    assert attempt.previous["pid"] == holder.pid


def test_a_stopped_process_still_holds_its_run(
    hold: Callable[[], "subprocess.Popen[str]"], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 0.2)
    holder = hold()
    holder.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    _, told = seconds_to_refusal(lambda: Attempt.begin(folder))
    assert f"process {holder.pid}" in told


def test_a_pid_that_another_process_has_got_holds_nothing(
    hold: Callable[[], "subprocess.Popen[str]"], begin: Callable[..., Attempt], folder: Path
) -> None:
    holder = hold()
    holder.send_signal(signal.SIGSTOP)
    record = latest(folder)
    assert record is not None
    write_json(record_path(folder, 1), {**record, "start_ticks": record["start_ticks"] - 1})
    assert begin().number == 2


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("ask", [Attempt.begin, refuse_if_held])
def test_a_beating_holder_elsewhere_is_respected(
    folder: Path, ask: Callable[[Path], object], counts: bool
) -> None:
    Attempt.begin(folder).end("done")
    crash(folder, 2, **ELSEWHERE, **({"beat": 0} if counts else {}))
    stop = threading.Event()
    beater = threading.Thread(target=beat_elsewhere, args=(folder, stop), kwargs={"counts": counts})
    beater.start()
    try:
        seconds, told = seconds_to_refusal(lambda: ask(folder))
    finally:
        stop.set()
        beater.join()
    assert seconds < 2
    assert "attempt 2, process 4242 on host elsewhere" in told


@pytest.mark.parametrize("half_written", [False, True])
def test_a_silent_holder_elsewhere_is_taken_over_only_after_its_time(
    begin: Callable[..., Attempt],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    half_written: bool,
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    crash(folder, 1, **ELSEWHERE, beat=7)
    if half_written:
        record_path(folder, 1).write_text('{"attempt": 1, "ho', encoding="utf-8")
        assert latest(folder) == {"attempt": 1}
    began_s = time.monotonic()
    assert begin().number == 2
    assert 1.0 <= time.monotonic() - began_s < 2.0


def test_a_holder_elsewhere_that_a_launcher_has_watched_is_not_watched_again(
    begin: Callable[..., Attempt],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    crash(folder, 1, **ELSEWHERE)
    began_s = time.monotonic()
    watched = refuse_if_held(folder)
    assert 1.0 <= time.monotonic() - began_s < 2.0
    assert "process 4242 on host elsewhere held this run; waiting up to 1 s" in (
        capsys.readouterr().err
    )
    began_s = time.monotonic()
    assert begin(watched=watched).number == 2
    assert time.monotonic() - began_s < 0.5


def test_a_holder_elsewhere_that_beats_after_it_was_watched_keeps_its_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    crash(folder, 1, **ELSEWHERE)
    watched = refuse_if_held(folder)
    os.utime(record_path(folder, 1))
    threading.Timer(0.5, os.utime, (record_path(folder, 1),)).start()
    with pytest.raises(RunDirError, match="process 4242 on host elsewhere"):
        Attempt.begin(folder, watched=watched)


def test_a_holder_elsewhere_that_ends_while_it_is_watched_makes_room(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    crash(folder, 1, **ELSEWHERE, beat=7)
    ended = {"attempt": 1, **ELSEWHERE, "beat": 8, "outcome": "interrupted"}
    threading.Timer(0.5, write_json, (record_path(folder, 1), ended)).start()
    began_s = time.monotonic()
    assert begin().number == 2
    assert time.monotonic() - began_s < 2.0


def test_who_takes_a_silent_run_over_is_seen_by_others_that_watch_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    crash(folder, 1, **ELSEWHERE, beat=7)
    # At the end of the watch: the very last look has to see it too.
    threading.Timer(0.97, crash, (folder, 2), {**ELSEWHERE, "beat": 0}).start()
    _, told = seconds_to_refusal(lambda: Attempt.begin(folder))
    assert "attempt 2" in told


@pytest.mark.parametrize(
    ("job", "restarts", "taken"), [("77", "1", True), ("77", "0", False), ("78", "1", False)]
)
def test_a_requeued_job_takes_over_from_its_own_zombie(
    begin: Callable[..., Attempt],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    restarts: str,
    taken: bool,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    zombie = begin()
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    if taken:
        refuse_if_held(folder)
        assert begin().number == 2
        with pytest.raises(Superseded):
            zombie.check(now=True)
    else:
        _, told = seconds_to_refusal(begin)
        assert "(Slurm job 77)" in told


def test_a_zombie_is_told_stops_to_beat_and_writes_nothing(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    zombie = begin()
    zombie.check(now=True)
    crash(folder, 2)
    before = record_path(folder, 1).read_text(encoding="utf-8")
    zombie.note(from_step=40)
    zombie.end("done")
    assert record_path(folder, 1).read_text(encoding="utf-8") == before
    with pytest.raises(Superseded, match="attempt 1 was taken over by attempt 2") as caught:
        zombie.check()
    assert caught.value.exit_code == EXIT_DO_NOT_RETRY


def test_the_heartbeat_of_a_zombie_ends_by_itself(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    zombie = begin()
    hearts = [thread for thread in threading.enumerate() if thread.name == "heartbeat"]
    assert len(hearts) == 1
    crash(folder, 2)
    hearts[0].join(timeout=3 * lease.HEARTBEAT_S)
    assert not hearts[0].is_alive()
    with pytest.raises(Superseded):
        zombie.check()


def test_an_attempt_whose_folder_was_cleared_does_not_come_back(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    zombie = begin()
    record_path(folder, 1).unlink()
    zombie.note(from_step=40)
    assert records(folder) == []
    with pytest.raises(Superseded):
        zombie.check(now=True)


@pytest.mark.parametrize("moved", [True, False])
def test_an_attempt_whose_run_directory_is_gone_says_so_and_makes_nothing_there(
    tmp_path: Path, moved: bool
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    attempt = Attempt.begin(run_dir / "attempts")
    if moved:
        run_dir.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(run_dir)
    attempt.note(from_step=40)
    with pytest.raises(RunDirGone) as caught:
        attempt.check(now=True)
    assert str(caught.value).startswith(f"{run_dir}: is gone; if it was moved, go on with ")
    assert caught.value.exit_code == EXIT_USER_ERROR
    attempt.end("failed")
    assert not run_dir.exists()


def test_check_looks_at_the_disk_only_now_and_then_unless_it_must(
    begin: Callable[..., Attempt], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 60.0)
    attempt = begin()
    crash(folder, 2)
    time.sleep(3 * lease.PAUSE_S)
    attempt.check()
    with pytest.raises(Superseded):
        attempt.check(now=True)


def test_a_process_that_was_stopped_looks_before_it_writes(folder: Path, spawn: Spawn) -> None:
    process = spawn(CHECK, str(folder))
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    crash(folder, 2)
    process.send_signal(signal.SIGCONT)
    assert "superseded after 0 writes\n" in process.stdout.readline()


def test_beats_keep_what_was_noted_and_the_first_outcome_stays(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    attempt = begin(after_verdict=True)
    attempt.note(from_step=40, world_size=2)
    before_ns = record_path(folder, 1).stat().st_mtime_ns
    time.sleep(2.5 * lease.HEARTBEAT_S)
    assert record_path(folder, 1).stat().st_mtime_ns > before_ns
    attempt.end("interrupted", step=44)
    attempt.end("failed")
    time.sleep(1.5 * lease.HEARTBEAT_S)
    attempt.check(now=True)
    ended = latest(folder)
    assert ended is not None
    assert {"from_step": 40, "world_size": 2, "step": 44, "counts_from": True}.items() <= set(
        ended.items()
    )
    assert ended["outcome"] == "interrupted"
    assert begin().previous == ended


@pytest.mark.timeout(20)
def test_a_signal_handler_can_end_an_attempt_in_the_middle_of_a_note(
    begin: Callable[..., Attempt], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        attempt.end("interrupted")
        raise SystemExit

    def interrupted(*arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(lease, "write_json", write_json)
        os.kill(os.getpid(), signal.SIGUSR1)
        write_json(*arguments, **options)

    monkeypatch.setattr(lease, "HEARTBEAT_S", 60.0)
    attempt = begin()
    before = signal.signal(signal.SIGUSR1, stop)
    monkeypatch.setattr(lease, "write_json", interrupted)
    try:
        with pytest.raises(SystemExit):
            attempt.note(from_step=40)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert records(folder)[0]["outcome"] == "interrupted"


def test_a_full_disk_ends_neither_the_heartbeat_nor_training(
    begin: Callable[..., Attempt], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    attempt = begin()
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_write_temporary", full)
        attempt.note(from_step=40)
        assert note_crash(folder, 1, rank=0, kind=Kind.OUT_OF_MEMORY, step=1, error="x") is False
        time.sleep(1.5 * lease.HEARTBEAT_S)
        attempt.check(now=True)
        with pytest.raises(RunDirError, match="No space left on device"):
            Attempt.begin(folder.parent / "others")
    assert "from_step" not in records(folder)[0]
    time.sleep(2 * lease.HEARTBEAT_S)
    assert records(folder)[0]["from_step"] == 40


def test_the_files_are_private_and_leftovers_of_the_dead_are_removed(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    crash(folder, 1, outcome="failed")
    for name in (".00000001.json.x", ".00000001-rank-3.json.y", ".00000002.json.contender"):
        (folder / name).touch()
    umask = os.umask(0)
    try:
        begin()
        note_crash(folder, 2, rank=1, kind=Kind.HUNG, step=None, error="x")
    finally:
        os.umask(umask)
    names = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert set(names) == {
        "00000001.json", "00000002.json", "00000002-rank-1.json", ".00000002.json.contender"
    }  # fmt: skip
    assert names["00000002.json"] == names["00000002-rank-1.json"] == 0o600


@pytest.mark.slow
@pytest.mark.parametrize("shift_s", [-3600.0, 3600.0])
def test_a_clock_that_is_an_hour_off_changes_nothing(
    begin: Callable[..., Attempt],
    hold: Callable[[], "subprocess.Popen[str]"],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    shift_s: float,
) -> None:
    monkeypatch.setattr(lease, "STALE_AFTER_S", 1.0)
    holder = hold()
    stamp_s = time.time() + shift_s  # the file server's clock is off, too
    os.utime(record_path(folder, 1), (stamp_s, stamp_s))
    _, told = seconds_to_refusal(begin)
    assert f"process {holder.pid}" in told
    holder.kill()
    holder.wait()
    move_elsewhere(folder)
    os.utime(record_path(folder, 1), (stamp_s, stamp_s))
    began_s = time.monotonic()
    attempt = begin()
    assert 1.0 <= time.monotonic() - began_s < 2.0
    attempt.check(now=True)
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + shift_s)  # a jump, while we hold it
    crash(folder, 3)
    time.sleep(2.5 * lease.HEARTBEAT_S)
    with pytest.raises(Superseded):
        attempt.check()
