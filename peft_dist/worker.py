"""How one data-plane process starts and ends: quiet libraries, one-line errors, an exit code.

Does no work of its own.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from peft_dist import dist
from peft_dist.errors import PeftDistError, RunDirError
from peft_dist.run_dir import RunDir


@dataclass
class Place:
    """Where the process writes, once that is known."""

    run_dir: RunDir | None = None


def run_worker(work: Callable[[dist.World, Place], None]) -> int:
    """Run the work of one process; return its exit code.

    A user's fault becomes one line on rank 0's standard error, and `failure.json` for the process
    that launched this one. With several processes this does not return: the interpreter's own
    teardown can abort while gloo's threads still run, or wait minutes for a lost peer.
    """
    os.umask(0o077)
    logging.basicConfig(format="peft-dist: %(levelname)s: %(message)s", level=logging.WARNING)
    _quieten_libraries()
    place, world = Place(), None
    try:
        world = dist.read_world()
        work(world, place)
        dist.stop()
        code = 0
    except PeftDistError as error:
        code = error.exit_code
        if world is None or world.is_main:
            print(f"peft-dist: error: {error}", file=sys.stderr)
        if place.run_dir is not None:
            with suppress(RunDirError):  # a full disk is often the very fault
                place.run_dir.record_failure(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if world is not None and world.size > 1:
        os._exit(code)
    return code


def _quieten_libraries() -> None:
    """Hide deprecations between versions this project supports, and library chatter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Unsupported layer type")
    for name in ("transformers", "bitsandbytes", "accelerate", "filelock", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
