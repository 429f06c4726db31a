"""The ranks of a node are forks of one process that has imported the libraries."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.processes import wait_until

pytestmark = pytest.mark.distributed

# A launcher that takes the folder of this test for its own installation.
LAUNCHER = """
import os, sys, threading, time
if "WITH_A_THREAD" in os.environ:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
from pathlib import Path
from peft_dist.common import paths
root = Path(sys.argv[1])
paths.root = lambda: root
from torch.distributed.run import main
sys.argv = ["torchrun", *sys.argv[2:]]
main()
"""

LINES = "a \n line \udce9"

# What a rank sees of itself; then what its last argument says.
RANK = """
import json, os, signal, sys, threading, time
from pathlib import Path

def preload(*, talks):
    sys.imported_before = os.getpid()
    {preload}

if __name__ == "__main__":
    import torch
    name = lambda pid: Path(f"/proc/{{pid}}/comm").read_text().strip()
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    seen = dict(
        pid=os.getpid(), parent=os.getppid(), session=os.getsid(0), name=name("self"),
        parent_name=name(os.getppid()), imported_before=getattr(sys, "imported_before", None),
        argv=sys.argv, threads=torch.get_num_threads(), path=sys.path[0],
        ends=[str(signal.getsignal(one)) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)
        ], variable=os.environ.get("OF_THIS_TEST"), files=os.listdir("/proc/self/fd"),
    )
    rank = os.environ["RANK"]
    Path(sys.argv[1], f"{{rank}}.{{restart}}.json").write_text(json.dumps(seen))
    print("out of", rank)
    print("err of", rank, file=sys.stderr)
    exec(sys.argv[2])
"""


class Launch:
    """A launcher of two ranks, and what these have written of themselves."""

    def __init__(
        self, folder: Path, do: str, *more: str, preload: str = "pass", **extra: str
    ) -> None:
        self.folder = folder
        (folder / "launch").mkdir()
        script = folder / "launch" / "train.py"
        script.write_text(RANK.format(preload=preload), encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if name != "RANK"}
        self.process = subprocess.Popen(
            [
                sys.executable, "-c", LAUNCHER, str(folder), "--nproc-per-node", "2",
                "--rdzv-backend", "peft-dist", "--rdzv-endpoint", "127.0.0.1:0",
                "--monitor-interval", "0.1", *more, str(script), str(folder), do,
            ],
            env={**environment, **extra, "OMP_NUM_THREADS": "1", "OF_THIS_TEST": LINES},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip

    def end(self) -> tuple[int, str, str]:
        """Return exit code, output and errors, once it has ended."""
        out, errors = self.process.communicate(timeout=120)
        return self.process.returncode, out, errors

    def rank(self, rank: int, restart: int = 0) -> dict[str, Any]:
        """Return what a rank has seen of itself, once it has."""
        file = self.folder / f"{rank}.{restart}.json"

        def is_written() -> bool:
            with suppress(OSError, ValueError):
                return bool(json.loads(file.read_text(encoding="utf-8")))
            return False

        wait_until(is_written, f"rank {rank}")
        return dict(json.loads(file.read_text(encoding="utf-8")))


def is_there(pid: int) -> bool:
    """Whether a process runs."""
    with suppress(OSError):
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(")")[-1].split()[0] != "Z"
        )
    return False


@pytest.mark.parametrize("extra", [{}, {"WITH_A_THREAD": "1"}], ids=["forked", "started"])
def test_both_ranks_and_those_after_a_restart_are_forks_of_one_process(
    tmp_path: Path, extra: dict[str, str]
) -> None:
    """And are otherwise as torchrun starts them: session, environment, signals, output.

    That process is a fork of the launcher, but of one with threads or a CUDA build of torch.
    """
    do = "restart == '0' and rank == '1' and sys.exit(7)"
    logs = tmp_path / "logs"
    launch = Launch(
        tmp_path, do, "--max-restarts", "1", "--redirects", "0:3", "--log-dir", str(logs), **extra
    )
    code, out, errors = launch.end()

    assert code == 0, errors
    assert "imports for itself" not in errors
    ranks = [launch.rank(rank, restart) for restart in (0, 1) for rank in (0, 1)]
    assert len({rank["parent"] for rank in ranks}) == 1
    assert {rank["imported_before"] for rank in ranks} == {ranks[0]["parent"]}
    for number, rank in enumerate(ranks):
        assert rank["parent"] != launch.process.pid
        assert rank["parent_name"] == "rank server"
        assert rank["name"] == f"rank {number % 2}"
        assert rank["session"] == rank["pid"]
        assert rank["threads"] == 1
        assert rank["argv"] == [str(tmp_path / "launch/train.py"), str(tmp_path), do]
        assert rank["variable"] == LINES
        assert rank["ends"] == ["0", "<built-in function default_int_handler>", "0"]
        assert len(rank["files"]) <= 4  # three, and the one that lists them
    assert "exitcode: 7" in errors
    assert "out of 1" in out
    assert "out of 0" not in out  # it has a file of its own
    assert [file.read_text() for file in logs.rglob("0/stdout.log")] == ["out of 0\n"] * 2
    assert [file.read_text() for file in logs.rglob("0/stderr.log")] == ["err of 0\n"] * 2


@pytest.mark.parametrize(
    ("preload", "why"),
    [
        ("threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "1 threads"),
        ("raise ImportError('no such library')", "no such library"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ""),
    ],
)
def test_where_it_cannot_be_forked_from_each_rank_imports_for_itself(
    tmp_path: Path, preload: str, why: str
) -> None:
    """Each is a new interpreter then, as torchrun starts it."""
    launch = Launch(tmp_path, "pass", preload=preload)
    code, _, errors = launch.end()

    assert code == 0, errors
    assert why in errors
    assert [launch.rank(rank)["parent"] for rank in (0, 1)] == [launch.process.pid] * 2


def run(code: str, script: Path, *, threads: int) -> subprocess.CompletedProcess[str]:
    """Run a launcher that speaks to the server itself."""
    return subprocess.run(
        [sys.executable, "-c", code, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_rank_that_ends_at_once_is_seen_to_end(tmp_path: Path) -> None:
    """That it has begun and that it has ended can be heard in one breath.

    numpy, which torch imports, starts a thread per core where nothing forbids it.
    """
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "train.py"
    script.write_text("def preload(*, talks): pass\n", encoding="utf-8")
    code = """
import sys
from peft_dist.distributed.forked_ranks import RankServer
server = RankServer(sys.argv[1], talks=False)
args = [sys.executable, "-u", sys.argv[1]]
ranks = [server.start(args, {"RANK": str(rank)}, [None, None]) for rank in range(50)]
assert [rank.wait(20) for rank in ranks] == [0] * 50
assert len({rank.pid for rank in ranks}) == 50
"""
    done = run(code, script, threads=4)
    assert done.returncode == 0, done.stderr
    assert "each process imports for itself" not in done.stderr


def test_where_no_more_can_be_forked_the_ends_of_the_others_are_still_heard(
    tmp_path: Path,
) -> None:
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "train.py"
    script.write_text(
        "def preload(*, talks): pass\nif __name__ == '__main__':\n    import sys; sys.exit(5)\n",
        encoding="utf-8",
    )
    code = """
import os, sys
fork, left = os.fork, [2]  # the server, and one rank
def few():
    left[0] -= 1
    if left[0] < 0:
        raise BlockingIOError("no more processes")
    return fork()
os.fork = few
from peft_dist.distributed.forked_ranks import RankServer
server = RankServer(sys.argv[1], talks=False)
args = [sys.executable, "-u", sys.argv[1]]
first = server.start(args, {"RANK": "0"}, [None, None])
try:
    server.start(args, {"RANK": "1"}, [None, None])
except ConnectionError:
    assert not server.can_start(args)
    assert first.wait(20) == 5, first.poll()
else:
    sys.exit("forked all the same")
"""
    done = run(
        code, script, threads=1
    )  # a launcher with threads of its own has no fork for a server
    assert done.returncode == 0, done.stderr
    assert "no more processes" in done.stderr


def test_an_error_ends_a_rank_as_it_ends_an_interpreter(tmp_path: Path) -> None:
    """With its traceback and code 1; the other one is asked to stop."""
    launch = Launch(tmp_path, "rank == '0' and time.sleep(60) or int('x')")
    code, _, errors = launch.end()

    assert code == 1
    assert "invalid literal for int() with base 10: 'x'" in errors
    assert "exitcode: 1" in errors
    assert not is_there(launch.rank(0)["pid"])


@pytest.mark.parametrize("killed", ["server", "launcher"])
def test_a_killed_server_or_launcher_leaves_no_server(tmp_path: Path, killed: str) -> None:
    """The ranks of a killed server run on; torchrun sees that they end, and not how."""
    launch = Launch(tmp_path, "time.sleep(5) if rank == '0' else time.sleep(600)")
    ranks = [launch.rank(rank) for rank in (0, 1)]
    server = ranks[0]["parent"]
    os.kill(server if killed == "server" else launch.process.pid, signal.SIGKILL)
    if killed == "server":
        began_s = time.monotonic()
        code, _, errors = launch.end()
        assert time.monotonic() - began_s < 60
        assert code == 1
        assert "exitcode: -9" in errors
        assert not is_there(ranks[1]["pid"])
    wait_until(lambda: not is_there(server), "the end of the server", timeout_s=10)
    if killed == "launcher":
        for rank in ranks:
            assert is_there(rank["pid"])  # as without a server
            os.kill(rank["pid"], signal.SIGKILL)
        launch.end()


def test_a_rank_whose_number_an_ended_one_had_runs() -> None:
    from peft_dist.distributed.forked_ranks import ForkedRank, RankServer

    server = object.__new__(RankServer)  # without its process
    server.codes, server._started, server._rest = {}, [], b""
    server.is_gone = server.refuses = False
    server._channel, other = socket.socketpair()
    with server._channel, other:
        for answer in ({"pid": 77}, {"pid": 77, "code": 3}, {"pid": 77}):
            other.sendall(json.dumps(answer).encode() + b"\n")
        server.listen(1.0)
        assert ForkedRank(server, 77).poll() is None
        other.sendall(json.dumps({"pid": 77, "code": -9}).encode() + b"\n")
        assert ForkedRank(server, 77).wait(5.0) == -9
