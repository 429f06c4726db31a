"""What unit and distributed tests share: a world of one process, in this one."""

import os
import signal
from collections.abc import Iterator

import pytest

# Under nohup it would be ignored, and so it would by every process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def alone() -> Iterator[object]:
    """Start a process group of one and return its world; end what is left of it afterwards."""
    from peft_dist import dist

    umask = os.umask(0o077)
    os.umask(umask)
    world = dist.read_world()
    dist.start(world)
    yield world
    dist.stop()
    os.umask(umask)
