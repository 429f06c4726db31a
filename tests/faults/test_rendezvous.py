"""Row 19: processes that cannot meet say where they tried to, and late ones are waited for."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults.conftest import Undisturbed
from tests.faults.harness import Group, Harness, Project, fault
from tests.faults.long import cases
from tests.faults.oracles import assert_same_run

pytestmark = pytest.mark.distributed

SHORT = ("train.steps=30", "evaluate.every_steps=null", "checkpoint.every_steps=10")
LIMITS_S = [3.0, 28.0][: cases(1, 2)]
"""Of the meeting; the last one is the program's own."""
SLACK_S = 10.0
"""For the start of the processes, on a busy machine."""


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """Return a socket that listens at a port and answers nobody."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def start(harness: Harness, project: Project, *faults: object, limit_s: float, **at: str) -> Group:
    planted = [*faults, *([] if limit_s == 28.0 else [fault("meeting_limit", seconds=limit_s)])]
    return harness.start(project, harness.run_dir(), overrides=SHORT, faults=planted, **at)


def assert_told(group: Group, rank: int, where: str, limit_s: float) -> None:
    """See that a rank has ended in time, with the user's code and one line that says where."""
    assert group.wait_for_end_of(rank, limit_s + SLACK_S + 5) == 2, group.told()
    ended = group.ended[rank]
    assert ended is not None
    assert ended[1] - group.started_s < limit_s + SLACK_S
    (line,) = [x for x in group.errors(rank).splitlines() if x.startswith("peft-dist: error:")]
    assert f"processes cannot meet at {where}: " in line
    assert "Traceback" not in group.errors(rank)


@pytest.mark.parametrize("limit_s", LIMITS_S)
def test_a_port_that_another_program_has_is_named(
    harness: Harness, project: Project, taken: socket.socket, limit_s: float
) -> None:
    port = taken.getsockname()[1]
    group = start(harness, project, limit_s=limit_s, MASTER_PORT=str(port))
    assert_told(group, 0, f"127.0.0.1:{port}", limit_s)
    assert "the port is taken" in group.errors(0)
    assert_told(group, 1, f"127.0.0.1:{port}", limit_s)


def test_a_port_that_is_let_go_of_in_time_is_used(
    harness: Harness, project: Project, undisturbed: Undisturbed
) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    released = threading.Timer(2.0, server.close)
    released.start()
    late = fault("late_rank", rank=1, seconds=3.0)  # else it has the other program's socket
    port = server.getsockname()[1]
    group = start(harness, project, late, limit_s=20.0, MASTER_PORT=str(port))
    assert group.wait() == [0, 0], group.told()
    released.join()
    assert_same_run(group.run_dir, undisturbed(2, "fsdp", *SHORT))


@pytest.mark.parametrize("limit_s", LIMITS_S)
@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_wrong_host_is_named(
    harness: Harness, project: Project, host: str, limit_s: float
) -> None:
    group = start(harness, project, limit_s=limit_s, MASTER_ADDR=host, MASTER_PORT="29511")
    assert_told(group, 0, f"{host}:29511", limit_s)
    assert "nobody answers there" in group.errors(0)
    assert_told(group, 1, f"{host}:29511", limit_s)


@pytest.mark.parametrize("limit_s", LIMITS_S)
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_never_comes_is_named(
    harness: Harness, project: Project, late: int, limit_s: float
) -> None:
    absent = fault("late_rank", rank=late, seconds=300.0)
    group = start(harness, project, absent, limit_s=limit_s, MASTER_PORT="29512")
    assert_told(group, 1 - late, "127.0.0.1:29512", limit_s)
    assert ("rank 1 has not come" if late else "nobody answers") in group.errors(1 - late)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_comes_late_but_in_time_is_waited_for(
    harness: Harness, project: Project, undisturbed: Undisturbed, late: int
) -> None:
    delay_s = 2.0 if cases(0, 1) == 0 else 20.0
    absent = fault("late_rank", rank=late, seconds=delay_s)
    group = start(harness, project, absent, limit_s=28.0)
    started_s = time.monotonic()
    assert group.wait() == [0, 0], group.told()
    assert time.monotonic() - started_s > delay_s
    assert_same_run(group.run_dir, undisturbed(2, "fsdp", *SHORT))
