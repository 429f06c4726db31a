"""What unit and distributed tests share: a world of one process, in this one."""

import os
import signal
from collections.abc import Iterator

import pytest

# Under nohup, or in the background of a shell, they would be ignored, and so they would by every
# process that a test starts.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


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
