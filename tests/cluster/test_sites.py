"""The shipped cluster files of sites, before a real Slurm that has what each of them names."""

import json
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.config.cluster_sites import shipped_clusters
from peft_dist.config.load import read_mapping
from peft_dist.slurm.job_scripts import render_job
from tests.cluster.slurm import SlurmCluster
from tests.cluster.submitted import Run, Runs
from tests.faults.long import only_long
from tests.faults.project import Project
from tests.unit.slurm_jobs import job

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]

FILES = shipped_clusters()
SITES = sorted(FILES.keys() - {"apptainer", "example", "single-node"})
KINDS = ("a100", "h100", "l40s")
FEATURES = sorted(
    {
        word
        for name in SITES
        for word in re.findall(r"\w+", load_cluster(FILES[name]).constraint or "")
    }
)


@pytest.fixture(scope="module")
def site(able: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Return two nodes that have the hardware, partitions and classes of all sites at once."""
    named = {load_cluster(FILES[name]).partition for name in SITES} - {None, "main"}
    partitions = sorted(map(str, named))
    with SlurmCluster.start(
        tmp_path_factory.mktemp("site") / "cluster",
        nodes=2,
        cpus=288,
        memory_mb=2_000_000,
        gpus=8,
        gpu_kinds=KINDS,
        tmpfs_gb=400,
        hardware=f"TmpDisk=900000 Features={','.join(FEATURES)}",
        extra=(
            "Licenses=scratch:100",
            "AccountingStorageEnforce=qos",
            *(f"PartitionName={name} Nodes=node1,node2 MaxTime=INFINITE" for name in partitions),
        ),
    ) as made:
        name = made.run(["scontrol", "show", "config"]).stdout
        (cluster,) = re.findall(r"ClusterName\s+= (\S+)", name)
        classes = sorted({str(load_cluster(FILES[name]).qos or "normal") for name in SITES})
        manager = ["sacctmgr", "--immediate"]
        for qos in classes:
            made.run([*manager, "add", "qos", qos], check=False)
        for account in (
            "root",
            "my-account",
            "my-account@h100",
            "my-account_g",
            "abc@h100",
            "my-account@ampere",
        ):
            made.run([*manager, "add", "account", account, f"cluster={cluster}"], check=False)
            made.run(
                [*manager, "add", "user", "root", f"account={account}", f"cluster={cluster}",
                 f"qos={','.join(classes)}"], check=False,
            )  # fmt: skip
        yield made


def here(name: str, **more: Any) -> dict[str, Any]:
    """Return the values of a site's file; Slurm's cluster has a name of its own here."""
    values = read_mapping(FILES[name], remedy="")
    sbatch = {key: value for key, value in values.get("sbatch", {}).items() if key != "clusters"}
    return {**values, "sbatch": sbatch, **more}


def test_only(site: SlurmCluster, values: dict[str, Any], folder: Path) -> tuple[int, str]:
    script = folder / "job.sbatch"
    made = job(Cluster.model_validate(values).model_dump(), nodes=2, folder=folder)
    script.write_text(render_job(made), encoding="utf-8")
    done = site.run(["sbatch", "--test-only", str(script)], check=False)
    return done.returncode, done.stderr


test_only.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SITES)
def test_a_real_slurm_accepts_what_a_site_would_get(
    site: SlurmCluster, name: str, tmp_path: Path
) -> None:
    values = here(name)
    if "container" in values and values["container"]["runtime"] == "edf":
        values["container"] = {**values["container"], "mounts": []}  # the folder is elsewhere here
    code, told = test_only(site, values, tmp_path)
    assert code == 0, told
    assert "to start at" in told


def test_what_is_accepted_is_looked_at(site: SlurmCluster, tmp_path: Path) -> None:
    """Else the test above would say nothing."""
    for wrong in ({"partition": "none"}, {"constraint": "none"}, {"qos": "none"},
                  {"gres": "gpu:k80:{gpus}"}, {"sbatch": {"licenses": "none"}},
                  {"sbatch": {"no-such-option": 1}}, {"sbatch": {"tmp": "2T"}}):  # fmt: skip
        code, told = test_only(site, here("nersc-perlmutter", **wrong), tmp_path)
        assert code != 0, (wrong, told)


SINGULARITY = """#!/bin/bash
# In the place of singularity: notes how it is called, and runs the command here.
words="$*"
echo "${{words//$'\\n'/ }}" >>"{folder}/singularity.calls"
shift
while [ $# -gt 0 ]; do
  case $1 in --bind) shift 2 ;; --*) shift ;; *) break ;; esac
done
shift
exec "$@"
"""


@pytest.fixture
def runs(site: SlurmCluster, project: Project, tmp_path: Path) -> Iterator[Runs]:
    yield Runs(site, project, tmp_path)
    site.restore()


def trained(runs: Runs, name: str, nodes: int, **more: Any) -> Run:
    """Train the tiny model with a site's file, but for the GPUs, memory and folders of the site."""
    absent = ("gpu", "gpus_per_node", "cpus_per_gpu", "memory_per_node", "exclusive",
              "shared", "setup", "environment", "max_time")  # fmt: skip
    own = {key: value for key, value in here(name).items() if key not in absent}
    settings = {
        **own,
        "account": "abc@h100",
        "interface": "eth0",
        "preflight": {"min_free_gb": 0},
        **more,
    }
    run = runs.submit(name, "train.steps=6", "train.global_batch_size=4", nodes=nodes, **settings)
    run.wait_for_end()
    assert run.starts == 1
    return run


def told_of(runs: Runs, run: Run) -> str:
    return runs.cluster.run(["scontrol", "show", "job", run.job]).stdout


@only_long
def test_options_of_a_site_reach_slurm_and_the_model_trains(runs: Runs) -> None:
    run = trained(runs, "nersc-perlmutter", 1)
    told = told_of(runs, run)
    assert "Licenses=scratch" in told and "Features=gpu&hbm80g" in told and "QOS=regular" in told
    assert "--cpu-bind=cores" in (run.path / "job.sbatch").read_text(encoding="utf-8")


@only_long
def test_in_a_sites_image_the_model_trains(runs: Runs, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "singularity"
    command.parent.mkdir()
    command.write_text(SINGULARITY.format(folder=tmp_path), encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    container = here("lumi-g")["container"]
    run = trained(
        runs, "lumi-g", 2,
        setup=f"export PATH={command.parent}:$PATH",
        container={**container, "mounts": ["/"], "setup": "export FROM_INSIDE=1"},
        python=sys.executable,
    )  # fmt: skip
    calls = (tmp_path / "singularity.calls").read_text(encoding="utf-8").splitlines()
    assert all(call.startswith("run --bind /:/ --bind ") for call in calls)
    assert len(calls) == 4  # each of two nodes looks for launch/, and trains
    assert "--nv" not in calls[0] and container["image"] in calls[0]
    (of_main,) = run.path.rglob("node1.rank-0.*.log")
    assert "bound to CPUs" in of_main.read_text(encoding="utf-8")  # numa_binding


@only_long
def test_over_names_with_a_suffix_two_nodes_meet(runs: Runs) -> None:
    run = trained(runs, "jsc-juwels-booster", 2)
    report = json.loads((run.path / "slurm" / "preflight.json").read_text(encoding="utf-8"))
    assert report["nodes"] == 2 and report["all_reduce_s"] is not None
    script = (run.path / "job.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --threads-per-core=1" in script and "--cpu-bind=none" in script
