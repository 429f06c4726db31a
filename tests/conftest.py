"""What all tests share: how they are divided among workers, and a world of one process."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

LONGEST_FIRST = ("cluster", "trained", "faults", "distributed", "unit")
"""Order of the folders, and of the tests that read trainings made once for all of them."""

PLACE = pytest.StashKey[int]()

# Under nohup, or in the background of a shell, they would be ignored, and so they would by every
# process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each worker whole files, so that what a file's tests share is made once.

    All tests of Slurm share one cluster, and all that read the trainings of
    `tests/distributed/cases.py` share those. What takes longest begins first.
    """
    for item in items:
        folder, group = item.path.parent.name, str(item.path.relative_to(Path(__file__).parent))
        if folder == "cluster":
            group = "cluster"
        elif "trained" in getattr(item, "fixturenames", ()):
            folder = group = "trained"
        item.add_marker(pytest.mark.xdist_group(group))
        item.stash[PLACE] = LONGEST_FIRST.index(folder) if folder in LONGEST_FIRST else 9
    items.sort(key=lambda item: item.stash[PLACE])


@pytest.fixture
def alone() -> Iterator[object]:
    """Start a process group of one and return its world; end what is left of it afterwards."""
    from peft_dist.distributed import process_group
    from peft_dist.distributed.world import read_world

    umask = os.umask(0o077)
    os.umask(umask)
    world = read_world()
    process_group.start(world)
    yield world
    process_group.stop()
    os.umask(umask)
