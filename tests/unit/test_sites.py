"""The cluster files of public sites: each loads, and renders what a person has looked at.

A golden file has only the lines in which a site's scripts differ from those of a plain cluster.
"""

import difflib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.config.cluster_sites import PLACEHOLDER, shipped_clusters, summary
from peft_dist.slurm.job_scripts import Job
from tests.unit.slurm_desk import Capture, Desk, told
from tests.unit.slurm_jobs import job, render

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden_sites"
GENERAL = {"apptainer", "example", "single-node"}
SITES = {name: file for name, file in shipped_clusters().items() if name not in GENERAL}
PYTHON = "/opt/venv/bin/python"
each_site = pytest.mark.parametrize("name", SITES)


def rendered(cluster: Cluster, folder: Path) -> list[str]:
    made: Job = job(cluster.model_dump(), nodes=2, folder=folder, strategy="fsdp")
    return [
        line for name, text in render(made).items() for line in [f"==> {name}", *text.split("\n")]
    ]


def differing(name: str) -> str:
    """Return the lines of a site's scripts that a plain cluster's do not have, and the reverse."""
    cluster = load_cluster(SITES[name])
    if cluster.container is None and cluster.python is None:
        cluster = cluster.model_copy(update={"python": PYTHON})
    folder = Path((*cluster.shared, "/scratch")[0]) / "runs" / "first"
    plain = Cluster(gpus_per_node=cluster.gpus_per_node, python=PYTHON)
    found = difflib.unified_diff(rendered(plain, folder), rendered(cluster, folder), n=0)
    kept = [line for line in found if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "".join(f"{line.rstrip()}\n" for line in kept)


@each_site
def test_a_sites_scripts_differ_from_plain_ones_as_a_person_has_seen(name: str) -> None:
    """PEFT_DIST_UPDATE_GOLDEN=1 writes them anew, for a person to look at."""
    text, file = differing(name), GOLDEN / f"{name}.diff"
    if os.environ.get("PEFT_DIST_UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_site() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(SITES)


@each_site
def test_bash_and_shellcheck_take_a_sites_scripts(name: str) -> None:
    cluster = load_cluster(SITES[name])
    folder = Path((*cluster.shared, "/scratch")[0]) / "runs" / "first"
    text = render(job(cluster.model_dump(), nodes=2, folder=folder))["node.sh"]
    commands = [["bash", "-n"]]
    if shutil.which("shellcheck"):
        # SC2155: a site's own set-up lines export what a command prints.
        commands.append(["shellcheck", "--shell=bash", "--exclude=SC2155", "-"])
    for command in commands:
        done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)
        assert done.stdout + done.stderr == ""


@each_site
def test_a_sites_file_says_what_it_is_from_and_that_it_was_not_tried(name: str) -> None:
    head, _, _ = SITES[name].read_text(encoding="utf-8").partition("\n" + first_key(name))
    assert re.search(
        r" read 20\d\d-\d\d-\d\d; not tried there by us\.", head.replace("\n# ", " ")
    ), head
    assert all(line.startswith("# ") and len(line) <= 106 for line in head.split("\n"))


def first_key(name: str) -> str:
    lines = SITES[name].read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if not line.startswith("#"))


def test_the_page_of_sites_has_a_row_for_every_file_and_no_other() -> None:
    page = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")
    assert re.findall(r"\| `([a-z0-9-]+)` \|$", page, re.MULTILINE) == sorted(SITES)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    made = Desk(tmp_path)
    monkeypatch.setenv("PATH", f"{made.slurm}:/usr/bin:/bin")
    return made


@each_site
def test_a_placeholder_for_an_account_is_refused_until_one_is_set(
    name: str, desk: Desk, capsys: Capture
) -> None:
    cluster = load_cluster(SITES[name])
    named = cluster.account is not None
    assert not named or PLACEHOLDER in str(cluster.account)
    submit = ["submit", str(desk.recipe), "--cluster", name, "--dry-run"]
    assert main(submit) == 2  # its folders are not this machine's
    line = told(capsys)
    assert ("account: " in line and "give --sbatch account=NAME" in line) == named, line
    if named:
        main([*submit, "--sbatch", "account=abc@h100"])
        assert "account" not in capsys.readouterr().err


def test_a_shipped_file_is_taken_by_its_name_and_a_wrong_name_gets_the_nearest(
    desk: Desk, capsys: Capture
) -> None:
    submit = ["submit", str(desk.recipe), "--dry-run", "--cluster"]
    assert main([*submit, "vsc-wice", "--sbatch", "account=lp_abc", "--run-dir", "x"]) in (0, 2)
    capsys.readouterr()
    assert main([*submit, "vsc-wise"]) == 2
    assert told(capsys) == (
        "vsc-wise: is neither a file nor a shipped cluster file; did you mean 'vsc-wice'?"
    )
    (desk.folder / "vsc-wice").write_text("partition: mine\n", encoding="utf-8")
    assert load_cluster("vsc-wice").partition == "mine"  # a file of one's own comes first


def test_shipped_files_are_listed_and_shown(capsys: Capture) -> None:
    assert main(["cluster", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted({*SITES, *GENERAL})
    assert summary(SITES["lumi-g"]) in "\n".join(lines)
    assert main(["cluster", "show", "lumi-g"]) == 0
    assert capsys.readouterr().out == SITES["lumi-g"].read_text(encoding="utf-8")
    assert main(["cluster", "show", "/etc/hostname"]) == 2
    assert "is neither a file nor a shipped cluster file" in told(capsys)
