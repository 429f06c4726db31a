"""Run a script as all ranks of a world, forks of one process that has imported everything.

    python -m tests.forked_world SIZES SCRIPT ARGUMENT ...

SIZES are worlds, one after the other: `1,2,4`. A rank has the environment that torchrun gives it,
and spends no seconds on imports. What the first rank that fails ends with is the exit code, and
the others are killed.
"""

import importlib
import os
import runpy
import signal
import sys
import traceback
from contextlib import suppress

from peft_dist.common.imports import without_collector
from tests.processes import free_port


def main() -> int:
    """Import, then run one world after the other; return the exit code."""
    sizes, script, *arguments = sys.argv[1:]
    with without_collector():
        runpy.run_path(script, run_name="preload")  # as rank servers do
        with suppress(ImportError):
            importlib.import_module("deepspeed")
    threads = os.listdir("/proc/self/task")  # noqa: PTH208 - no Path for numbers
    assert len(threads) == 1, f"an import has started {len(threads) - 1} threads; forks may hang"
    for size in map(int, sizes.split(",")):
        code = run_world(size, [script, *arguments])
        if code:
            return code
    return 0


def run_world(size: int, argv: list[str]) -> int:
    """Fork the ranks of one world, and wait for them; return 0, or what the first one failed with.

    Args:
        size: How many ranks.
        argv: The script, and its arguments.
    """
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    ranks = set()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            be_rank({**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, argv)
        ranks.add(pid)
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        failed = os.waitstatus_to_exitcode(status)
        if failed and not code:
            code = failed
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return code


def be_rank(environment: dict[str, str], argv: list[str]) -> None:
    """Run the script and end."""
    os.environ.update(environment)
    sys.argv = argv
    code: object = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    sys.exit(main())
