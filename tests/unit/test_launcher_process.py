"""Running a launcher: signals reach its workers, and nothing outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_dist.common.errors import LaunchError
from peft_dist.config import Recipe
from peft_dist.launch import launcher_process
from peft_dist.launch.command import worker_command
from peft_dist.launch.launcher_process import PASSED_ON, run_launcher
from peft_dist.launch.placement import Machine, plan_processes
from peft_dist.run.saving import is_saving
from tests.processes import environment

ROOT = Path(__file__).resolve().parents[2]

# A launcher that leaves its worker behind; like torchrun's, it lives in a session of its own.
DESERTER = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], start_new_session=True,
                          stdout=subprocess.PIPE)
worker.stdout.readline()
"""
# A launcher that waits for its workers and starts them again until one exits with 0.
WATCHER = """
import signal, subprocess, sys
from pathlib import Path
def note(number, _frame):
    Path(sys.argv[2], "launcher").open("a").write(signal.Signals(number).name + chr(10))
    sys.exit(9)
for number in (1, 2, 10, 12, 15):
    signal.signal(number, note)
while any([worker.wait() for worker in [
    subprocess.Popen([sys.executable, "-c", *sys.argv[1:], str(rank)], start_new_session=True)
    for rank in range(2)
]]):
    pass
"""
STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"
)
SLEEPER = "import time; print(flush=True); time.sleep(60)"
# A worker that takes its time to save, with a child of its own. Started again, it is in its setup
# for long.
SAVER = """
import os, subprocess, sys, time
from pathlib import Path
from peft_dist.worker.signals import install
requests = install()
requests.end_setup_by(lambda _name: None)
folder, rank = Path(sys.argv[1]), sys.argv[2]
if list(folder.glob(f"{rank}-started-*")):
    (folder / f"{rank}-restarted-{os.getpid()}").touch()
    time.sleep(60)
requests.begin_training()
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
(folder / f"{rank}-started-{os.getpid()}").touch()
while requests.requested is None:
    time.sleep(0.01)
time.sleep(1)
child.stdin.close()
saved = f"{requests.requested} {requests.count} {child.wait()}"
(folder / f"{rank}-saved-{os.getpid()}").write_text(saved)
sys.exit(75)
"""
# A worker that notes every signal and never ends by itself.
ENDLESS = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), sys.argv[2]
for number in (1, 2, 10, 12, 15):
    signal.signal(number, lambda number, _frame: (folder / f"{rank}-got-{number}").touch())
(folder / f"{rank}-started-{os.getpid()}").touch()
while True:
    time.sleep(60)
"""
RUN = """
import sys
from pathlib import Path
from peft_dist.launch.launcher_process import run_launcher
ended = run_launcher(sys.argv[2:], environment={"RANK": "5"}, error_log=Path(sys.argv[1]))
print(ended.code, ended.signal_name)
"""


def start(command: list[str], log: Path, **environ: str) -> subprocess.Popen[str]:
    """Start our side of a launch in a process that a test can signal."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(log), *command],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_for(folder: Path, pattern: str, count: int) -> list[Path]:
    deadline = time.monotonic() + 30
    while len(found := sorted(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{pattern}: {found}"
        time.sleep(0.02)
    return found


def pids(files: list[Path]) -> list[int]:
    return [int(file.name.rpartition("-")[2]) for file in files]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def has_ended(pid: int) -> bool:
    """A killed process loses its memory, and with it its environment, before it is a zombie."""
    deadline = time.monotonic() + 2
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_the_exit_code_comes_back_and_errors_go_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    code = "import sys; print('oh', file=sys.stderr); sys.exit(7)"
    ended = run_launcher([sys.executable, "-c", code], environment={}, error_log=log)
    assert (ended.code, ended.signal_name) == (7, None)
    assert log.read_text(encoding="utf-8") == "oh\n"


def test_the_environment_is_added_and_files_are_private(tmp_path: Path) -> None:
    code = "import os; assert os.environ['A'] == 'b c' and 'PATH' in os.environ; open('f', 'w')"
    ended = run_launcher(
        [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {code}"],
        environment={"A": "b c"},
        error_log=tmp_path / "log",
    )
    assert ended.code == 0
    assert (tmp_path / "f").stat().st_mode & 0o077 == 0


def test_a_command_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="/absent/python: cannot be started"):
        run_launcher(["/absent/python"], environment={}, error_log=tmp_path / "log")


@pytest.mark.parametrize("worker", [SLEEPER, STUBBORN])
def test_workers_of_a_launcher_that_died_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str
) -> None:
    monkeypatch.setattr(launcher_process, "SURVIVOR_GRACE_S", 1.0)
    note = f"import os; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    ended = run_launcher(
        [sys.executable, "-c", DESERTER, note + worker], environment={}, error_log=tmp_path / "log"
    )
    assert ended.code == 0
    assert has_ended(int((tmp_path / "pid").read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("number", PASSED_ON, ids=lambda number: number.name)
def test_a_signal_reaches_the_workers_once_and_they_take_their_time(
    tmp_path: Path, number: signal.Signals
) -> None:
    ours = start([sys.executable, "-c", WATCHER, SAVER, str(tmp_path)], tmp_path / "log")
    wait_for(tmp_path, "?-started-*", 2)
    os.kill(ours.pid, number)
    output, _ = ours.communicate(timeout=30)
    assert output.split() == [str(128 + number), number.name]
    saved = sorted(tmp_path.glob("?-saved-*"))
    # Both, once; neither their children nor a restart of them.
    assert [file.name[0] for file in saved] == ["0", "1"]
    assert {file.read_text(encoding="utf-8") for file in saved} == {f"{number.name} 1 0"}
    assert all(has_ended(pid) for pid in pids(sorted(tmp_path.glob("?-*started-*"))))
    # The launcher, which has RANK from us, is only asked to stop once they are gone.
    assert (tmp_path / "launcher").read_text(encoding="utf-8").split() == ["SIGTERM"]


def test_a_launcher_without_workers_is_asked_to_stop(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w'); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path / "started")]
    ours = start(command, tmp_path / "log")
    wait_for(tmp_path, "started", 1)
    os.kill(ours.pid, signal.SIGUSR1)
    assert ours.communicate(timeout=20)[0].split() == ["138", "SIGUSR1"]


def test_later_signals_kill_nothing_but_a_second_sigint_does(tmp_path: Path) -> None:
    ours = start([sys.executable, "-c", WATCHER, ENDLESS, str(tmp_path)], tmp_path / "log")
    started = pids(wait_for(tmp_path, "?-started-*", 2))
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(ours.pid, number)
        wait_for(tmp_path, f"?-got-{number}", 2)
    assert ours.poll() is None and all(alive(pid) for pid in started)
    os.kill(ours.pid, signal.SIGINT)
    assert ours.communicate(timeout=20)[0].split() == ["143", "SIGTERM"]
    assert all(has_ended(pid) for pid in started)


def test_under_nohup_sighup_is_ignored(tmp_path: Path) -> None:
    code = (
        "import os, signal as s, sys; s.signal(1, s.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    waits = "import sys, time; open(sys.argv[1], 'w'); time.sleep(1.5)"
    ours = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, "-c", RUN, str(tmp_path / "log"),
         sys.executable, "-c", waits, str(tmp_path / "started")],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    wait_for(tmp_path, "started", 1)
    os.kill(ours.pid, signal.SIGHUP)
    assert ours.communicate(timeout=20)[0].split() == ["0", "None"]


def accelerate(tmp_path: Path, code: str) -> list[str]:
    """Return our own command for two processes, with a script of the test's."""
    recipe = {"model": {"name": "m"}, "data": {"train": "d"}, "parallel": {"processes": 2}}
    placement = plan_processes(Recipe.model_validate(recipe), Machine(gpus=0, cores=2))
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "strategies").symlink_to(ROOT / "launch" / "strategies")
    (tmp_path / "launch" / "train.py").write_text(code, encoding="utf-8")
    return worker_command(placement, "train.py", [str(tmp_path)], root=tmp_path, max_restarts=3)


UNDER_TORCHRUN = SAVER.replace("sys.argv[2]", "os.environ['RANK']")


@pytest.mark.distributed
def test_workers_under_torchrun_save_and_a_restart_does_not_go_on(tmp_path: Path) -> None:
    command = accelerate(tmp_path, UNDER_TORCHRUN)
    ours = start(command, tmp_path / "log", ACCELERATE_USE_CPU="true")
    wait_for(tmp_path, "?-started-*", 2)
    os.kill(ours.pid, signal.SIGUSR2)
    assert ours.communicate(timeout=60)[0].split() == ["140", "SIGUSR2"]
    saved = sorted(tmp_path.glob("?-saved-*"))
    assert [file.name[0] for file in saved] == ["0", "1"]
    assert all(has_ended(pid) for pid in pids(sorted(tmp_path.glob("?-*started-*"))))


@pytest.mark.distributed
def test_workers_save_when_torchrun_is_killed(tmp_path: Path) -> None:
    command = accelerate(tmp_path, UNDER_TORCHRUN)
    ours = start(command, tmp_path / "log", ACCELERATE_USE_CPU="true")
    started = pids(wait_for(tmp_path, "?-started-*", 2))
    status = Path(f"/proc/{started[0]}/status").read_text(encoding="utf-8")
    os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
    assert ours.communicate(timeout=60)[0].split() == ["137", "None"]
    saved = sorted(tmp_path.glob("?-saved-*"))
    assert [file.read_text(encoding="utf-8") for file in saved] == ["SIGTERM 1 0"] * 2
    assert all(has_ended(pid) for pid in started)


SAVES = """
import os, signal, sys, time
from pathlib import Path
from peft_dist.run.saving import being_saved
folder = Path(sys.argv[1])
asked = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _frame: asked.append(number))
with being_saved():
    (folder / "saving").touch()
    while len(asked) < 2:
        time.sleep(0.01)
    time.sleep(0.5)  # the launcher looks more than once
    (folder / "saved").touch()
time.sleep(60)
"""
TELL = RUN.replace("error_log=Path(sys.argv[1])", "error_log=Path(sys.argv[1]), tell=print")


def test_a_save_under_way_is_waited_for_and_then_everything_is_killed(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    command = [sys.executable, "-c", code, SAVES, str(tmp_path)]
    ours = subprocess.Popen(
        [sys.executable, "-c", TELL + "print(ended.killed)", str(tmp_path / "log"), *command],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path, "saving", 1)
    for _ in range(2):
        os.kill(ours.pid, signal.SIGINT)
        time.sleep(0.5)  # signals that wait for their handler are one
    output, _ = ours.communicate(timeout=30)
    assert (tmp_path / "saved").exists()
    told, ended, killed = output.splitlines()
    assert told == "a save is under way; the run ends when it is written"
    assert (ended, killed) == ("130 SIGINT", "True")


def test_a_mark_of_a_process_that_has_ended_holds_nobody_up(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / f"saving-{ended.pid}-x").touch()
    assert not is_saving(tmp_path)
    (tmp_path / f"saving-{os.getpid()}-x").touch()
    assert is_saving(tmp_path)


def test_before_any_worker_the_launcher_itself_is_said_to_stop(tmp_path: Path) -> None:
    code = "import sys, time; open(sys.argv[1], 'w'); time.sleep(60)"
    ours = subprocess.Popen(
        [sys.executable, "-c", TELL, str(tmp_path / "log"),
         sys.executable, "-c", code, str(tmp_path / "started")],
        env=environment(tmp_path), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path, "started", 1)
    os.kill(ours.pid, signal.SIGINT)
    assert ours.communicate(timeout=20)[0].splitlines() == [
        "stopping; no process has begun to train", "130 SIGINT"
    ]  # fmt: skip
