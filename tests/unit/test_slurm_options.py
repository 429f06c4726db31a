"""Options of sbatch and srun that a cluster file hands on, and other clusters than Slurm's own."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import ClusterError
from peft_dist.config.cluster import Cluster, check_cluster, load_cluster
from peft_dist.config.load import render_yaml
from peft_dist.config.slurm_options import FIELDS, OF_SBATCH, OF_SRUN
from peft_dist.run import job_events
from peft_dist.slurm.job_scripts import render_job
from peft_dist.slurm.submitting import job_id, kept_variables, submitting_environment
from tests.unit.slurm_desk import Capture, Desk, told
from tests.unit.slurm_jobs import CPUS, GPUS, Machines, job, json_lines
from tests.unit.test_slurm_scripts import job_of

MORE = {"mail-type": "END,FAIL", "licenses": "scratch:1@db", "core-spec": 8, "contiguous": True,
        "hint": "nomultithread", "comment-like": 'a "b" $(touch canary) `c`'}  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    made = Desk(tmp_path)
    monkeypatch.setenv("PATH", f"{made.slurm}:/usr/bin:/bin")
    return made


def directives(cluster: dict[str, Any]) -> list[str]:
    lines = render_job(job(cluster)).splitlines()
    return [word for line in lines if line.startswith("#SBATCH ")
            for word in shlex.split(line.removeprefix("#SBATCH "))]  # fmt: skip


def test_options_of_sbatch_stand_behind_ours_as_they_were_meant() -> None:
    assert directives({**GPUS, "sbatch": MORE})[-6:] == [
        "--mail-type=END,FAIL", "--licenses=scratch:1@db", "--core-spec=8", "--contiguous",
        "--hint=nomultithread", '--comment-like=a "b" $(touch canary) `c`',
    ]  # fmt: skip


def test_options_of_srun_arrive_as_they_were_meant(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, srun={"cpu-bind": "cores", "exact": True, "x-note": "a 'b"})
    assert machines.run(script).returncode == 0
    words = machines.words("srun")
    assert words[words.index("--cpu-bind=cores") :][:3] == [
        "--cpu-bind=cores", "--exact", "--x-note=a 'b",
    ]  # fmt: skip


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ClusterError) as refused:
        check_cluster(values, where="x.yaml")
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize(
    ("command", "option"),
    [*(("sbatch", name) for name in sorted(OF_SBATCH)), *(("srun", n) for n in sorted(OF_SRUN))],
)
def test_what_the_scripts_rely_on_is_refused_and_each_abbreviation_of_it(
    command: str, option: str
) -> None:
    for length in range(2, len(option) + 1):
        line = refusal({command: {option[:length].rstrip("-"): "x"}})
        assert line.startswith(f"x.yaml: {command}: {option[:length].rstrip('-')} "), line
        assert "is set by peft-dist itself" in line


@pytest.mark.parametrize("option", FIELDS)
def test_what_has_a_key_of_its_own_is_written_there(option: str) -> None:
    line = refusal({"sbatch": {option: "x"}})
    assert line.endswith(f"{option} has a key of its own; write {FIELDS[option]}: instead")


@pytest.mark.parametrize(
    "options",
    [{"mail-user": "a\nb"}, {"mail-user": "a\\b"}, {"mail-user": ""}, {"hold": False}, {"-C": "x"},
     {"C": "x"}, {"Mail-Type": "x"}, {"a b": "x"}, {"mail-user": "x" * 20_000}, {"x": None},
     {"mail-user": ["a"]}, {"mail-user": 1.5}, {"bb": "http://me:pass@host"}, {"exclusive": True},
     {"exc": True}],
    ids=lambda options: ascii(options)[:40],
)  # fmt: skip
def test_what_is_no_option_or_no_value_is_refused_in_one_line(options: dict[str, Any]) -> None:
    refusal({"sbatch": options})


def test_an_option_of_the_command_line_adds_to_the_file_or_replaces_its_key(
    desk: Desk, capsys: Capture
) -> None:
    desk.cluster({"account": "old", "sbatch": {"licenses": "scratch", "mail-type": "FAIL"}})
    options = ["--sbatch", "mail-type=END", "--sbatch=account=abc@h100", "--sbatch", "contiguous"]
    assert desk.submit("--dry-run", *options) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --account=abc@h100\n" in script
    assert "#SBATCH --licenses=scratch\n#SBATCH --mail-type=END\n#SBATCH --contiguous\n" in script
    assert desk.submit("--sbatch", "nodes=3") == 2
    line = told(capsys)
    assert line.endswith("sbatch: nodes is set by peft-dist itself (nodes); remove it")
    assert desk.submit("--sbatch", "mail-type=a\nb") == 2
    told(capsys)


def test_what_is_written_out_for_the_next_submission_has_the_options(desk: Desk) -> None:
    assert desk.submit("--sbatch", "mail-type=END") == 0
    assert load_cluster(desk.run / "slurm" / "cluster.yaml").sbatch == {"mail-type": "END"}


def test_nodes_that_the_file_excludes_stay_so_when_another_one_fails(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, sbatch={"exclude": "bad[1-3],old"})
    (tmp_path / "run" / "slurm" / "excluded").write_text("node1 1\n", encoding="utf-8")
    assert machines.run(script, decision="again-without node1").returncode == 75
    calls = (machines.commands / "calls").read_text(encoding="utf-8")
    assert "--exclude=bad[1-3],old,node1" in calls.replace("\\", "").replace("'", "")


def test_the_names_that_sites_use_are_taken() -> None:
    values = {"account": "abc@h100", "qos": "acc/long", "partition": "a100:x", "constraint": "!x&y",
              "interface": "^lo,docker", "reservation": "r=1"}  # fmt: skip
    cluster = Cluster.model_validate({**CPUS, **values})
    assert cluster.account == "abc@h100"
    assert Cluster.model_validate({"account": "repo:user@ampere"}).account == "repo:user@ampere"
    lines = directives({**CPUS, **values})
    assert {"--account=abc@h100", "--qos=acc/long", "--constraint=!x&y"} <= set(lines)


def test_the_cluster_that_took_a_job_is_known_behind_its_id() -> None:
    assert job_id("Welcome\n47;wice\n") == "47@wice"
    assert job_id("47\n") == "47"


WICE = {"sbatch": {"clusters": "wice"}}


def test_another_cluster_is_asked_wherever_its_jobs_are(desk: Desk, capsys: Capture) -> None:
    desk.cluster(WICE)
    desk.answer(sbatch="case $* in *--parsable*) echo '4711;wice' ;; esac")
    assert desk.submit() == 0
    (event,) = [
        e for e in json_lines(desk.run / "slurm" / "jobs.jsonl") if e["event"] == "submitted"
    ]
    assert (event["job"], event["cluster"]) == ("4711", "wice")
    assert "job 4711@wice:" in capsys.readouterr().out
    assert "#SBATCH --clusters=wice" in (desk.run / "job.sbatch").read_text(encoding="utf-8")

    asked = "case $* in *--clusters=wice*) ;; *) exit 7 ;; esac\n"
    known = "4711|4711|PENDING||2026-11-24T08:28:56|Resources"
    desk.answer(squeue=f"{asked}echo CLUSTER: wice; echo '{known}'", scancel=asked)
    assert desk.submit() == 2
    assert "job 4711@wice is PENDING" in told(capsys)

    desk.answer(
        squeue=f"{asked}echo 'Invalid job id' >&2; exit 1", scontrol=f"{asked}exit 1",
        sacct=f"{asked}echo '4711|4711|COMPLETED|node1|2026-11-24T08:28:56'",
    )  # fmt: skip
    from peft_dist.slurm.job_state import job_states

    (state,) = job_states(["4711@wice"]).values()
    assert (state.job, state.state, state.source) == ("4711@wice", "COMPLETED", "sacct")


def test_no_variable_says_otherwise_than_an_option_of_the_file() -> None:
    """Sbatch believes a variable more than its script."""
    script = "#SBATCH --clusters=wice\n#SBATCH --hint=nomultithread\n"
    told = {
        "SLURM_CLUSTERS": "genius",
        "SBATCH_CLUSTERS": "genius",
        "SLURM_HINT": "compute_bound",
        "SBATCH_HINT": "compute_bound",
        "SLURM_CONF": "/etc/x",
        "SBATCH_ACCOUNT": "abc",
    }
    assert submitting_environment(script, told).keys() == {"SLURM_CONF", "SBATCH_ACCOUNT"}
    assert "SLURM_CLUSTERS" not in kept_variables(["clusters"])
    assert "SLURM_CLUSTERS" in kept_variables(["mail-type"])


def test_jobs_of_two_clusters_are_cancelled_at_each(desk: Desk) -> None:
    from peft_dist.slurm.cli_client import scancel

    desk.answer(scancel="")
    scancel(["1", "2@wice", "3@wice"], options=["--signal=USR1"])
    assert desk.calls("scancel") == [
        ["--signal=USR1", "1"], ["--clusters=wice", "--signal=USR1", "2", "3"],
    ]  # fmt: skip


def test_a_job_that_ended_on_another_cluster_frees_its_run(desk: Desk) -> None:
    desk.cluster(WICE)
    desk.answer(sbatch="case $* in *--parsable*) echo '4711;wice' ;; esac")
    assert desk.submit() == 0
    job_events.record(desk.run, {"event": "ended", "job": "4711", "decision": "stop"})
    desk.answer(squeue="echo 'Invalid job id' >&2; exit 1", sacct="", scontrol="exit 1")
    assert desk.submit() == 0


def test_a_submission_of_which_nobody_learned_is_looked_for_at_its_cluster(desk: Desk) -> None:
    desk.cluster(WICE)
    desk.answer(sbatch="case $* in *--parsable*) exit 1 ;; esac", squeue="exit 1")
    assert desk.submit() == 2
    (event,) = json_lines(desk.run / "slurm" / "jobs.jsonl")
    desk.answer(
        squeue="case $* in *--clusters=wice*--me*) echo 'CLUSTER: wice';"
        f" echo '12|{event['token']}' ;; *) echo '12|12|COMPLETED|n|x|y' ;; esac",
        sbatch="case $* in *--parsable*) echo '13;wice' ;; esac",
    )
    assert desk.submit() == 0
    events = json_lines(desk.run / "slurm" / "jobs.jsonl")
    submitted = [(e["job"], e["cluster"]) for e in events if e["event"] == "submitted"]
    assert submitted == [("12", "wice"), ("13", "wice")]


def test_what_a_command_says_of_its_cluster_is_no_job_that_waits(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path)
    (tmp_path / "run" / "slurm" / "successor").write_text("99\n", encoding="utf-8")
    squeue = machines.commands / "squeue"
    squeue.write_text("#!/bin/sh\necho 'CLUSTER: wice'\n", encoding="utf-8")
    assert machines.run(script, decision="again").returncode == 75
    assert (machines.seen / "requeued").exists()
    assert "scancel" not in (machines.commands / "calls").read_text(encoding="utf-8")


def test_a_mapping_of_options_is_plain_yaml(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(render_yaml({"sbatch": MORE, "srun": {"cpu-bind": "cores"}}), encoding="utf-8")
    assert load_cluster(file).sbatch == MORE
