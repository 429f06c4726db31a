"""Queue an array that is larger than Slurm takes at once: a part now, the others as these end.

The runs that wait for a place are files in the array's folder; whichever job of the array ends
takes them from there, one by one, and queues them.
"""

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_dist.common.console import show
from peft_dist.common.errors import SlurmError
from peft_dist.common.sharing import folder_mode
from peft_dist.run.directory import RunDir
from peft_dist.slurm.submitting import SubmissionUnknown

TOO_MANY = re.compile(r"MaxSubmit|submit limit", re.IGNORECASE)
"""What Slurm says of more jobs than one may have in the queue."""
FOLDER = "waves"


def queue_in_waves(
    queue: Callable[[Sequence[int]], str], wanted: Sequence[int], folder: Path, limit: int | None
) -> str:
    """Queue as many runs of an array as Slurm takes, and note the others; return the job's id.

    Args:
        queue: Queues some runs, by their index.
        wanted: All that are to run.
        folder: The array's.
        limit: Most that run at once.

    Raises:
        SlurmError: Where Slurm refuses for another reason, or takes none.
    """
    size = len(wanted)
    while True:
        _note(folder, wanted[size:])
        try:
            job = queue(wanted[:size])
        except SubmissionUnknown:
            raise
        except SlurmError as error:
            if size == 1 or not TOO_MANY.search(str(error)):
                shutil.rmtree(folder / FOLDER, ignore_errors=True)
                raise
            size = min(size // 2, limit or size)
            continue
        if size < len(wanted):
            show(
                f"peft-dist: Slurm takes {size} of {len(wanted)} runs now; their jobs queue the "
                f"others as they end (where nodes may not: `peft-dist resume {folder}`, then)",
                sys.stderr,
            )
        return job


def drop(run: Path) -> None:
    """See that no job queues a run that waits for a place in the queue."""
    if RunDir(run).array is not None and run.name.isdecimal():
        (run.parent / FOLDER / str(int(run.name))).unlink(missing_ok=True)


def _note(folder: Path, waiting: Sequence[int]) -> None:
    place = folder / FOLDER
    shutil.rmtree(place, ignore_errors=True)
    if waiting:
        place.mkdir(mode=folder_mode())
    for index in waiting:
        (place / str(index)).touch()
