"""Submitting: what is refused before anything is made, and what is made and remembered."""

import json
import os
import shlex
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli import main
from peft_dist.config.cluster import load_cluster
from peft_dist.config.load import render_yaml
from peft_dist.run_dir import RunDir
from peft_dist.slurm import jobs
from tests.unit.run_folders import lease, ledger, result, slurm_commands
from tests.unit.slurm_jobs import json_lines

GPUS = {"gpus_per_node": 2, "cpus_per_gpu": 4, "max_nodes": 4, "max_time": "08:00:00"}
NOT_THERE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


class Desk:
    """A login node: a recipe, a cluster file, and a Slurm that takes whatever it is given."""

    def __init__(self, folder: Path) -> None:
        """Write the recipe and the cluster file."""
        self.folder = folder
        (folder / "model").mkdir()
        (folder / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
        self.recipe = folder / "mine.yaml"
        self.recipe.write_text("model: {name: ./model}\ndata: {train: train.jsonl}\n")
        self.run = folder / "runs" / "mine"
        self.slurm = folder / "slurm"
        self.answer(sbatch="case $* in *--parsable*) echo 4711 ;; esac")
        self.cluster({})

    def cluster(self, values: Mapping[str, Any], name: str = "cluster.yaml") -> None:
        """Write the cluster file; our folder counts as shared."""
        settings = {"shared": [str(self.folder)], **GPUS, **values}
        (self.folder / name).write_text(render_yaml(settings), encoding="utf-8")

    def answer(self, **commands: str) -> None:
        """Let commands of Slurm answer otherwise."""
        slurm_commands(self.slurm, **commands)

    def job_is(self, state: str, job: str = "4711") -> None:
        """Let Slurm say how a job is; of no other it knows anything."""
        known = f"{job}|{job.partition('_')[0]}|{state}|node1|2026-11-24T08:28:56|None"
        self.answer(squeue=f"echo '{known}'", sacct="", scontrol=NOT_THERE)

    def submit(self, *words: str) -> int:
        """Call `peft-dist submit`."""
        cluster = str(self.folder / "cluster.yaml")
        return main(["submit", str(self.recipe), "--cluster", cluster, *words])

    def calls(self, command: str = "sbatch") -> list[list[str]]:
        """Return how a command of Slurm was called."""
        file = self.slurm / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [words[1:] for line in lines if (words := shlex.split(line))[0] == command]

    def made(self) -> list[str]:
        """Return what there is besides what the tests made."""
        ours = {"model", "train.jsonl", "mine.yaml", "slurm", "cluster.yaml", "secrets"}
        return sorted(path.name for path in self.folder.iterdir() if path.name not in ours)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    made = Desk(tmp_path)
    monkeypatch.setenv("PATH", f"{made.slurm}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return made


Capture = pytest.CaptureFixture[str]


def told(capsys: Capture) -> str:
    """Return the one line of a complaint, without what begins every one."""
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1, text
    return text.removeprefix("peft-dist: error: ").rstrip("\n")


def test_a_run_is_made_submitted_and_remembered(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("train.seed=7", "--nodes", "2", "--time", "2:00:00") == 0
    assert capsys.readouterr().out == (
        "job 4711: runs/mine; `peft-dist status runs/mine` shows how it is\n"
    )
    script = str(desk.run / "job.sbatch")
    assert desk.calls() == [["--test-only"], ["--parsable", script]]
    (event,) = jobs.events(desk.run)
    assert event.pop("time") > 1e9
    assert event == {"event": "submitted", "job": "4711", "by": "submit", "nodes": 2,
                     "time_limit": "02:00:00", "singleton": False}  # fmt: skip
    assert "seed: 7" in (desk.run / "recipe.yaml").read_text()
    assert "--num_processes 4" in (desk.run / "node.sh").read_text()
    assert "#SBATCH --time=02:00:00\n" in (desk.run / "job.sbatch").read_text()
    assert load_cluster(desk.run / "slurm" / "cluster.yaml").gpus_per_node == 2
    for path in (desk.run, *desk.run.rglob("*")):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_slurm_checks_the_very_script_that_is_submitted(desk: Desk) -> None:
    desk.answer(sbatch=f"case $* in --test-only) cat >{desk.slurm}/checked ;; *) echo 7 ;; esac")
    assert desk.submit() == 0
    assert (desk.slurm / "checked").read_text() == (desk.run / "job.sbatch").read_text()


def test_a_dry_run_prints_the_scripts_and_makes_nothing(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("--dry-run", "--nodes", "2") == 0
    printed = capsys.readouterr().out
    assert f"==> {desk.run / 'job.sbatch'} <==\n#!/bin/bash\n" in printed
    assert f"==> {desk.run / 'node.sh'} <==\n#!/bin/bash\n" in printed
    assert printed.endswith(f"sbatch {desk.run / 'job.sbatch'}\n")
    assert (desk.made(), desk.calls()) == ([], [])
    assert desk.submit("--nodes", "2") == 0
    assert (desk.run / "job.sbatch").read_text() in printed
    assert (desk.run / "node.sh").read_text() in printed


Change = Callable[[Desk], object]


def nothing(_desk: Desk) -> None:
    """Change nothing."""


def secrets(mode: int, text: str = "WANDB_API_KEY=x\n") -> Change:
    def make(desk: Desk) -> None:
        file = desk.folder / "secrets"
        file.write_text(text)
        file.chmod(mode)
        desk.cluster({"secrets_file": str(file)})

    return make


REFUSED: dict[str, tuple[Change, list[str], str]] = {
    "too much time": (nothing, ["--time", "9:00:00"], "--time: 09:00:00 is more than the 08:00:00 "
                      "that a job may take; ask for less: the run goes on by itself"),
    "too little time": (nothing, ["--time", "0:04:00"], "--time: 00:04:00 leaves no time to train: "
                        "saving begins 00:02:00 before the end; ask for more than 00:04:00, or "
                        "lower signal_lead_s in the cluster file"),
    "no time": (nothing, ["--time", "90"], "--time: '90' is no time; write HH:MM:SS"),
    "too many nodes": (nothing, ["--nodes", "5"], "--nodes: 5 is more than the 4 that a job may "
                       "have; ask for fewer, or mend max_nodes"),
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
    "open secrets": (secrets(0o644), [], "can be read by others; chmod 600 it"),
    "no secrets": (lambda desk: desk.cluster({"secrets_file": "/none/x"}), [],
                   "secrets_file: /none/x: cannot be read: No such file or directory; make it"),
    "spoiled secrets": (secrets(0o600, "A=b\nx\n"), [], "line 2 is not NAME=value"),
    "set-up that is no shell": (lambda desk: desk.cluster({"setup": "if true\n"}), [],
                                "setup: line 2: syntax error: unexpected end of file; mend it"),
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
                        "cannot be used: File name too long; choose another folder"),
    "a file": (nothing, ["--run-dir", "train.jsonl"], "train.jsonl: is a file; choose another"),
    "a folder in a file": (nothing, ["--run-dir", "train.jsonl/x"], "Not a directory"),
    "a NUL": (nothing, ["--run-dir", "runs/a\0b"], "cannot be used: embedded null byte"),
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


def test_a_run_whose_saves_take_long_needs_more_time(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    ledger(desk.run, 5, step_s=100.0)
    desk.job_is("COMPLETED")
    capsys.readouterr()
    assert main(["resume", "runs/mine", "--time", "0:10:00"]) == 2
    assert told(capsys).endswith(
        "ask for more than 00:11:00: that is what a step and a save of this run have taken"
    )
    assert main(["resume", "runs/mine"]) == 0
    assert "#SBATCH --signal=USR1@330\n" in (desk.run / "job.sbatch").read_text()


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"])
def test_a_live_run_is_not_submitted_twice(desk: Desk, capsys: Capture, state: str) -> None:
    assert desk.submit() == 0
    before = jobs.jobs_file(desk.run).read_bytes()
    desk.job_is(state)
    capsys.readouterr()
    for again in (desk.submit, lambda: main(["resume", "runs/mine"])):
        assert again() == 2
        assert told(capsys) == (
            f"{desk.run}: job 4711 is {state}; wait for it, or `peft-dist cancel {desk.run}`"
        )
    assert jobs.jobs_file(desk.run).read_bytes() == before
    assert len(desk.calls()) == 2


def test_a_successor_that_waits_keeps_a_run_live(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    (desk.run / "slurm" / "successor").write_text("4712\n")
    jobs.record(desk.run, {"event": "ended", "job": "4711", "code": 75, "decision": "again"})
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
    jobs.record(desk.run, {"event": "ended", "job": "4711", "code": 3, "decision": decision})
    desk.answer(squeue="", sacct="", scontrol=NOT_THERE)
    assert desk.submit() == code


def test_a_run_that_trains_without_slurm_is_not_submitted(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    jobs.jobs_file(desk.run).unlink()
    lease(desk.run, here=True)
    capsys.readouterr()
    assert desk.submit() == 2
    assert f"is in use by attempt 1, process {os.getpid()}" in told(capsys)


def test_a_finished_run_is_submitted_only_anew(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    result(desk.run)
    desk.job_is("COMPLETED")
    capsys.readouterr()
    for again in (desk.submit, lambda: main(["resume", "runs/mine"])):
        assert again() == 2
        assert told(capsys) == f"{desk.run}: has finished; start it anew with --fresh"
    assert desk.submit("--fresh") == 0
    assert (desk.run.with_name("mine.old-1") / "result.json").exists()
    assert not RunDir(desk.run).is_finished
    assert len(jobs.events(desk.run)) == 1


def test_changed_settings_of_a_run_with_checkpoints_are_refused(
    desk: Desk, capsys: Capture
) -> None:
    assert desk.submit() == 0
    (desk.run / "checkpoints" / "step-00000001").mkdir(parents=True)
    desk.job_is("FAILED")
    capsys.readouterr()
    assert desk.submit("train.seed=9") == 2
    assert "train.seed is not what the run has been trained with" in told(capsys)
    assert len(jobs.events(desk.run)) == 1
    words = ["train.seed=9", "--allow-changed", "train.seed"]
    assert main(["resume", "runs/mine", *words]) == 0
    assert jobs.events(desk.run)[-1]["by"] == "resume"


def test_a_run_goes_on_with_other_nodes_and_what_it_had(desk: Desk) -> None:
    assert desk.submit("train.seed=7", "--nodes", "2", "--time", "2:00:00", "--singleton") == 0
    for leftover in ("cancelled", "excluded", "undecided", "successor"):
        (desk.run / "slurm" / leftover).write_text("4711\n")
    desk.job_is("TIMEOUT")
    assert main(["resume", "runs/mine", "--nodes", "4"]) == 0
    script = (desk.run / "job.sbatch").read_text()
    for line in ("--nodes=4", "--time=02:00:00", "--dependency=singleton"):
        assert f"#SBATCH {line}\n" in script
    assert "--num_processes 8" in (desk.run / "node.sh").read_text()
    assert "seed: 7" in (desk.run / "recipe.yaml").read_text()
    assert sorted(path.name for path in (desk.run / "slurm").iterdir()) == [
        "cluster.yaml",
        "jobs.jsonl",
    ]
    assert [event["nodes"] for event in jobs.events(desk.run)] == [2, 4]


def test_a_run_goes_on_as_submitted_although_the_cluster_file_has_changed(desk: Desk) -> None:
    assert desk.submit() == 0
    desk.job_is("TIMEOUT")
    desk.cluster({"partition": "other", "max_time": "4:00:00"})
    assert main(["resume", "runs/mine"]) == 0
    assert "--partition" not in (desk.run / "job.sbatch").read_text()
    assert main(["resume", "runs/mine", "--cluster", "cluster.yaml"]) == 0
    script = (desk.run / "job.sbatch").read_text()
    assert "#SBATCH --partition=other\n#SBATCH --nodes=1\n" in script
    assert "#SBATCH --time=04:00:00\n" in script


def test_a_run_of_this_machine_is_handed_to_a_cluster(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    for path in sorted((desk.run / "slurm").iterdir()):
        path.unlink()
    assert main(["resume", "runs/mine", "--cluster", "cluster.yaml", "--nodes", "2"]) == 0
    assert jobs.events(desk.run)[0]["nodes"] == 2
    capsys.readouterr()
    assert main(["resume", "runs/none", "--cluster", "cluster.yaml"]) == 2
    assert "runs/none: is no folder" in told(capsys)


def test_an_array_makes_a_run_of_each_element_and_one_job(desk: Desk, capsys: Capture) -> None:
    words = ["--array", "train.seed=1,2", "--array", "method.rank=4,8", "--limit", "2"]
    assert desk.submit(*words, "--dry-run") == 0
    assert desk.made() == []
    assert desk.submit(*words) == 0
    script = str(desk.run / "job.sbatch")
    assert desk.calls() == [["--test-only"], ["--parsable", "--array=0,1,2,3%2", script]]
    assert "#SBATCH --array=0-3%2\n" in Path(script).read_text()
    assert json.loads((desk.run / "array.json").read_text())["elements"][3] == {
        "run_dir": "003",
        "settings": ["train.seed=2", "method.rank=8"],
    }
    for index in range(4):
        run = desk.run / f"{index:03d}"
        (event,) = jobs.events(run)
        assert event["job"] == f"4711_{index}"
        assert f"--run-dir {run} " in (run / "node.sh").read_text()
        assert not (run / "job.sbatch").exists()
    assert "rank: 8" in (desk.run / "003" / "recipe.yaml").read_text()
    assert not (desk.run / "recipe.yaml").exists()


def test_an_array_goes_on_with_the_runs_that_have_not_finished(desk: Desk, capsys: Capture) -> None:
    words = ["--array", "train.seed=1,2,3,4", "--limit", "2"]
    assert desk.submit(*words, "--nodes", "2", "--singleton") == 0
    runs = [desk.run / f"{index:03d}" for index in range(4)]
    result(runs[0])
    result(runs[2])
    over = "\n".join(f"4711_{i}|{4711 + i}|TIMEOUT|node1|N/A|None" for i in (1, 3))
    desk.answer(squeue=f"cat <<'END'\n{over}\nEND", sacct="exit 1", scontrol=NOT_THERE,
                sbatch="case $* in *--parsable*) echo 4800 ;; esac")  # fmt: skip
    script = str(desk.run / "job.sbatch")
    for again, by in ((lambda: main(["resume", "runs/mine"]), "resume"),
                      (lambda: desk.submit(*words, "--nodes", "2"), "submit")):  # fmt: skip
        assert again() == 0
        assert desk.calls()[-1] == ["--parsable", "--array=1,3%2", script]
        assert [len(jobs.events(run)) for run in (runs[0], runs[2])] == [1, 1]
        assert [jobs.events(run)[-1]["by"] for run in (runs[1], runs[3])] == [by, by]
        assert "seed: 4" in (runs[3] / "recipe.yaml").read_text()
        desk.answer(squeue=f"cat <<'END'\n{over.replace('4711_', '4800_')}\nEND")
    assert jobs.events(runs[1])[1] | {"time": 0} == {
        "event": "submitted", "job": "4800_1", "time": 0, "by": "resume", "nodes": 2,
        "time_limit": "08:00:00", "singleton": True,
    }  # fmt: skip
    capsys.readouterr()
    for run in (runs[1], runs[3]):
        result(run)
    assert main(["resume", "runs/mine"]) == 2
    assert told(capsys) == f"{desk.run}: has finished; start it anew with --fresh"


def test_one_live_element_keeps_an_array_from_being_submitted(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("--array", "train.seed=1,2") == 0
    states = "4711_0|4712|COMPLETED|node1|N/A|None\n4711_1|4711|RUNNING|node1|N/A|None"
    desk.answer(squeue=f"cat <<'END'\n{states}\nEND")
    capsys.readouterr()
    assert desk.submit("--array", "train.seed=1,2") == 2
    assert "001: job 4711_1 is RUNNING" in told(capsys)


def test_a_folder_holds_one_array_or_one_run(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("--array", "train.seed=1,2") == 0
    desk.job_is("FAILED", "4711_0")
    capsys.readouterr()
    assert desk.submit("--array", "train.seed=1,2,3") == 2
    assert "holds another array; choose another folder with --run-dir" in told(capsys)
    assert desk.submit() == 2
    assert "holds '000' already; choose another folder with --run-dir" in told(capsys)
    assert desk.submit("--run-dir", "runs/one") == 0
    desk.answer(squeue="echo '4711|4711|FAILED|node1|N/A|None'")
    capsys.readouterr()
    assert desk.submit("--run-dir", "runs/one", "--array", "train.seed=1,2") == 2
    assert "holds a run; choose another folder with --run-dir" in told(capsys)


def test_what_an_enclosing_job_says_does_not_reach_the_new_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SBATCH_PARTITION", "SLURM_NTASKS", "SLURM_CONF", "HF_TOKEN"):
        monkeypatch.setenv(name, "there")
    desk.answer(sbatch=f"env >>{desk.slurm}/env; echo 7")
    assert desk.submit() == 0
    names = {line.partition("=")[0] for line in (desk.slurm / "env").read_text().splitlines()}
    assert {"SLURM_CONF", "HF_TOKEN"} < names
    assert not names & {"SLURM_JOB_ID", "SBATCH_PARTITION", "SLURM_NTASKS"}


def test_secrets_are_in_nothing_that_is_written_or_called(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets(0o600, "WANDB_API_KEY=hidden-in-file\n")(desk)
    monkeypatch.setenv("WANDB_API_KEY", "hidden-in-environment")
    monkeypatch.setenv("HF_TOKEN", "hidden-in-environment")
    assert desk.submit("--dry-run") == 0
    assert desk.submit() == 0
    written = [path.read_bytes() for path in desk.run.rglob("*") if path.is_file()]
    written += [(desk.slurm / "calls").read_bytes(), "".join(capsys.readouterr()).encode()]
    assert len(written) > 6
    assert not any(b"hidden" in data for data in written)


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
