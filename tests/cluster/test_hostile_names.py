"""Names that would run a command, wherever a user can put one, submitted to a real Slurm."""

import os
import random
import stat
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import PeftDistError
from peft_dist.config.cluster import load_cluster
from peft_dist.config.load import render_yaml
from peft_dist.run import job_events
from peft_dist.slurm.submit import Request, prepare, submit
from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Runs
from tests.faults.long import cases

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

HOSTILE = (
    "$(touch {c})", "`touch {c}`", "a; touch {c}", "a && touch {c}", "a | touch {c}",
    "a\ntouch {c}", "'; touch {c}; '", '"; touch {c}; "', "a' 'b", 'say "hi"', "a b  c",
    "${{IFS}}touch${{IFS}}{c}", "-o{c}", "--wrap=touch {c}", "%x%j", "%%", "~/x", "~root",
    "#SBATCH --wrap", "a\\", "\\$(touch {c})", "*", "?", "{{1..3}}", "!!", "\u00e9\u2028touch {c}",
    "x" * 200, "..", "../../evil", "a\tb", "a\x07b",
)  # fmt: skip
"""Texts with the place of a file that nobody may make."""

STAND_IN = """#!/bin/bash
# In the place of Python on the nodes: says that the run is done, and that it was called.
while [ $# -gt 0 ] && [ "$1" != --run-dir ]; do shift; done
[ $# -gt 1 ] || { echo /share; exit 0; }
echo called >"$2/called"
[ "$SLURM_NODEID" != 0 ] || echo done >"$PEFT_DIST_LOGS/decision"
"""


def test_no_name_runs_a_command(
    cluster: SlurmCluster, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    tried = random.Random(20)
    done, refused, folders = 0, 0, []
    while done < cases(50, 200):
        folder = tmp_path / "runs" / f"{done + refused:03d}"
        try:
            folders.append(submit_one(tried, folder, runs, str(canary)))
            done += 1
        except PeftDistError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1, str(error)
            assert refused < 20 * (done + 20), "nearly everything is refused"
        assert not canary.exists(), folder

    cluster.wait_until(
        lambda: not cluster.run(["squeue", "-h"]).stdout, f"{len(folders)} jobs", timeout_s=600
    )
    for path in folders:  # a container needs pyxis, which is not there: that job ends by itself
        ended = job_events.events(path)[-1]["decision"]
        assert ended == ("done" if (path / "called").exists() else "stop"), path
    assert sum((path / "called").exists() for path in folders) > 0.8 * len(folders)
    assert not canary.exists()
    evil = [path for path in tmp_path.rglob("*") if path.name.startswith("evil")]
    assert not [path for path in evil if not path.is_relative_to(tmp_path / "runs")]
    print(f"{done} submitted, {refused} refused in one line, no canary")


def submit_one(tried: random.Random, folder: Path, runs: Runs, canary: str) -> Path:
    """Submit one run with a few hostile values; return its folder."""

    def text() -> str:
        return tried.choice(HOSTILE).format(c=canary)

    python = folder / "bin" / tried.choice(["python", "py thon", "p'y\"$(x)"])
    python.parent.mkdir(parents=True)
    python.write_text(STAND_IN, encoding="utf-8")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    cluster: dict[str, Any] = {
        "partition": "main", "cpus_per_node": 1, "memory_per_node": "20M", "max_time": "00:05:00",
        "shared": [str(runs.folder), str(runs.project.folder)], "python": str(python),
        "preflight": {"enabled": False}, "environment": {"VALUE": "plain"},
    }  # fmt: skip
    fields = {
        "environment": lambda: {"VALUE": text()},
        "name of a variable": lambda: {"environment": {text(): "x"}},
        "partition": text,
        "account": text,
        "qos": text,
        "constraint": text,
        "reservation": text,
        "memory_per_node": text,
        "interface": text,
        "sbatch": lambda: {"mail-user": text()},
        "max_time": text,
        "gres": text,
        "secrets_file": lambda: "/" + text(),
        "stage": lambda: {"folder": "/tmp/" + text()},
        "container": lambda: {"runtime": "pyxis", "image": text(), "mounts": ["/" + text()]},
        "setup": lambda: "export NOTE=harmless\n",
    }
    # One that is checked by a pattern is nearly always refused: mostly the values that are quoted.
    for name in tried.sample(["environment", "environment", "setup", *fields], k=1):
        value = fields[name]()
        cluster |= value if name == "name of a variable" else {name: value}
    file = folder / "cluster.yaml"
    file.write_text(render_yaml(cluster), encoding="utf-8")
    name = "run" if tried.random() < 0.3 else text().replace("/", "\u2215")
    request = Request(
        recipe=str(runs.project.recipe),
        overrides=[f"data.max_length={tried.choice([64, 128])}"],
        folder=folder / name,
        cluster=load_cluster(file),
        nodes=1,
    )
    try:
        submission = prepare(request)
    except (OSError, ValueError) as error:  # a name that no file can have
        raise AssertionError(f"{name!r} ends in {error!r}") from error
    submit(submission, command=["peft-dist", "submit", name])
    assert os.fspath(submission.job.folder).startswith(os.fspath(folder.parent))
    return submission.runs[0].folder
