"""The harness itself: its ranks train as torchrun's do, and it sees what tests rely on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.client import Nursery
from tests.faults.conftest import Undisturbed
from tests.faults.harness import Harness, fault
from tests.faults.long import cases, only_long
from tests.faults.oracles import (
    adapter_sha256,
    assert_every_row_once,
    assert_same_run,
    last_step,
    losses,
    records,
)
from tests.faults.project import Project
from tests.processes import ROOT, environment, run, torchrun, wait_until

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=30", "evaluate.every_steps=null", "checkpoint.every_steps=10")


@pytest.mark.parametrize(("world_size", "strategy"), [(2, "fsdp"), (4, "ddp")][: cases(1, 2)])
def test_forked_ranks_train_as_those_of_torchrun(
    project: Project, undisturbed: Undisturbed, tmp_path: Path, world_size: int, strategy: str
) -> None:
    launched = tmp_path / "run"
    done = run(
        [*torchrun(world_size), str(ROOT / "launch" / "train.py"), str(project.recipe),
         "--run-dir", str(launched), f"parallel.strategy={strategy}", *SHORT],
        environment=environment(project.cache, ACCELERATE_USE_CPU="true"),
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    forked = undisturbed(world_size, strategy, *SHORT)
    assert len(losses(forked)) == 30
    assert_same_run(forked, launched)


def test_the_first_step_comes_soon(harness: Harness, project: Project) -> None:
    run_dir = harness.run_dir()
    group = harness.start(project, run_dir, overrides=SHORT)
    group.wait_for_step(1)
    assert time.monotonic() - group.started_s < 10  # with ten ranks on two cores; alone about 1
    assert group.wait() == [0, 0]
    assert last_step(run_dir) == 30


def test_a_killed_rank_is_told_with_its_signal(harness: Harness, project: Project) -> None:
    group = harness.start(project, harness.run_dir())
    group.wait_for_step(3)
    before_s = time.monotonic()
    assert group.kill(1)
    assert group.wait_for_end_of(1) == -signal.SIGKILL
    ended = group.ended[1]
    assert ended is not None
    assert before_s <= ended[1] <= time.monotonic()
    assert not group.kill(1)
    group.kill_all()
    assert group.codes[1] == -signal.SIGKILL
    assert group.codes[0] is not None


@only_long
def test_a_group_that_ends_early_fails_the_wait_and_says_why(
    harness: Harness, project: Project
) -> None:
    group = harness.start(project, harness.run_dir(), overrides=["train.stepz=3"])
    with pytest.raises(AssertionError, match="train.stepz"):
        group.wait_for_step(1)
    assert set(group.wait()) == {2}


def test_a_process_left_behind_fails_the_test(nursery: Nursery, tmp_path: Path) -> None:
    harness = Harness(nursery, tmp_path)
    harness.grace_s = 0.1
    mark = os.environ | {"PEFT_DIST_TEST": str(tmp_path)}
    for where in ({"env": mark}, {"cwd": tmp_path}):
        left = subprocess.Popen(["sleep", "100"], **where)
        # The kernel shows an environment a moment after the program has started.
        told = Path(f"/proc/{left.pid}/environ")
        wait_until(lambda told=told: told.read_bytes() != b"", "an environment")
        with pytest.raises(AssertionError, match=f"processes left behind.*{left.pid}"):
            harness.close()
        assert left.wait(timeout=10) == -signal.SIGKILL
    harness.close()


def test_a_hidden_file_of_a_finished_run_fails_the_test(
    nursery: Nursery, project: Project, tmp_path: Path
) -> None:
    harness = Harness(nursery, tmp_path)
    group = harness.start(project, harness.run_dir(), overrides=SHORT)
    assert group.wait() == [0, 0]
    harness.close()
    (group.run_dir / "checkpoints" / ".step-00000010-half").mkdir()
    with pytest.raises(AssertionError, match="step-00000010-half"):
        harness.close()


@only_long
def test_the_nursery_takes_its_ranks_along(project: Project, tmp_path: Path) -> None:
    nursery = Nursery(tmp_path)
    harness = Harness(nursery, tmp_path)
    group = harness.start(project, harness.run_dir())
    group.wait_for_step(1)
    assert all(Path(f"/proc/{pid}").exists() for pid in group.pids)
    os.kill(nursery.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in group.pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises((RuntimeError, BrokenPipeError)):
        nursery.ask(do="ended", pids=[])


def is_alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


@only_long
def test_the_nursery_ends_with_whoever_started_it(project: Project, tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.faults.client import Nursery\n"
        "from tests.faults.harness import Harness\n"
        "from tests.faults.project import Project\n"
        "folder = Path(sys.argv[1])\n"
        "harness = Harness(Nursery(folder), folder)\n"
        "group = harness.start(Project(Path(sys.argv[2])), harness.run_dir())\n"
        "group.wait_for_step(1)\n"
        "print(harness.nursery.pid, *group.pids)\n"
        "sys.stdout.flush()\n"
        "os._exit(0)\n"
    )
    done = run(
        [sys.executable, "-c", script, str(tmp_path), str(project.folder)],
        environment=environment(tmp_path / "cache"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_fault_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError):
        fault("nan_att", step=1, rank=0)
    with pytest.raises(TypeError):
        fault("nan_at", stepp=1, rank=0)


def test_a_planted_signal_comes_before_its_step(harness: Harness, project: Project) -> None:
    planted = fault("signal_at", step=7, rank=1, number=signal.SIGKILL, to="group")
    group = harness.start(project, harness.run_dir(), faults=[planted])
    assert group.wait() == [-signal.SIGKILL] * 2
    assert group.step() in (5, 6)  # rank 0 may still be writing step 6


@pytest.mark.parametrize("where", ["setup", "step", "rows", "collective", "evaluation"])
def test_a_planted_hang_hangs(harness: Harness, project: Project, where: str) -> None:
    at = 5 if where != "evaluation" else 20
    planted = fault("hang_at", step=at, rank=1, where=where)
    overrides = ["evaluate.every_steps=20"]
    group = harness.start(project, harness.run_dir(), faults=[planted], overrides=overrides)
    done = {"setup": 0, "evaluation": 20}.get(where, 4)
    if done:
        group.wait_for_step(done)
    time.sleep(1.0 if done else 3.0)
    assert group.step() == done, group.told()
    assert group.codes == [None, None], group.told()


def test_a_slow_rank_slows_every_step(harness: Harness, project: Project) -> None:
    planted = fault("slow_rank", rank=1, seconds=0.3, from_step=11)
    group = harness.start(project, harness.run_dir(), faults=[planted])
    group.wait_for_step(13)
    group.kill_all()
    at = {record["step"]: record["time"] for record in records(group.run_dir, "step")}
    assert at[13] - at[11] > 0.5
    assert at[9] - at[3] < 6 * 0.3


def test_a_shifted_clock_is_the_one_the_program_sees(harness: Harness, project: Project) -> None:
    planted = fault("clock_shift", rank=0, seconds=-3600)
    group = harness.start(project, harness.run_dir(), faults=[planted], overrides=SHORT)
    assert group.wait() == [0, 0]
    assert all(time.time() - 7200 < r["time"] < time.time() - 3500 for r in records(group.run_dir))


def test_a_planted_nan_and_a_planted_oom_are_seen(harness: Harness, project: Project) -> None:
    stop = ["train.non_finite=stop", *SHORT]
    for what in ("loss", "gradient"):
        planted = fault("nan_at", step=5, rank=1, what=what)
        group = harness.start(project, harness.run_dir(what), faults=[planted], overrides=stop)
        assert 0 not in group.wait()
        assert "step 5" in group.errors(0)
        assert ("loss nan" in group.errors(0)) == (what == "loss")
    planted = fault("oom_at", step=5, rank=1)
    group = harness.start(project, harness.run_dir("oom"), faults=[planted], overrides=SHORT)
    assert group.wait_for_trouble() != 0
    assert group.step() == 4


def test_the_disk_is_cut_at_every_change_in_turn(harness: Harness, project: Project) -> None:
    book = harness.folder / "changes.jsonl"
    folder = harness.run_dir("whole")
    watched = fault("log_file_operations", under=folder / "checkpoints", into=book)
    group = harness.start(project, folder, faults=[watched], overrides=SHORT)
    assert group.wait() == [0, 0]
    changes = [json.loads(line) for line in book.read_text(encoding="utf-8").splitlines()]
    names = [name for name, _ in changes]
    assert {"open", "write", "fsync", "os.rename", "os.mkdir"} <= set(names)
    assert all(Path(path).is_relative_to(folder / "checkpoints") for _, path in changes)
    adapter = 1 + next(
        n for n, (name, path) in enumerate(changes)
        if name == "write" and Path(path).name.startswith(".tmp")
    )  # fmt: skip
    publish = 1 + changes.index(["os.rename", str(folder / "checkpoints" / "step-00000010")])
    whole = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    for n in (adapter, publish):
        cut = harness.run_dir(f"cut-{n}")
        planted = fault("kill_at_file_operation", n=n, under=cut / "checkpoints")
        group = harness.start(project, cut, faults=[planted], overrides=SHORT)
        assert group.wait() == [-signal.SIGKILL] * 2
        (half_made,) = (cut / "checkpoints").iterdir()
        assert half_made.name.startswith(".step-00000010-")
        left = {path.name: path.stat().st_size for path in half_made.rglob("*") if path.is_file()}
        if n == adapter:
            assert list(left.values()) == [whole // 2]
        else:
            assert "manifest.json" in left


def test_a_full_disk_is_full_for_every_way_to_write(harness: Harness, project: Project) -> None:
    folder = harness.run_dir()
    planted = fault("full_disk", under=folder / "checkpoints", after_bytes=3000, from_step=5)
    group = harness.start(project, folder, faults=[planted], overrides=SHORT)
    group.wait()
    assert "No space left on device" in "".join(group.errors(rank) for rank in (0, 1))
    sizes = [p.stat().st_size for p in (folder / "checkpoints").rglob("*") if p.is_file()]
    assert sum(sizes) <= 3000


def test_the_oracles_see_a_run_that_differs(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    expected = undisturbed(2, "fsdp", *SHORT)
    same = harness.run_dir("same")
    packed = fault("record_rows", folder=harness.folder / "packed")
    assert harness.start(project, same, overrides=SHORT, faults=[packed]).wait() == [0, 0]
    assert_same_run(same, expected)
    assert_every_row_once(same, project.cache, [harness.folder / "packed"])
    other = harness.run_dir("other")
    changed = [*SHORT, "train.learning_rate=4.9e-3"]
    assert harness.start(project, other, overrides=changed).wait() == [0, 0]
    assert adapter_sha256(other) != adapter_sha256(expected)
    with pytest.raises(AssertionError, match="step 1: "):
        assert_same_run(other, expected)
    (path,) = (harness.folder / "packed").glob("rank-1.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines, lines[-1]]), encoding="utf-8")
    with pytest.raises(AssertionError, match="step 30 took"):
        assert_every_row_once(same, project.cache, [harness.folder / "packed"])


def test_a_run_is_restarted_until_it_is_done(harness: Harness, project: Project) -> None:
    run_dir = harness.run_dir()
    planted = [
        [fault("crash_at", step=12, rank=1)],
        [fault("signal_at", step=23, rank=0, number=9)],
    ]
    ended = harness.run_to_end(project, run_dir, faults=planted, overrides=SHORT)
    assert (ended.code, ended.restarts) == (0, 2)
    assert [group.codes[1] for group in ended.groups][0] == 1
