"""Real users beside each other: on one node's disk, and in a folder of their group."""

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from peft_dist.common import sharing
from peft_dist.common.atomic import replace_file
from peft_dist.common.env import SHARING
from peft_dist.run import job_events
from peft_dist.run.attempt_records import records
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import Attempt
from peft_dist.slurm.stage_model import main as stage_here

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")

ALICE, BOB, EVE, GROUP = 41_001, 41_002, 41_003, 42_001


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder that all users can reach, unlike those of pytest."""
    made = Path(tempfile.mkdtemp(prefix="users-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def as_user(user: int, groups: list[int], work: Callable[[], object]) -> bool:
    """Do something as another user would, in a process of its own; return whether it could."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups(groups)
            os.setgid(groups[0] if groups else user)
            os.setuid(user)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_two_users_of_a_node_each_have_a_copy_that_the_other_cannot_read(folder: Path) -> None:
    model, local = folder / "model", folder / "local" / "peft-dist"
    model.mkdir()
    model.chmod(0o755)  # whatever umask the tests before have left
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(bytes(1000))
    for file in model.iterdir():
        file.chmod(0o644)
    local.parent.mkdir()
    local.parent.chmod(0o1777)
    # Once as ourselves: what it imports late, others may not be able to read.
    assert stage_here([str(model), str(folder / "ours")]) == 0
    for user in (ALICE, BOB):
        assert as_user(user, [], lambda: stage_here([str(model), str(local)]))
    assert sorted(path.name for path in local.iterdir()) == [str(ALICE), str(BOB)]
    for user, other in ((ALICE, BOB), (BOB, ALICE)):
        (copy,) = (path for path in (local / str(user)).iterdir() if path.is_dir())
        assert copy.stat().st_uid == user
        assert (copy / "model.safetensors").stat().st_size == 1000
        assert not as_user(other, [], partial(os.listdir, copy))


def test_colleagues_go_on_with_a_run_and_strangers_do_not_see_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SHARING, sharing.GROUP)
    shared = folder / "runs"
    shared.mkdir()
    os.chown(shared, 0, GROUP)
    shared.chmod(0o2770)
    run = RunDir(shared / "first")

    def work() -> None:
        sharing.set_run_umask()
        run.path.mkdir(mode=sharing.folder_mode(), exist_ok=True)
        sharing.share_like(run.path)
        job_events.record(run.path, {"event": "started", "job": str(os.getuid())})
        Attempt.begin(run.attempts).end("done")
        replace_file(run.path / "newest", f"{os.getuid()}\n")

    rehearsal = RunDir(folder / "rehearsal")
    rehearsal.path.mkdir()
    Attempt.begin(rehearsal.attempts).end("done")
    for user in (ALICE, BOB):
        assert as_user(user, [GROUP], work)
    assert [event["job"] for event in job_events.events(run.path)] == [str(ALICE), str(BOB)]
    assert len(list(records(run.attempts))) == 2
    assert (run.path / "newest").read_text() == f"{BOB}\n"
    assert as_user(ALICE, [GROUP], lambda: (run.path / "newest").read_text())
    assert not as_user(EVE, [EVE], lambda: (run.path / "newest").read_text())
