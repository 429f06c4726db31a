"""The hang watch, on real processes: what it says of a hang, and that slow is not hung."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from peft_dist.worker.watchdog import describe_hang

PRELUDE = """
import os, sys, threading, time
from pathlib import Path
from peft_dist.common.process_table import call_this_process, rank_name
from peft_dist.worker.watchdog import HangWatchdog, WatchdogLimits
def watch(world_size=1, rank=0, min_s=0.4, setup_s=20.0, evaluation_s=20.0, save_s=20.0):
    limits = WatchdogLimits(min_s=min_s, setup_s=setup_s, evaluation_s=evaluation_s, save_s=save_s)
    folder = Path(sys.argv[1])
    call_this_process(rank_name(rank))
    return HangWatchdog(rank=rank, folder=folder, limits=limits, world_size=world_size,
                    on_hang=lambda line: (folder / f"note-{rank}").write_text(line))
def steps(dog, count, seconds):
    for step in range(count):
        dog.phase("step", step)
        time.sleep(seconds)
"""


def start(code: str, folder: Path, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(code: str, folder: Path) -> tuple[int, str, str]:
    process = start(code, folder)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def soon(condition: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_step_that_hangs_is_named_with_every_stack_and_ends_the_process(tmp_path: Path) -> None:
    code = """
dog = watch()
dog.attempt = 3
steps(dog, 12, 0.01)
def stuck_in_a_loader():
    threading.Event().wait()
threading.Thread(target=stuck_in_a_loader, daemon=True).start()
dog.phase("step", 57)
def stuck_in_a_step():
    time.sleep(60)
stuck_in_a_step()
"""
    returncode, _, errors = run(code, tmp_path)
    assert returncode == 1
    report = (tmp_path / "hang-a3-rank-0.txt").read_text(encoding="utf-8")
    first = report.splitlines()[0]
    found = re.fullmatch(
        r"rank 0 has been in step 57 \(phase step\) for (\d\.\d) s, limit 0\.4 s", first
    )
    assert found is not None
    assert 0.4 <= float(found[1]) < 3
    assert "stuck_in_a_step" in report
    assert "stuck_in_a_loader" in report
    assert errors == f"peft-dist: {first}\n"
    assert (tmp_path / "note-0").read_text(encoding="utf-8") == first


@pytest.mark.parametrize("name", ["setup", "evaluation", "save", "end"])
def test_every_phase_has_its_limit(tmp_path: Path, name: str) -> None:
    limit = "save_s" if name == "end" else f"{name}_s"
    code = f"dog = watch({limit}=0.5); dog.phase({name!r}); time.sleep(60)"
    returncode, _, errors = run(code, tmp_path)
    assert returncode == 1
    assert re.match(rf"peft-dist: rank 0 has been in phase {name} for .* limit 0\.5 s", errors)


def test_setup_is_watched_from_the_start_and_the_first_step_has_its_limit(tmp_path: Path) -> None:
    code = "dog = watch(setup_s=1.0); dog.phase('step', 8); time.sleep(60)"
    assert "in step 8 (phase step) for 1." in run(code, tmp_path)[2]
    assert "in phase setup for 1." in run("watch(setup_s=1.0); time.sleep(60)", tmp_path)[2]


@pytest.mark.slow
def test_slow_is_not_hung(tmp_path: Path) -> None:
    code = """
import random
dog = watch(min_s=0.5, setup_s=2.0)
random.seed(0)
dog.phase("setup")
time.sleep(1.0)
for step in range(40):
    dog.phase("step", step)
    if step == 0:
        time.sleep(1.0)  # over min_s: the first one
    slow = 0.02 + 0.18 * step / 39
    time.sleep(slow * random.uniform(0.7, 1.3))
    if step == 20:
        time.sleep(0.9 * dog._limit_s - slow * 1.3)
dog.phase("end")
dog.stop()
print(f"{dog._limit_of(dog._current)}")
"""
    returncode, output, errors = run(code, tmp_path)
    assert (returncode, output, errors) == (0, "20.0\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_steps_limit_follows_the_steps_before_it(tmp_path: Path) -> None:
    code = """
dog = watch(min_s=0.4)
steps(dog, 13, 0.2)
dog.phase("step", 13)
time.sleep(60)
"""
    _, _, errors = run(code, tmp_path)
    found = re.search(r"for (\d\.\d) s, limit (\d\.\d) s", errors)
    assert found is not None
    assert 1.0 <= float(found[2]) <= float(found[1]) < 3.0


@pytest.mark.parametrize(("left_s", "hangs"), [(1.0, True), (3600.0, False)])
def test_a_hang_ends_before_its_job_does(tmp_path: Path, left_s: float, hangs: bool) -> None:
    code = """
from peft_dist.worker import watchdog
watchdog.SHORTEST_S, watchdog.BEFORE_END_S = 0.3, 0.5
dog = watch(min_s=60.0)
steps(dog, 12, 0.01)
time.sleep(1.5)
"""
    (tmp_path / "job-end").write_text(f"{time.time() + left_s}", encoding="ascii")
    process = start(code, tmp_path, PEFT_DIST_LOGS=str(tmp_path), PEFT_DIST_JOB_END="9999999999")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if hangs else 0), errors
    assert ("has been in step 11 " in errors) is hangs


def test_a_batch_of_an_evaluation_pats_the_watch(tmp_path: Path) -> None:
    code = """
dog = watch(evaluation_s=0.5)
for _ in range(8):
    dog.phase("evaluation", 10)
    time.sleep(0.2)
"""
    assert run(code, tmp_path) == (0, "", "")


@pytest.mark.slow
def test_a_stopped_process_that_goes_on_is_not_hung(tmp_path: Path) -> None:
    code = """
dog = watch(min_s=0.5)
print("ready", flush=True)
for step in range(1000):
    dog.phase("step", step)
    time.sleep(0.02)
    if (Path(sys.argv[1]) / "enough").exists():
        break
dog.phase("step", step)
time.sleep(60)
"""
    process = start(code, tmp_path)
    assert line(process) == "ready"
    for _ in range(2):
        time.sleep(0.4)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        process.send_signal(signal.SIGCONT)
    time.sleep(0.4)
    assert process.poll() is None
    (tmp_path / "enough").touch()  # from here on it hangs, and its limit has not grown
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "limit 0.5 s" in errors


def ranks(folder: Path, codes: Mapping[int, str]) -> dict[int, subprocess.Popen[str]]:
    size = len(codes)
    return {
        rank: start(f"dog = watch({size}, {rank})\ndog.attempt = 2\n{code}", folder)
        for rank, code in codes.items()
    }


HANG = "steps(dog, 12, 0.01); dog.phase('step', {}); print('ready', flush=True); time.sleep(60)"


def test_the_rank_that_the_others_wait_for_is_named_once(tmp_path: Path) -> None:
    started = ranks(tmp_path, {0: HANG.format(57), 1: HANG.format(56), 2: HANG.format(57)})
    said = "".join(process.communicate(timeout=30)[1] for process in started.values())
    assert [process.returncode for process in started.values()] == [1, 1, 1]
    assert said.count("rank 1 is furthest behind: step 56 (phase step); stacks: ") == 1
    assert "no word" not in said
    assert len(list(tmp_path.glob("hang-a2-rank-*.txt"))) == 3


def test_a_rank_with_a_longer_limit_reports_when_the_others_do(tmp_path: Path) -> None:
    saves = HANG.replace("'step'", "'save'").format(56)
    started = ranks(tmp_path, {0: saves, 1: HANG.format(57)})
    said = started[0].communicate(timeout=30)[1] + started[1].communicate(timeout=30)[1]
    assert "rank 0 has been in step 56 (phase save) for " in said
    assert "rank 0 is furthest behind: step 56 (phase save)" in said


def test_a_stopped_rank_is_named_by_the_others_and_killed(tmp_path: Path) -> None:
    started = ranks(tmp_path, {0: HANG.format(57), 1: "print('ready', flush=True); time.sleep(60)"})
    assert line(started[1]) == "ready"
    started[1].send_signal(signal.SIGSTOP)
    said = started[0].communicate(timeout=30)[1]
    words = "no word from rank 1: it is stopped, gone or holds the interpreter; stacks: "
    assert words in said
    started[1].communicate(timeout=20)
    assert started[1].returncode == -signal.SIGKILL


def test_reports_of_an_earlier_start_mean_nothing(tmp_path: Path) -> None:
    (tmp_path / "hang-a0-rank-1.txt").write_text("rank 1 has been in step 3 (phase step)\n")
    code = "dog = watch(2); dog.phase('evaluation', 1); time.sleep(1.5); print('lives')"
    assert run(code, tmp_path) == (0, "lives\n", "")


def test_a_report_that_cannot_be_written_still_ends_the_process(tmp_path: Path) -> None:
    returncode, _, errors = run("watch(setup_s=0.3); time.sleep(60)", tmp_path / "absent")
    assert returncode == 1
    assert "rank 0 has been in phase setup" in errors
    assert "most recent call first" in errors


def test_a_pat_takes_microseconds(tmp_path: Path) -> None:
    code = """
dog = watch(setup_s=60.0)
best = min(
    (lambda t: [dog.phase("step", n) for n in range(1000)] and time.perf_counter() - t)(
        time.perf_counter()) for _ in range(20))
print(best / 1000 < 20e-6)
"""
    assert run(code, tmp_path)[1] == "True\n"


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (["step 4 (phase step)"] * 2, "all ranks are in step 4 (phase step)"),
        (
            ["step 5 (phase step)", "step 4 (phase evaluation)", "step 4 (phase save)"],
            "rank 1 is furthest behind: step 4 (phase evaluation)",
        ),
        (
            ["phase setup", "step 0 (phase step)", "phase setup"],
            "ranks 0, 2 are furthest behind: phase setup",
        ),
        (["phase end", "step 9 (phase step)"], "rank 1 is furthest behind: step 9 (phase step)"),
    ],
)
def test_the_rank_furthest_behind_is_found(positions: list[str], expected: str) -> None:
    lines = {
        rank: f"rank {rank} has been in {position} for 9.0 s"
        for rank, position in enumerate(positions)
    }
    assert describe_hang(lines, len(positions)) == expected


def test_in_one_step_the_rank_outside_the_collective_is_named() -> None:
    reports = {
        rank: f"rank {rank} has been in step 4 (phase step) for 6.0 s\n"
        "Thread 0x2 (most recent call first):\n"
        '  File "/x/peft_dist/watchdog.py", line 1 in _watch\n\n'
        f'Thread 0x1 (most recent call first):\n  File "{file}", line 7 in f\n'
        for rank, file in enumerate(["/x/torch/distributed/c10d.py", "/x/torch/nn/linear.py"])
    }
    said = describe_hang(reports, 2)
    assert said == "all ranks but rank 1, which is elsewhere, are in a collective"


def test_silent_ranks_are_named_before_anything_else() -> None:
    said = describe_hang({1: "rank 1 has been in step 4 (phase step) for 6.0 s"}, 3)
    assert said == "no word from ranks 0, 2: they are stopped, gone or hold the interpreter"
