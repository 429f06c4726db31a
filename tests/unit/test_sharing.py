"""A run that a group shares: all that is written in it, and nothing that is not the run's."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dist.common import env, sharing
from peft_dist.common.atomic import make_file, replace_file, whole_folder
from peft_dist.preflight.verdict import Report
from peft_dist.run import job_events
from peft_dist.run.lease import Attempt
from tests.unit.slurm_desk import Desk
from tests.unit.slurm_jobs import CPUS, Machines
from tests.unit.test_slurm_scripts import job_of


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let no test change what the others share, or their umask."""
    monkeypatch.setenv(env.SHARING, "private")
    monkeypatch.setenv(env.UMASK, "0022")
    umask = os.umask(0o022)
    yield
    os.umask(umask)


def modes(folder: Path) -> set[int]:
    """Return the permissions of all files below a folder, and those of folders, as of files."""
    entries = [folder, *folder.rglob("*")]
    return {stat.S_IMODE(p.stat().st_mode) & (0o666 if p.is_dir() else 0o777) for p in entries}


@pytest.mark.parametrize(("shared", "mode"), [("private", 0o600), ("group", 0o660)])
def test_a_submitted_run_is_shared_as_the_cluster_file_says(
    desk: Desk, shared: str, mode: int
) -> None:
    (desk.folder / "runs").mkdir()
    (desk.folder / "runs").chmod(0o2775)
    desk.secrets()
    secrets_file = str(desk.folder / "secrets")
    desk.cluster({"sharing": shared, "secrets_file": secrets_file})
    assert desk.submit() == 0
    assert modes(desk.run) == {mode}
    if shared == "group":  # what comes later has the same group
        assert all(p.stat().st_mode & stat.S_ISGID for p in desk.run.rglob("*") if p.is_dir())
    assert stat.S_IMODE((desk.folder / "secrets").stat().st_mode) == 0o600
    exported = "export PEFT_DIST_SHARING=group" in (desk.run / "node.sh").read_text()
    assert exported is (shared == "group")


@pytest.mark.parametrize(("bits", "mode"), [(0o700, 0o600), (0o2770, 0o660)])
def test_what_works_on_a_run_writes_as_its_folder_is_shared(
    tmp_path: Path, bits: int, mode: int
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    run.chmod(bits)
    sharing.share_like(run)
    sharing.set_run_umask()
    job_events.record(run, {"event": "started", "job": "7"})
    Attempt.begin(run / "attempts").end("done")
    replace_file(run / "a", "")
    make_file(run / "b", "")
    (run / "c").touch()
    with whole_folder(run / "d") as partial:
        (partial / "e").touch()
    Report(1).write(run)
    assert modes(run) == {mode}


def test_a_cache_of_other_programs_keeps_the_users_umask(tmp_path: Path) -> None:
    sharing.set_run_umask()
    with sharing.users_umask():
        (tmp_path / "cached").touch()
    (tmp_path / "own").touch()
    assert stat.S_IMODE((tmp_path / "cached").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o600


def test_the_set_up_of_a_job_has_its_users_umask(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, setup=f"umask >{tmp_path}/umask", **CPUS | {
        "python": str(machines.interpreter)})  # fmt: skip
    os.umask(0o027)
    assert machines.run(script).returncode == 0
    assert (tmp_path / "umask").read_text() == "0027\n"
    assert machines.variables()["PEFT_DIST_UMASK"] == "0027"
