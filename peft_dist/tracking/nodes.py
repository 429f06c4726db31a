"""Samples of the nodes besides rank 0's: each keeps its newest one in a file of the run directory.

Rank 0 alone writes the ledger, and reads these files for it. Clocks of two nodes are never
compared: they may disagree.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.common.sharing import folder_mode
from peft_dist.config.run_sections import Tracking
from peft_dist.ledger.events import LedgerEvent, SystemEvent
from peft_dist.run.directory import RunDir
from peft_dist.tracking.system import SystemSampler

log = logging.getLogger(__name__)

STALE_INTERVALS = 3
"""After so many intervals without a read the samples may be as old, and are not reported."""


class NodeFile:
    """The file of one node, which holds its newest sample alone."""

    def __init__(self, folder: Path, *, rank: int, attempt: int) -> None:
        """Name the file; nothing is written yet.

        Args:
            folder: The run's, for such files.
            rank: The first rank of the node.
            attempt: Which start of the run this is.
        """
        self._path, self._rank, self._attempt = folder / f"node-{rank}.json", rank, attempt

    def write(self, event: LedgerEvent) -> None:
        """Replace the sample.

        Raises:
            OSError: Where it cannot be written.
        """
        self._path.parent.mkdir(mode=folder_mode(), exist_ok=True)
        found = {
            "attempt": self._attempt,
            "time": time.time(),  # so that no two samples are the same text
            "event": {**event.fields(), "node": self._rank},
        }
        replace_file(self._path, json.dumps(found) + "\n", durable=False)

    def remove(self) -> None:
        """Remove the file, and its folder if it is empty; one that stays does no harm."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()


class OtherNodes:
    """The files of all nodes but rank 0's, as rank 0 reads them: each sample once."""

    def __init__(self, folder: Path, *, attempt: int, every_s: float) -> None:
        """Read from now on.

        Args:
            folder: The run's, for such files.
            attempt: Which start of the run this is; files of other attempts are ignored.
            every_s: Seconds between samples.
        """
        self._folder, self._attempt = folder, attempt
        self._stale_s = STALE_INTERVALS * every_s
        self._read_at_s = time.monotonic()
        self._seen: dict[Path, str] = {}
        self._warned = False

    def new(self) -> Iterator[SystemEvent]:
        """Yield the samples that were written since the last call."""
        now_s = time.monotonic()
        is_late, self._read_at_s = now_s - self._read_at_s > self._stale_s, now_s
        for path in sorted(self._folder.glob("node-*.json")):
            try:
                text = path.read_text(encoding="utf-8")
                if text == self._seen.get(path):
                    continue
                self._seen[path] = text
                found = json.loads(text)
                if found["attempt"] == self._attempt and not is_late:
                    yield SystemEvent.model_validate(found["event"])
            except FileNotFoundError:  # its node is done
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                if not self._warned:
                    log.warning("%s cannot be read: %s; training goes on", path, error)
                self._warned = True


def watch_machine(
    tracking: Tracking,
    run: RunDir,
    write: Callable[[LedgerEvent], None] | None,
    *,
    rank: int,
    local_rank: int,
    attempt: int,
    step: Callable[[], int],
    gpu_uuids: Sequence[str],
) -> SystemSampler | None:
    """Sample this process's node from now on, if the recipe wants it and no other process does.

    Args:
        tracking: The recipe's section.
        run: Which run.
        write: Appends to the ledger; of rank 0 alone.
        rank: Of this process among all.
        local_rank: Of this process among those of its node.
        attempt: Which start of the run this is.
        step: Returns the steps done so far.
        gpu_uuids: The GPUs to watch.
    """
    every_s, at_end = tracking.system_every_s, None
    others: Callable[[], Iterator[SystemEvent]] | None = None
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
