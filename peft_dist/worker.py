"""How one data-plane process starts and ends: quiet libraries, one-line errors, an exit code.

Does no work of its own.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch

from peft_dist import dist
from peft_dist.errors import (
    ERROR_PREFIX,
    EXIT_FAILED,
    PeftDistError,
    RunDirError,
    TrainingError,
)
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
        code = _report(error, world, place)
    except torch.OutOfMemoryError as error:
        code = _report(_out_of_memory(error), world, place)
    except BaseException as error:
        # Whatever it is, the interpreter's own way out is not to be trusted (see above).
        code = 130 if isinstance(error, KeyboardInterrupt) else EXIT_FAILED
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if world is not None and world.size > 1:
        os._exit(code)
    return code


def _report(error: PeftDistError, world: dist.World | None, place: Place) -> int:
    """Say a user's fault in one line: on rank 0, and where rank 0 may not share it."""
    if world is None or world.is_main:
        print(f"{ERROR_PREFIX}{error}", file=sys.stderr)
    elif place.run_dir is None:
        print(f"{ERROR_PREFIX}rank {world.rank}: {error}", file=sys.stderr)
    if place.run_dir is not None:
        with suppress(RunDirError):  # a full disk is often the very fault
            place.run_dir.record_failure(error)
    return error.exit_code


def _out_of_memory(error: torch.OutOfMemoryError) -> TrainingError:
    return TrainingError(
        f"out of GPU memory ({str(error).split('. ')[0]})",
        where="train.micro_batch_size",
        remedy="lower it, or set train.activation_checkpointing: true",
    )


def _quieten_libraries() -> None:
    """Hide deprecations between versions this project supports, and library chatter."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Unsupported layer type")
    for name in ("transformers", "bitsandbytes", "accelerate", "filelock", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
