"""A first cluster file from what Slurm says; some texts are those that Slurm 22.05 printed."""

from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import ClusterError, SlurmError
from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.slurm.probe import choose, describe, parse_config, parse_fields, parse_gres
from peft_dist.slurm.probe import parse_nodes as parse
from tests.unit.run_folders import slurm_commands

NODES = """\
main*|up|node1|4|4000|gpu:2|(null)
low|up|node1|4|4000|gpu:2|(null)
main*|up|node2|4|4000|gpu:2|(null)
low|up|node2|4|4000|gpu:2|(null)
"""
PARTITION = (
    "PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES "
    "QoS=N/A DefaultTime=00:10:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO "
    "MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED "
    "Nodes=node[1-4] OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP "
    "DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=16,mem=16000M,node=4,gres/gpu=8\n"
)
CONFIG = """\
Configuration data as of 2026-11-24T08:28:56
AccountingStorageEnforce = none
ClusterName             = fake
JobRequeue              = 1
MaxArraySize            = 1001
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
NODE = (
    "NodeName=node1 Arch=x86_64 CoresPerSocket=1  CPUAlloc=2 CPUEfctv=4 CPUTot=4 CPULoad=2.82 "
    "AvailableFeatures=(null) Gres=gpu:2 OS=Linux 6.1 #1 SMP  RealMemory=4000 AllocMem=3000 "
    "State=MIXED ThreadsPerCore=1 Partitions=main,low  CfgTRES=cpu=4,mem=4000M,gres/gpu=2 \n"
)
MIXED = """\
cpu|up|c1|64|256000|(null)|icelake
cpu|up|c2|64|256000|(null)|icelake
gpu|up|g1|128|1031000|gpu:a100:8(S:0-1)|icelake,nvlink
gpu|up|g2|128|1031000|gpu:a100:8(S:0-1)|icelake,nvlink
gpu|up|g3|40|380000|gpu:v100:4|skylake
old|down|o1|16|1|(null)|(null)
short|up|g1|128|1031000|gpu:a100:8(S:0-1)|icelake,nvlink
broken line
"""


def cluster_of(text: str, tmp_path: Path) -> Cluster:
    file = tmp_path / "probed.yaml"
    file.write_text(text, encoding="utf-8")
    return load_cluster(file)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the cluster that the texts are from."""
    for name, text in (("nodes", NODES), ("partition", PARTITION), ("config", CONFIG),
                       ("node", NODE)):  # fmt: skip
        (tmp_path / name).write_text(text)
    folder = slurm_commands(
        tmp_path / "bin",
        sinfo=f"cat {tmp_path}/nodes",
        scontrol=f'case $* in *" node "*) cat {tmp_path}/node ;; *partition*) '
        f"cat {tmp_path}/partition ;; *config) cat {tmp_path}/config ;; *) exit 1 ;; esac",
    )
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_a_real_clusters_default_partition_is_described(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "probe"]) == 0
    text = capsys.readouterr().out
    assert cluster_of(text, tmp_path) == Cluster.model_validate(
        {"partition": "main", "gpus_per_node": 2, "gres": "gpu:{gpus}", "cpus_per_gpu": 2,
         "memory_per_node": "4000M", "max_nodes": 2}
    )  # fmt: skip
    assert "on cluster fake, Slurm 22.05.8." in text
    assert "# Another partition is low: 2 nodes with 2 GPUs, 4 CPUs, 4000 MB\n" in text
    assert "# An array may have 1000 runs at most.\n" in text
    assert "no longest time, and gives 00:10:00 where none is asked for\n" in text


def test_a_partition_can_be_named_and_the_answer_kept_in_a_file(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my cluster.yaml"
    assert main(["cluster", "probe", "--partition", "low", "--out", str(out)]) == 0
    assert f"submit with --cluster '{out}'" in capsys.readouterr().out
    assert load_cluster(out).partition == "low"
    before = out.read_text()
    assert main(["cluster", "probe", "--out", str(out)]) == 2
    assert "is there already; name another file" in capsys.readouterr().err
    assert out.read_text() == before
    assert main(["cluster", "probe", "--out", str(tmp_path / "none" / "x")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_without_slurm_it_says_where_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["cluster", "probe"]) == 2
    told = capsys.readouterr().err
    assert told == (
        "peft-dist: error: sinfo: no such command; run this where Slurm's commands are\n"
    )


def described(name: str | None, nodes: str = MIXED, **texts: str) -> str:
    partitions = parse(nodes)
    chosen = choose(partitions, name)
    return describe(
        chosen,
        partition=parse_fields(texts.get("partition", "MaxTime=1-00:00:00 MaxNodes=UNLIMITED")),
        node=parse_fields(texts.get("node", "")),
        config=parse_config(texts.get("config", "JobRequeue = 1\n")),
        others=[other for other in partitions if other is not chosen],
    )


def test_of_several_kinds_of_nodes_the_one_with_most_gpus_is_described(tmp_path: Path) -> None:
    text = described("gpu")
    cluster = cluster_of(text, tmp_path)
    assert (cluster.gpus_per_node, cluster.gres, cluster.max_nodes) == (8, "gpu:a100:{gpus}", 2)
    assert (cluster.cpus_per_gpu, cluster.memory_per_node) == (16, "1031000M")
    assert cluster.max_time == "1-00:00:00"
    assert "1 node with 4 GPUs (v100), 40 CPUs, 380000 MB" in text
    assert "constraint: could name features: icelake, nvlink, skylake\n" in text
    assert "# Another partition is old: 1 node with 16 CPUs, 1 MB (down)\n" in text


def test_where_no_partition_is_the_default_the_one_with_most_gpus_is_taken(tmp_path: Path) -> None:
    assert cluster_of(described(None), tmp_path).partition == "gpu"


def test_a_partition_of_cpus_gets_no_gpus_and_all_cpus_of_a_node(tmp_path: Path) -> None:
    cluster = cluster_of(described("cpu"), tmp_path)
    assert (cluster.gpus_per_node, cluster.gres_request) == (0, None)
    assert (cluster.cpus_of_a_node, cluster.memory_per_node) == (64, "256000M")


VISTA = """\
gh|up|c1|72|217000|(null)|(null)
gg*|up|c2|144|237000|(null)|(null)
"""


@pytest.mark.parametrize("name", ["gh", None])
def test_where_slurm_knows_no_gpus_at_all_a_person_has_to_say(
    name: str | None, tmp_path: Path
) -> None:
    text = described(name, VISTA)
    with pytest.raises(ClusterError, match=r"gpus_per_node: got null; must be a whole number"):
        cluster_of(text, tmp_path)
    assert "# Slurm does not say whether nodes have GPUs: give their number" in text
    told = text.replace("gpus_per_node: null", "gpus_per_node: 1\ngres: null")
    assert cluster_of(told, tmp_path).gres_request is None


def test_a_partition_that_is_named_after_gpus_is_not_taken_for_one_of_cpus(tmp_path: Path) -> None:
    text = described("a100", MIXED + "a100|up|x1|72|217000|(null)|(null)\n")
    with pytest.raises(ClusterError, match="gpus_per_node: got null"):
        cluster_of(text, tmp_path)


def test_a_default_partition_of_cpus_is_not_what_one_trains_on() -> None:
    text = MIXED.replace("cpu|", "cpu*|")
    assert choose(parse(text), None).name == "gpu"
    assert choose(parse(text), "cpu").name == "cpu"


KINDS = """\
all*|up|g1|64|512000|gpu:4|a100,ib
all*|up|g2|64|512000|gpu:4|h100,ib
all*|up|g3|64|512000|gpu:4|h100,ib
cpu|up|c1|64|512000|(null)|rack12
"""


def test_the_kind_of_gpu_is_told_where_only_a_feature_names_it(tmp_path: Path) -> None:
    text = described(None, KINDS)
    cluster = cluster_of(text, tmp_path)
    assert (cluster.constraint, cluster.gres, cluster.max_nodes) == ("h100", "gpu:{gpus}", 2)
    assert "1 node with 4 GPUs (a100), 64 CPUs" in text
    assert "2 nodes with 4 GPUs (h100), 64 CPUs" in text
    alone = described(None, KINDS.replace("a100", "h100"))
    assert cluster_of(alone, tmp_path).constraint is None


def test_memory_that_slurm_was_never_told_of_is_not_asked_for(tmp_path: Path) -> None:
    text = described("old")
    assert cluster_of(text, tmp_path).memory_per_node is None
    assert "Slurm does not know what a node has" in text


def test_what_a_node_keeps_for_itself_and_the_partition_forbids_is_not_asked_for(
    tmp_path: Path,
) -> None:
    cluster = cluster_of(
        described("gpu", node="CPUEfctv=120 CPUTot=128 RealMemory=1031000 MemSpecLimit=31000"),
        tmp_path,
    )
    assert (cluster.cpus_per_gpu, cluster.memory_per_node) == (15, "1000000M")
    limits = "MaxTime=02:00:00 MaxNodes=1 MaxCPUsPerNode=64 MaxMemPerNode=500000"
    cluster = cluster_of(described("gpu", partition=limits), tmp_path)
    assert (cluster.cpus_per_gpu, cluster.memory_per_node) == (8, "500000M")
    assert (cluster.max_nodes, cluster.max_time) == (1, "02:00:00")


def test_whole_nodes_are_asked_for_where_nothing_else_is_given_out(tmp_path: Path) -> None:
    cluster = cluster_of(described("gpu", partition="OverSubscribe=EXCLUSIVE"), tmp_path)
    assert (cluster.exclusive, cluster.memory_per_node) == (True, "0")


def test_a_site_that_does_not_requeue_gets_a_chain_of_jobs(tmp_path: Path) -> None:
    text = described("gpu", config="JobRequeue              = 0\n")
    assert cluster_of(text, tmp_path).requeue.allowed is False
    assert "# JobRequeue is 0 here" in text


def test_who_may_use_a_partition_is_told(tmp_path: Path) -> None:
    text = described("gpu", partition="AllowGroups=ALL AllowAccounts=a,b AllowQos=ALL")
    assert "# Only for accounts a,b\n" in text
    assert "qos" not in text.lower().replace("account or qos", "")


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("(null)", (None, 0)),
        ("gpu:4", (None, 4)),
        ("gpu:4(S:0-1)", (None, 4)),
        ("gpu:a100:4(S:0-1)", ("a100", 4)),
        ("gpu:nvidia_h100_80gb_hbm3:8(S:0-1)", ("nvidia_h100_80gb_hbm3", 8)),
        ("tmpfs:1T,gpu:h100:2(S:0),gpu:l40:4", ("l40", 4)),
        ("gpu:1g.5gb:7,gpu:a100:2", ("a100", 2)),
        ("mps:400,shard:8", (None, 0)),
    ],
)
def test_gpus_are_counted_in_what_slurm_calls_gres(
    gres: str, found: tuple[str | None, int]
) -> None:
    assert parse_gres(gres) == found


def test_a_partition_that_is_not_there_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ClusterError, match="no partition 'gpus'; did you mean 'gpu'"):
        choose(parse(MIXED), "gpus")
    with pytest.raises(SlurmError, match="shows no nodes"):
        choose(parse(""), None)


def test_a_name_that_no_script_can_hold_is_refused(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nodes").write_text("a$(touch canary)*|up|node1|4|4000|(null)|(null)\n")
    assert main(["cluster", "probe"]) == 2
    assert "must be letters, digits and _ . , : @ / + = -" in capsys.readouterr().err
