"""What is refused before anything is made, in one line, and what is only worth a word."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.run import job_events
from tests.unit.run_folders import lease
from tests.unit.slurm_desk import NOT_THERE, Capture, Desk, told
from tests.unit.slurm_jobs import json_lines

Change = Callable[[Desk], object]


def nothing(_desk: Desk) -> None:
    """Change nothing."""


REFUSED: dict[str, tuple[Change, list[str], str]] = {
    "too much time": (nothing, ["--time", "9:00:00"], "--time: 09:00:00 is more than the 08:00:00 "
                      "that a job may take; ask for less: the run goes on by itself"),
    "too little time": (nothing, ["--time", "0:04:00"], "--time: 00:04:00 leaves no time to train: "
                        "saving begins 00:02:00 before the end; ask for more than 00:04:00, or "
                        "lower signal_lead_s in the cluster file"),
    "no time": (nothing, ["--time", "90"], "--time: '90' is no time; write HH:MM:SS"),
    "too many nodes": (nothing, ["--nodes", "5"], "--nodes: 5 is more than the 4 that a job may "
                       "have; ask for fewer, or fix max_nodes"),
    "no nodes": (nothing, ["--nodes", "0"], "--nodes: got 0; must be at least 1"),
    "less than no nodes": (nothing, ["--nodes", "-2"], "--nodes: got -2; must be at least 1"),
    "too many GPUs": (nothing, ["parallel.processes=6", "--nodes", "2"], "parallel.processes: "
                      "6 processes for 4 GPUs on 2 nodes; set it to 4, or ask for more nodes"),
    "uneven processes": (nothing, ["parallel.processes=3", "--nodes", "2"], "parallel.processes: "
                         "3 processes cannot be shared out evenly over 2 nodes"),
    "uneven shards": (nothing, ["parallel.strategy=hsdp", "parallel.shard_size=3", "--nodes", "2"],
                      "parallel.shard_size: 3 does not divide 4 processes"),
    "too few rows": (nothing, ["train.global_batch_size=4", "--nodes", "4"],
                     "train.global_batch_size: 4 rows for 8 processes; set it to 8 or more, or "
                     "take fewer nodes"),
    "run not shared": (nothing, ["--run-dir", "/var/lib/mine"], "--run-dir: /var/lib/mine is in "
                       "none of "),
    "rows not shared": (nothing, ["data.train=/etc/hosts.jsonl"], "data.train"),
    "a disk of each node": (lambda desk: desk.cluster({"shared": []}),
                            ["--nodes", "2", "--run-dir", "/tmp/peft-dist-nowhere"],
                            "--run-dir: /tmp/peft-dist-nowhere is on a disk that each node has"),
    "open secrets": (lambda desk: desk.secrets(mode=0o644), [],
                     "can be read by others; chmod 600 it"),
    "no secrets": (lambda desk: desk.cluster({"secrets_file": "/none/x"}), [],
                   "secrets_file: /none/x: cannot be read: No such file or directory; make it"),
    "spoiled secrets": (lambda desk: desk.secrets("A=b\nx\n"), [], "line 2 is not NAME=value"),
    "set-up that is no shell": (lambda desk: desk.cluster({"setup": "if true\n"}), [],
                                "setup: line 2: syntax error: unexpected end of file; fix it"),
    "set-up with an open quote": (lambda desk: desk.cluster({"setup": "echo 'a\n"}), [],
                                  "setup: line 1: unexpected EOF while looking for matching"),
    "set-up without its end": (lambda desk: desk.cluster({"setup": "cat <<X\nfoo\n"}), [],
                               "setup: line 2: warning: here-document"),
    "an array of strategies": (nothing, ["--array", "parallel.strategy=ddp,fsdp"],
                               "--array: the runs of one array differ in parallel; submit them "
                               "one by one"),
    "an array of nothing": (nothing, ["--array", "train.sed=1,2"],
                            "train.sed: no such key; did you mean 'seed'?"),
    "a limit without array": (nothing, ["--limit", "2"], "--limit: is for arrays; give --array"),
    "a limit of none": (nothing, ["--array", "train.seed=1,2", "--limit", "0"],
                        "--limit: got 0; must be at least 1"),
    "a wrong setting": (nothing, ["train.sed=1"], "train.sed: no such key"),
    "a backslash": (nothing, ["--run-dir", "runs/a\\b"], "holds a backslash"),
    "a new line": (nothing, ["--run-dir", "runs/a\nb"], "holds a character that cannot be printed"),
    "a name too long": (nothing, ["--run-dir", "runs/" + "x" * 300],
                        "has a name of more than 200 bytes; choose another folder"),
    "a path too long": (nothing, ["--run-dir", "x" * 150 + ("/" + "x" * 150) * 40],
                        "has a path of more than 3800 bytes; choose another folder"),
    "a file": (nothing, ["--run-dir", "train.jsonl"], "train.jsonl: is a file; choose another"),
    "a folder in a file": (nothing, ["--run-dir", "train.jsonl/x"],
                           "train.jsonl is a file; choose another"),
    "a NUL": (nothing, ["--run-dir", "runs/a\0b"], "has a NUL character in its name; choose"),
    "what Slurm refuses": (lambda desk: desk.answer(sbatch="echo 'sbatch: error: Invalid account' "
                                                    ">&2; exit 1"), [], "sbatch: Invalid account"),
    "no Slurm": (lambda desk: (desk.slurm / "sbatch").unlink(), [],
                 "sbatch: no such command; run this where Slurm's commands are"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_in_one_line_and_nothing_is_made(
    name: str, desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, words, expected = REFUSED[name]
    if name == "no Slurm":
        monkeypatch.setenv("PATH", f"{desk.slurm}:{bare_path(desk)}")
    change(desk)
    assert desk.submit(*words) == 2
    assert expected in told(capsys)
    assert desk.made() == []
    assert [call for call in desk.calls() if call != ["--test-only"]] == []


def bare_path(desk: Desk) -> Path:
    """Return a folder with bash alone: this machine may have a Slurm of its own."""
    folder = desk.slurm / "bare"
    folder.mkdir()
    (folder / "bash").symlink_to("/bin/bash")
    return folder


def test_a_limit_of_the_cluster_file_is_named_as_such(desk: Desk, capsys: Capture) -> None:
    desk.cluster({"max_time": "0:03:00"})
    assert desk.submit() == 2
    assert told(capsys).startswith("max_time: 00:03:00 leaves no time to train")
    desk.cluster({"default_time": "0:02:00"})
    assert desk.submit() == 2
    assert told(capsys).startswith("default_time: 00:02:00 leaves no time to train")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_live_run_is_not_submitted_twice(desk: Desk, capsys: Capture, state: str) -> None:
    assert desk.submit() == 0
    before = job_events.jobs_file(desk.run).read_bytes()
    desk.job_is(state)
    capsys.readouterr()
    for again in (desk.submit, lambda: main(["resume", "runs/mine"])):
        assert again() == 2
        assert told(capsys) == (
            f"{desk.run}: job 4711 is {state}; wait for it, or `peft-dist cancel {desk.run}`"
        )
    assert job_events.jobs_file(desk.run).read_bytes() == before
    assert len(desk.calls()) == 2


def test_a_successor_that_waits_keeps_a_run_live(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    (desk.run / "slurm" / "successor").write_text("4712\n")
    job_events.record(desk.run, {"event": "ended", "job": "4711", "code": 75, "decision": "again"})
    gone = "4711|4711|COMPLETED|node1|N/A|None"
    desk.answer(squeue=f"echo '{gone}'; echo '4712|4712|PENDING||N/A|Dependency'")
    capsys.readouterr()
    assert desk.submit() == 2
    assert "job 4712 is PENDING" in told(capsys)


def test_nobody_can_tell_is_no_end(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    capsys.readouterr()
    down = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"
    for commands in ({"squeue": down}, {"squeue": "", "sacct": "", "scontrol": NOT_THERE}):
        desk.answer(**commands)
        assert desk.submit() == 2
        line = told(capsys)
        assert "cannot tell whether job 4711 is over: squeue" in line
        assert f"or `sbatch {desk.run}/job.sbatch` where it surely is" in line
    assert len(desk.calls()) == 2


@pytest.mark.parametrize(("decision", "code"), [("stop", 0), ("cancelled", 0), ("again", 2)])
def test_a_job_that_slurm_has_forgotten_is_over_where_it_said_so_itself(
    desk: Desk, decision: str, code: int
) -> None:
    assert desk.submit() == 0
    job_events.record(desk.run, {"event": "ended", "job": "4711", "code": 3, "decision": decision})
    desk.answer(squeue="", sacct="", scontrol=NOT_THERE)
    assert desk.submit() == code


def test_a_run_that_trains_without_slurm_is_not_submitted(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    job_events.jobs_file(desk.run).unlink()
    lease(desk.run, here=True)
    capsys.readouterr()
    assert desk.submit() == 2
    assert f"is in use by attempt 1, process {os.getpid()}" in told(capsys)


def test_rows_that_are_not_shared_out_evenly_are_worth_a_word(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("train.global_batch_size=9", "--nodes", "2") == 0
    assert capsys.readouterr().err == (
        "peft-dist: train.global_batch_size: 9 rows are not shared out evenly over 4 processes; "
        "some wait for others in every step\n"
    )


def test_a_run_on_one_nodes_own_disk_is_worth_a_word(desk: Desk, capsys: Capture) -> None:
    desk.cluster({"shared": []})
    if not str(desk.folder).startswith("/tmp/"):
        pytest.skip("pytest keeps its folders elsewhere")
    assert desk.submit() == 0
    assert capsys.readouterr().err == (
        "peft-dist: --run-dir, model.name, data.train: in /tmp, which the node of the job must "
        "share with this machine\n"
    )
    desk.cluster({"shared": [], "max_nodes": 1})
    assert desk.submit("--run-dir", "runs/two") == 0
    assert capsys.readouterr().err == ""


def test_a_folder_is_found_through_links(desk: Desk, tmp_path: Path) -> None:
    """Sites link /home/alice to /lustre/home/alice and the like."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    desk.cluster({"shared": [str(tmp_path / "link"), str(tmp_path / "model"),
                             str(tmp_path / "train.jsonl")]})  # fmt: skip
    assert desk.submit("--run-dir", "real/run") == 0
    assert desk.submit("--run-dir", "link/other") == 0
    assert json_lines(tmp_path / "real" / "other" / "slurm" / "jobs.jsonl")
