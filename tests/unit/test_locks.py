"""The one lock: one holder, let go of by a kill, and no obstacle where a disk has no locks."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.common.locks import NO_LOCKS, lock_file
from tests.processes import environment

HOLD = """
import sys, time
from pathlib import Path
from peft_dist.common.locks import lock_file
with lock_file(Path(sys.argv[1])) as is_held:
    print(is_held, flush=True)
    time.sleep(60)
"""


def test_one_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, env=environment(tmp_path)
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        with lock_file(path, wait_s=0.2) as is_held:
            assert not is_held
        holder.send_signal(signal.SIGKILL)
    with lock_file(path, wait_s=5.0) as is_held:
        assert is_held
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_disk_without_locks_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with lock_file(tmp_path / "lock", wait_s=1.0) as is_held, lock_file(tmp_path / "lock"):
            assert is_held


def test_another_fault_of_the_disk_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), lock_file(tmp_path / "lock"):
        pytest.fail("it was held")
