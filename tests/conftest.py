"""What all tests share: how they are divided among workers, and a world of one process."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

LONGEST_FIRST = ("cluster", "equivalence", "faults", "distributed", "unit", "gpu", "fakecuda")
LONG_FILES = ("test_wandb.py", "test_plan_formulas.py", "test_report_in_a_browser.py")
"""Files that take longer than others of their folder."""
TOGETHER = ("cluster", "equivalence")
"""Folders whose tests all stand on one thing that takes long to make."""
AFTER_CLUSTER = "tests/faults/test_places.py"
"""Mounts disks, which the nodes of a cluster that begins meanwhile would hold on to."""

# Under nohup, or in the background of a shell, they would be ignored, and so they would by every
# process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# Nothing of what is imported and collected first is garbage: half of that time went into looking.
gc.disable()
# Where tests run side by side, threads that wait for each other would take most of all cores: those
# of torch, and those of bitsandbytes, which has a library of its own for them.
_ONE_THREAD = "OMP_NUM_THREADS" not in os.environ
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left with it alone at the end.

    Tests that set up a model in this process take a second or more each: they count as slow.
    """
    for item in items:
        if "alone" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")
    items.sort(key=lambda item: (_place(item), item.path.name not in LONG_FILES))


def pytest_collection_finish() -> None:
    """Leave what is there by now alone for ever, and collect what tests make."""
    gc.freeze()
    gc.enable()
    if _ONE_THREAD:
        del os.environ["OMP_NUM_THREADS"]  # libraries have read it; processes are a test's affair


def pytest_sessionfinish() -> None:
    """Let hypothesis, which may be loaded at the end, find what it looks for among all objects."""
    gc.unfreeze()


def _place(item: pytest.Item) -> int:
    return LONGEST_FIRST.index(folder_of(item.nodeid))


class ByFile(LoadScopeScheduling):
    """Gives each worker whole files, or folders, so that what their tests share is made once."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(AFTER_CLUSTER):
            return "cluster"
        folder = folder_of(nodeid)
        return folder if folder in TOGETHER else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile:
    """Divide the tests among workers; `--dist loadgroup` cannot, since pytest 9.2."""
    return ByFile(config, log)


def folder_of(nodeid: str) -> str:
    """Return the folder below tests/ in which a test stands."""
    return nodeid.split("/")[1]


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
