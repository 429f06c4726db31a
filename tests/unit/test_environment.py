"""What a run was submitted with: noted, compared at each start, and copied where one asks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.run import job_events
from peft_dist.run.environment import (
    changes_since_submit,
    differences,
    read_environment,
    write_environment,
)
from peft_dist.slurm.snapshot import copy_trees, import_paths
from tests.processes import ROOT
from tests.unit.run_folders import make_run, submitted
from tests.unit.slurm_desk import Desk


def git(folder: Path, *words: str) -> None:
    own = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", "-C", str(folder), *own, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout that is installed in place."""
    folder = tmp_path / "mine"
    (folder / "src" / "mine").mkdir(parents=True)
    (folder / "src" / "mine" / "__init__.py").write_text("x = 1\n", encoding="utf-8")
    (folder / ".gitignore").write_text("*.log\n", encoding="utf-8")
    (folder / "a.log").write_text("ignored", encoding="utf-8")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    info = tmp_path / "site" / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    direct = {"url": folder.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(direct), encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_nothing_differs_where_nothing_has_changed(tmp_path: Path, checkout: Path) -> None:
    run = make_run(tmp_path / "run")
    write_environment(run, read_environment())
    assert changes_since_submit(run) == ""


def test_an_edit_a_commit_and_a_version_are_told_in_one_line(
    tmp_path: Path, checkout: Path
) -> None:
    run = make_run(tmp_path / "run")
    write_environment(run, read_environment())
    (checkout / "src" / "mine" / "__init__.py").write_text("x = 2\n", encoding="utf-8")
    begins = "the environment is not that of the submission: "
    assert changes_since_submit(run) == f"{begins}mine has been edited in {checkout}"
    write_environment(run, read_environment())
    assert "+x = 2" in (run / "environment.mine.diff").read_text(encoding="utf-8")
    git(checkout, "commit", "-am", "second")
    metadata = tmp_path / "site" / "mine-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.1\n", encoding="utf-8")
    line = changes_since_submit(run)
    assert line.startswith(f"{begins}mine 1.0 is now 1.1, mine ")
    assert "\n" not in line


def test_many_changes_are_one_line() -> None:
    before = {"python": "3.11.1", "packages": {f"p{n}": "1" for n in range(9)}, "checkouts": {}}
    now = {"python": "3.12.0", "packages": {"p0": "1", "q": "2"}, "checkouts": {}}
    told = differences(before, now)
    assert told[:2] == ["python 3.11.1 is now 3.12.0", "p1 1 is now missing"]
    assert told[-1] == "q missing is now 2"


def test_a_start_writes_down_what_the_login_node_could_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert changes_since_submit(run) == ""
    assert json.loads((run / "environment.json").read_text())["packages"]["torch"]
    (run / "environment.json").write_text("[]", encoding="utf-8")
    assert "environment.json cannot be read" in changes_since_submit(run)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_start_in_another_environment_says_so_or_is_refused(tmp_path: Path, frozen: bool) -> None:
    run = make_run(tmp_path / "run")
    submitted(run, "7")
    environment = {"python": "2.7.0", "packages": {}, "checkouts": {}}
    write_environment(run, environment)
    logs = run / "logs" / "7-0"
    logs.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "peft_dist.slurm.supervisor", "--run-dir", str(run),
         "--max-starts", "1", "--max-starts-without-progress", "5", "--no-preflight",
         *(["--frozen"] if frozen else []), "--", "false"],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "PEFT_DIST_HOSTS": "node1", "PEFT_DIST_PORT": "20120", "PEFT_DIST_LOGS": str(logs),
            "PEFT_DIST_NONCE": "ab",
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    line = "the environment is not that of the submission: python 2.7.0 is now "
    decision = (logs / "decision").read_text(encoding="utf-8")
    assert decision.startswith(f"stop {line}") == frozen
    assert (f"peft-dist: warning: {line}" in done.stderr) != frozen


def test_submit_notes_the_environment_and_keeps_that_it_is_frozen(desk: Desk) -> None:
    assert desk.submit("--frozen") == 0
    assert "--frozen" in (desk.run / "node.sh").read_text()
    assert json.loads((desk.run / "environment.json").read_text())["packages"]["torch"]
    desk.job_is("TIMEOUT")
    (desk.run / "environment.json").write_text("{}")
    assert main(["resume", "runs/mine"]) == 0
    assert "--frozen" in (desk.run / "node.sh").read_text()
    assert json.loads((desk.run / "environment.json").read_text())["packages"]["torch"]
    assert [event["frozen"] for event in job_events.events(desk.run)] == [True, True]


def test_a_snapshot_is_what_git_tracks_and_does_not_ignore(tmp_path: Path, checkout: Path) -> None:
    (checkout / "new.py").touch()
    copy_trees({"mine": checkout}, tmp_path / "run")
    copied = tmp_path / "run" / "snapshot" / "mine"
    assert (copied / "src" / "mine" / "__init__.py").read_text() == "x = 1\n"
    assert sorted(path.name for path in copied.iterdir()) == [".gitignore", "new.py", "src"]
    assert import_paths(tmp_path / "run") == (f"{copied}/src", str(copied))


def test_a_job_runs_the_copies_also_once_more(desk: Desk) -> None:
    assert desk.submit("--snapshot") == 0
    copy = desk.run / "snapshot" / "peft-dist"
    assert (copy / "peft_dist" / "__init__.py").is_file()
    path = f"export PYTHONPATH={copy}${{PYTHONPATH:+:$PYTHONPATH}}\n"
    assert path in (desk.run / "node.sh").read_text()
    assert json.loads((desk.run / "environment.json").read_text())["checkouts"] == {}
    desk.job_is("TIMEOUT")
    assert main(["resume", "runs/mine"]) == 0
    assert path in (desk.run / "node.sh").read_text()
