"""Submitting: what is made and remembered, and what it takes to submit it once more."""

import json
import re
import stat
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.config.cluster import load_cluster
from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from tests.unit.run_folders import ledger, result
from tests.unit.slurm_desk import NOT_THERE, Capture, Desk, told


def without_token(argv: list[str]) -> list[str]:
    return [word for word in argv if not word.startswith("--comment=")]


def test_a_run_is_made_submitted_and_remembered(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("train.seed=7", "--nodes", "2", "--time", "2:00:00") == 0
    assert capsys.readouterr().out == (
        "job 4711: runs/mine; `peft-dist status runs/mine` shows how it is\n"
    )
    script = str(desk.run / "job.sbatch")
    tested, (parsable, comment, file) = desk.calls()
    assert (tested, parsable, file) == (["--test-only"], "--parsable", script)
    assert re.fullmatch("--comment=peft-dist-[0-9a-f]{16}", comment)
    (event,) = job_events.events(desk.run)
    assert event.pop("time") > 1e9
    assert event == {"event": "submitted", "job": "4711", "by": "submit", "nodes": 2,
                     "gpus": 4, "time_limit": "02:00:00", "singleton": False,
                     "frozen": False}  # fmt: skip
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


def test_the_start_that_slurm_expects_is_printed(desk: Desk, capsys: Capture) -> None:
    line = "sbatch: Job 9 to start at 2026-11-27T08:00:00 using 8 processors on nodes n1"
    desk.answer(sbatch=f"case $* in --test-only) echo '{line}' >&2 ;; *) echo 7 ;; esac")
    assert desk.submit() == 0
    assert capsys.readouterr().out.startswith(
        "job 7: runs/mine, expected to start 2026-11-27 08:00:00; `peft-dist status"
    )


def test_a_dry_run_prints_the_scripts_and_makes_nothing(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("--dry-run", "--nodes", "2") == 0
    printed = capsys.readouterr().out
    assert f"==> {desk.run / 'job.sbatch'} <==\n#!/bin/bash\n" in printed
    assert f"==> {desk.run / 'node.sh'} <==\n#!/bin/bash\n" in printed
    assert printed.endswith(f"\nsbatch --parsable {desk.run / 'job.sbatch'}\n")
    assert (desk.made(), desk.calls()) == ([], [])
    assert desk.submit("--nodes", "2") == 0
    assert (desk.run / "job.sbatch").read_text() in printed
    assert (desk.run / "node.sh").read_text() in printed


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
    assert len(job_events.events(desk.run)) == 1


def test_changed_settings_of_a_run_with_checkpoints_are_refused(
    desk: Desk, capsys: Capture
) -> None:
    assert desk.submit() == 0
    (desk.run / "checkpoints" / "step-00000001").mkdir(parents=True)
    desk.job_is("FAILED")
    capsys.readouterr()
    assert desk.submit("train.seed=9") == 2
    assert "train.seed is not what the run has been trained with" in told(capsys)
    assert len(job_events.events(desk.run)) == 1
    words = ["train.seed=9", "--allow-changed", "train.seed"]
    assert main(["resume", "runs/mine", *words]) == 0
    assert job_events.events(desk.run)[-1]["by"] == "resume"


def test_a_run_goes_on_with_other_nodes_and_what_it_had(desk: Desk) -> None:
    assert desk.submit("train.seed=7", "--nodes", "2", "--time", "2:00:00", "--singleton") == 0
    for leftover in ("cancelled", "excluded", "successor"):
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
    assert [event["nodes"] for event in job_events.events(desk.run)] == [2, 4]


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
    assert job_events.events(desk.run)[0]["nodes"] == 2
    capsys.readouterr()
    assert main(["resume", "runs/none", "--cluster", "cluster.yaml"]) == 2
    assert "runs/none: is no folder" in told(capsys)


def test_an_array_makes_a_run_of_each_element_and_one_job(desk: Desk, capsys: Capture) -> None:
    words = ["--array", "train.seed=1,2", "--array", "method.rank=4,8", "--limit", "2"]
    assert desk.submit(*words, "--dry-run") == 0
    assert desk.made() == []
    assert desk.submit(*words) == 0
    script = str(desk.run / "job.sbatch")
    assert without_token(desk.calls()[-1]) == ["--parsable", "--array=0,1,2,3%2", script]
    assert "#SBATCH --array=0-3%2\n" in Path(script).read_text()
    assert json.loads((desk.run / "array.json").read_text())["elements"][3] == {
        "run_dir": "003",
        "settings": ["train.seed=2", "method.rank=8"],
    }
    for index in range(4):
        run = desk.run / f"{index:03d}"
        (event,) = job_events.events(run)
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
        assert without_token(desk.calls()[-1]) == ["--parsable", "--array=1,3%2", script]
        assert [len(job_events.events(run)) for run in (runs[0], runs[2])] == [1, 1]
        assert [job_events.events(run)[-1]["by"] for run in (runs[1], runs[3])] == [by, by]
        assert "seed: 4" in (runs[3] / "recipe.yaml").read_text()
        desk.answer(squeue=f"cat <<'END'\n{over.replace('4711_', '4800_')}\nEND")
    assert job_events.events(runs[1])[1] | {"time": 0} == {
        "event": "submitted", "job": "4800_1", "time": 0, "by": "resume", "nodes": 2, "gpus": 4,
        "time_limit": "08:00:00", "singleton": True, "frozen": False,
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


@pytest.mark.parametrize("in_job", [False, True])
def test_a_users_own_variables_reach_sbatch_and_an_enclosing_jobs_do_not(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, in_job: bool
) -> None:
    users = {"SBATCH_ACCOUNT", "SBATCH_QOS", "SLURM_CLUSTERS", "SLURM_CONF", "SLURM_JWT",
             "HF_TOKEN"}  # fmt: skip
    of_job = {"SLURM_NTASKS", "SBATCH_MEM_BIND"}
    answered = {"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "PEFT_DIST_AFTER"}
    for name in users | of_job | answered | ({"SLURM_JOB_ID"} if in_job else set()):
        monkeypatch.setenv(name, "there")
    desk.cluster({"partition": "gpu"})
    desk.answer(sbatch=f"env >>{desk.slurm}/env; echo 7")
    assert desk.submit() == 0
    names = {line.partition("=")[0] for line in (desk.slurm / "env").read_text().splitlines()}
    assert users < names
    assert not names & answered
    assert names & of_job == (set() if in_job else of_job)
    assert "SLURM_JOB_ID" not in names


def test_gpus_without_cpus_are_worth_a_word(desk: Desk, capsys: Capture) -> None:
    desk.cluster({"cpus_per_gpu": None})
    assert desk.submit() == 0
    assert "cpus_per_gpu: not given in the cluster file" in told(capsys)
    desk.cluster({"cpus_per_gpu": None, "exclusive": True})
    assert desk.submit("--run-dir", "runs/other") == 0
    assert capsys.readouterr().err == ""


def test_a_key_as_an_argument_is_refused_in_the_set_up(desk: Desk, capsys: Capture) -> None:
    desk.cluster({"setup": f"module load x\nwandb login --relogin {'0f' * 20}"})
    assert desk.submit() == 2
    line = told(capsys)
    assert "looks like a secret" in line and "0f0f" not in line


def test_a_chain_is_queued_from_the_login_node(desk: Desk, capsys: Capture) -> None:
    count = f"$(wc -l <{desk.slurm}/afters)"
    desk.answer(
        sbatch="case $* in *--parsable*) ;; *) exit ;; esac; "
        f'echo "after $PEFT_DIST_AFTER" >>{desk.slurm}/afters; '
        f"if [ {count} = 4 ]; then echo 'QOSMaxSubmitJobPerUserLimit' >&2; exit 1; fi; "
        f"echo $((4710 + {count}))",
        squeue="",
    )
    assert desk.submit("--chain", "3") == 0
    assert capsys.readouterr().err == (
        "peft-dist: warning: --chain: 2 of 3 jobs are queued: sbatch: QOSMaxSubmitJobPerUserLimit\n"
    )
    assert (desk.run / "slurm" / "successor").read_text() == "4712\n4713\n"
    afters = (desk.slurm / "afters").read_text().splitlines()
    assert afters == ["after ", "after 4711", "after 4712", "after 4713"]
    assert [w for w in desk.calls()[-1] if w.startswith("--dep")] == ["--dependency=afterany:4713"]
    history = job_events.events(desk.run)
    assert job_events.candidates(desk.run, history) == ["4711", "4712", "4713"]
    desk.answer(squeue="echo '4711|4711|TIMEOUT||N/A|x'; echo '4713|4713|PENDING||N/A|Dependency'")
    assert desk.submit() == 2
    assert "job 4713 is PENDING" in told(capsys)
    assert desk.submit("--chain", "2", "--array", "train.seed=1,2", "--run-dir", "runs/x") == 2
    assert told(capsys) == "--chain: is for one run; submit the runs one by one"


def test_the_set_up_is_tried_here_before_anything_is_queued(desk: Desk, capsys: Capture) -> None:
    python = desk.folder / "python"
    python.write_text('#!/bin/sh\necho "ModuleNotFoundError: $TRIED $2" >&2\nexit 1\n')
    python.chmod(0o755)
    desk.cluster({"setup": "export TRIED=here", "python": str(python)})
    assert desk.submit("--try") == 2
    line = told(capsys)
    assert line.startswith(
        "setup or python: fails on this machine: ModuleNotFoundError: here import peft_dist, torch"
    )
    assert desk.calls() == []
    desk.cluster({"setup": "echo 'module: unknown' >&2; false", "python": str(python)})
    assert desk.submit("--try") == 2
    assert "fails on this machine: module: unknown; fix it in" in told(capsys)
    python.write_text("#!/bin/sh\n")
    desk.cluster({"setup": "export TRIED=here", "python": str(python)})
    assert desk.submit("--try") == 0


BANNER = "echo 'Welcome, 3 nodes are free'; echo '--> Verifying valid submit host...OK'"


def test_a_job_id_is_found_behind_what_a_site_prints_first(desk: Desk) -> None:
    desk.answer(sbatch=f"{BANNER}; echo '4712;vista'; echo")
    assert desk.submit() == 0
    assert job_events.newest_job(desk.run) == "4712"


FORGETFUL = "case $* in *--parsable*) echo 'Socket timed out' >&2; exit 1 ;; esac"


def by_token(desk: Desk, job: str = "4713") -> str:
    """Return a squeue that knows a job by the token of the newest submission."""
    note = f"$(tail -n 1 {desk.run}/slurm/jobs.jsonl | grep -o 'peft-dist-[0-9a-f]*')"
    row = f"{job}|{job}|PENDING||N/A|Priority"
    return f'case $* in *%F*) echo "12|"; echo "{job}|{note}" ;; *) echo "{row}" ;; esac'


def test_a_job_that_was_queued_without_a_word_is_found(desk: Desk, capsys: Capture) -> None:
    desk.answer(sbatch=FORGETFUL, squeue="exit 0")
    desk.answer(squeue=by_token(desk))
    assert desk.submit() == 0
    assert job_events.newest_job(desk.run) == "4713"
    capsys.readouterr()
    assert desk.submit() == 2
    assert "job 4713 is PENDING" in told(capsys)


def test_a_submission_that_nobody_can_tell_of_is_looked_up_before_the_next(
    desk: Desk, capsys: Capture
) -> None:
    desk.answer(sbatch=FORGETFUL, squeue="echo 'no controller' >&2; exit 1")
    assert desk.submit() == 2
    assert "Socket timed out; cannot tell whether the job is queued: " in told(capsys)
    assert desk.submit() == 2
    assert "cannot tell whether a job was queued that nobody knows the id of" in told(capsys)
    desk.answer(squeue=by_token(desk), sbatch="echo 4714")
    assert desk.submit() == 2
    assert "job 4713 is PENDING" in told(capsys)
    assert [call for call in desk.calls() if "--test-only" not in call][1:] == []


def test_a_submission_that_slurm_refuses_leaves_nothing_to_look_up(
    desk: Desk, capsys: Capture
) -> None:
    desk.answer(sbatch=FORGETFUL, squeue="")
    assert desk.submit() == 2
    assert told(capsys) == "sbatch: Socket timed out"
    desk.answer(sbatch="echo 4711", squeue="exit 1")
    assert desk.submit() == 0


def test_secrets_are_in_nothing_that_is_written_or_called(
    desk: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.secrets("WANDB_API_KEY=hidden-in-file\n")
    monkeypatch.setenv("WANDB_API_KEY", "hidden-in-environment")
    monkeypatch.setenv("HF_TOKEN", "hidden-in-environment")
    assert desk.submit("--dry-run") == 0
    assert desk.submit() == 0
    written = [path.read_bytes() for path in desk.run.rglob("*") if path.is_file()]
    written += [(desk.slurm / "calls").read_bytes(), "".join(capsys.readouterr()).encode()]
    assert len(written) > 6
    assert not any(b"hidden" in data for data in written)
