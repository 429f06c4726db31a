"""How the machines besides rank 0's fare: each leaves its newest sample in a file of the run.

Rank 0 alone writes the ledger, and reads these files for it. No clock is compared with another's:
machines may disagree about the time.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.config.recipe import Tracking
from peft_dist.ledger.writer import Record
from peft_dist.run.directory import RunDir
from peft_dist.tracking.system import SystemSampler

log = logging.getLogger(__name__)

STALE_INTERVALS = 3
"""What nobody has looked at for so many intervals may be as old, and is not told any more."""


class NodeFile:
    """The file of one machine, which holds its newest sample alone."""

    def __init__(self, folder: Path, *, rank: int, attempt: int) -> None:
        """Name the file; nothing is made yet.

        Args:
            folder: The run's, for such files.
            rank: The first rank of the machine.
            attempt: Which start of the run this is.
        """
        self._path, self._rank, self._attempt = folder / f"node-{rank}.json", rank, attempt

    def write(self, record: Record) -> None:
        """Replace the sample.

        Raises:
            OSError: Where it cannot be written.
        """
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        found = {
            "attempt": self._attempt,
            "time": time.time(),  # no sample is the one before it, were all its figures the same
            "record": {**record, "node": self._rank},
        }
        replace_file(self._path, json.dumps(found) + "\n", durable=False)

    def remove(self) -> None:
        """Leave no file, and no folder without one; what cannot be removed does no harm."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()


class OtherNodes:
    """The files of all machines but rank 0's, as rank 0 reads them: each sample once."""

    def __init__(self, folder: Path, *, attempt: int, every_s: float) -> None:
        """Look from now on.

        Args:
            folder: The run's, for such files.
            attempt: Which start of the run this is; what others left is passed over.
            every_s: Seconds between samples.
        """
        self._folder, self._attempt = folder, attempt
        self._stale_s = STALE_INTERVALS * every_s
        self._looked_at_s = time.monotonic()
        self._seen: dict[Path, str] = {}
        self._warned = False

    def new(self) -> Iterator[Record]:
        """Yield the samples that were left since the last call."""
        now_s = time.monotonic()
        is_late, self._looked_at_s = now_s - self._looked_at_s > self._stale_s, now_s
        for path in sorted(self._folder.glob("node-*.json")):
            try:
                text = path.read_text(encoding="utf-8")
                if text == self._seen.get(path):
                    continue
                self._seen[path] = text
                found = json.loads(text)
                if found["attempt"] == self._attempt and not is_late:
                    yield found["record"]
            except FileNotFoundError:  # its machine is done
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                if not self._warned:
                    log.warning("%s cannot be read: %s; training goes on", path, error)
                self._warned = True


def watch_machine(
    tracking: Tracking,
    run: RunDir,
    write: Callable[[Record], None] | None,
    *,
    rank: int,
    local_rank: int,
    attempt: int,
    step: Callable[[], int],
    gpu_uuids: Sequence[str],
) -> SystemSampler | None:
    """Watch this process's machine from now on, where the recipe wants it and no other does.

    Args:
        tracking: What the recipe says of it.
        run: Which run.
        write: Takes a record into the ledger; of rank 0 alone.
        rank: Of this process among all.
        local_rank: Of this process among those of its machine.
        attempt: Which start of the run this is.
        step: Returns the steps done so far.
        gpu_uuids: The GPUs to watch.
    """
    every_s, at_end = tracking.system_every_s, None
    others: Callable[[], Iterator[Record]] | None = None
    if not every_s:
        return None
    if write is not None:
        if tracking.system_nodes:
            others = OtherNodes(run.system, attempt=attempt, every_s=every_s).new
    elif tracking.system_nodes and local_rank == 0:
        node = NodeFile(run.system, rank=rank, attempt=attempt)
        write, at_end = node.write, node.remove
    else:
        return None
    return SystemSampler(
        write,
        every_s=every_s,
        folder=run.path,
        step=step,
        gpu_uuids=gpu_uuids,
        others=others,
        at_end=at_end,
    )
