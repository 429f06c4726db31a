"""Jobs of evaluate, quantize and merge, and jobs that wait for other jobs' good end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.run import job_events
from peft_dist.run.command_folder import make_command_folder, read_command
from tests.processes import ROOT
from tests.unit.run_folders import array, make_run, result, submitted
from tests.unit.slurm_desk import NOT_THERE, Capture, Desk, told
from tests.unit.test_job_comes_back import CHAIN, SCONTROL, Site


def options(desk: Desk) -> list[str]:
    """Return the options of the last submission, without its token and script."""
    return [word for word in desk.calls()[-1][:-1] if not word.startswith("--comment=")]


def test_a_run_is_scored_in_a_job_that_waits_for_it(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("data.eval=train.jsonl") == 0
    desk.job_is("PENDING")
    capsys.readouterr()
    words = ["evaluate", "runs/mine", "--cluster", "cluster.yaml", "--after", "runs/mine"]
    assert main(["submit", *words, "--nodes", "2"]) == 0
    folder = desk.run / "evaluate"
    assert capsys.readouterr().out == (
        f"job 4711: {folder}; `peft-dist status {folder}` shows how it is\n"
    )
    assert options(desk) == [
        "--parsable", "--dependency=afterok:4711", "--kill-on-invalid-dep=no",
    ]  # fmt: skip
    assert (desk.run / "slurm" / "dependents").read_text() == "4711\n"
    node = (folder / "node.sh").read_text()
    assert "peft_dist.slurm.command_supervisor" in node
    assert "--num_processes 4" in node  # two nodes of two GPUs, whatever trained
    assert f'"$share/launch/score.py" {desk.run}' in node
    assert "--no-preflight" in node
    (event,) = job_events.events(folder)
    assert (event["event"], event["job"], event["nodes"]) == ("submitted", "4711", 2)


def test_one_process_asks_for_one_gpu_of_a_node(desk: Desk) -> None:
    assert desk.submit() == 0
    assert main(["submit", "merge", "runs/mine", "--out", "m", "--cluster", "cluster.yaml"]) == 0
    script = (desk.run / "merge" / "job.sbatch").read_text()
    assert "#SBATCH --gres=gpu:1\n" in script
    assert "#SBATCH --cpus-per-task=4\n" in script
    node = (desk.run / "merge" / "node.sh").read_text()
    assert f" {desk.run} \\\n  --out {desk.folder / 'm'}" in node


def test_what_binds_ranks_does_not_bind_the_one_task_of_a_command(desk: Desk) -> None:
    options = {"gpus-per-task": 1, "gpu-bind": "closest", "mpi": "none"}
    desk.cluster({"launcher": "srun", "srun": options})
    assert desk.submit("data.eval=train.jsonl") == 0
    assert "--gpus-per-task=1" in (desk.run / "job.sbatch").read_text()
    assert main(["submit", "evaluate", "runs/mine", "--cluster", "cluster.yaml"]) == 0
    script = (desk.run / "evaluate" / "job.sbatch").read_text()
    assert "--mpi=none" in script
    assert "--gpus-per-task" not in script and "--gpu-bind" not in script


def test_what_an_adapter_is_added_to_reaches_the_job(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    words = ["submit", "merge", "runs/mine", "--cluster", "cluster.yaml", "--out"]
    assert main([*words, "m", "--base", "dequantized"]) == 0
    folder = desk.run / "merge"
    assert "--base dequantized" in (folder / "node.sh").read_text()
    assert read_command(folder)[-2:] == ["--base", "dequantized"]
    capsys.readouterr()
    assert main([*words, "model"]) == 2  # the base itself
    assert told(capsys) == f"--out: {desk.folder / 'model'} is already there; choose another folder"


def test_a_base_is_packed_and_a_run_waits_for_it(desk: Desk) -> None:
    words = ["--cluster", "cluster.yaml", "--time", "1:00:00", "--revision", "main"]
    assert main(["submit", "quantize", "model", *words]) == 0
    folder = desk.folder / "runs" / "quantize-model"
    node = (folder / "node.sh").read_text()
    assert f"quantize {desk.folder / 'model'} \\\n  --revision main" in node
    desk.job_is("RUNNING")
    assert desk.submit("--after", "runs/quantize-model", "--singleton") == 0
    assert "--dependency=afterok:4711,singleton" in options(desk)


def test_an_array_is_waited_for_by_each_of_its_runs(desk: Desk) -> None:
    for index, run in enumerate(array(desk.folder / "runs" / "sweep", [["a=1"], ["a=2"]])):
        submitted(run, f"12_{index}")
    result(desk.folder / "runs" / "sweep" / "000")
    desk.job_is("RUNNING", "12_1")
    assert desk.submit("--after", "runs/sweep") == 0
    assert "--dependency=afterok:12_1" in options(desk)


def test_what_has_finished_is_not_waited_for(desk: Desk) -> None:
    result(make_run(desk.folder / "runs" / "other"))
    assert desk.submit("--after", "runs/other") == 0
    assert options(desk) == ["--parsable"]


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ("FAILED", "has not finished, and no job of it waits or runs; submit or resume it first"),
        (None, "cannot tell whether job 12 is over: squeue: no; try again when Slurm answers"),
    ],
)
def test_what_nobody_will_finish_is_not_waited_for(
    desk: Desk, capsys: Capture, state: str | None, complaint: str
) -> None:
    other = make_run(desk.folder / "runs" / "other")
    submitted(other, "12")
    if state is None:
        desk.answer(squeue="echo no >&2; exit 1")
    else:
        desk.job_is(state, "12")
    assert desk.submit("--after", "runs/other") == 2
    assert told(capsys) == f"--after {other}: {complaint}"
    assert not desk.run.exists()


def test_what_cannot_run_is_refused_before_anything_is_made(desk: Desk, capsys: Capture) -> None:
    assert desk.submit() == 0
    capsys.readouterr()
    for words, complaint in (
        (["evaluate", "runs/mine"], "data.eval: there are no held-out rows; add data.eval=FILE"),
        (["evaluate", "runs/none"], "runs/none: is no folder"),
        (["merge", "runs/mine", "--out", "/tmp/m"], "--out: /tmp/m is in none of"),
        (["quantize", "model", "--job-dir", "runs/mine"], "holds something else than a job of"),
        (["quantize", "model", "--time", "0:00:30"], "leaves no time to train"),
    ):
        assert main(["submit", *words, "--cluster", "cluster.yaml"]) == 2
        assert complaint in told(capsys)
    assert sorted(path.name for path in (desk.folder / "runs").iterdir()) == ["mine"]
    assert not (desk.run / "evaluate").exists()


def test_a_commands_job_is_listed_and_submitted_again_once_it_is_over(
    desk: Desk, capsys: Capture
) -> None:
    words = ["submit", "quantize", "model", "--cluster", "cluster.yaml"]
    assert main(words) == 0
    folder = desk.folder / "runs" / "quantize-model"
    desk.job_is("RUNNING")
    assert main(words) == 2
    assert "job 4711 is RUNNING" in capsys.readouterr().err
    result(folder)
    assert main(["status", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["state"]) == ("quantize-model", "COMPLETED")
    desk.answer(squeue=NOT_THERE, sacct="echo '4711|4711|COMPLETED|node1|2026-11-24T08:28:56'")
    assert main(words) == 0
    assert not (folder / "result.json").exists()


def decide(folder: Path, *command: str, left_s: float = 1e6) -> str:
    """Have a node run a command's job to its end; return the decision."""
    make_command_folder(folder, ["quantize", "model"])
    logs = folder / "logs" / "7-0"
    logs.mkdir()
    (logs / "job-end").write_text(f"{time.time() + left_s:.0f}\n", encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "peft_dist.slurm.command_supervisor", "--run-dir", str(folder),
         "--max-starts", "100", "--max-starts-without-progress", "5", "--no-preflight",
         "--", *command],
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
            "PEFT_DIST_HOSTS": "node1", "PEFT_DIST_PORT": "20120", "PEFT_DIST_LOGS": str(logs),
            "PEFT_DIST_NONCE": "ab",
        },
        capture_output=True, check=False,
    )  # fmt: skip
    return (logs / "decision").read_text(encoding="utf-8").strip()


def test_a_command_that_does_its_work_is_done(tmp_path: Path) -> None:
    assert decide(tmp_path / "job", "true") == "done"
    facts = json.loads((tmp_path / "job" / "result.json").read_text(encoding="utf-8"))
    assert facts["command"] == "quantize model"


def test_a_command_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    assert decide(tmp_path / "job", "false").startswith("stop quantize fails: node1 crashed; see ")
    assert not (tmp_path / "job" / "result.json").exists()


STOPPED = "kill -USR1 $(cut -d' ' -f4 /proc/$$/stat); sleep 20"


def test_a_command_that_is_preempted_begins_again(tmp_path: Path) -> None:
    assert decide(tmp_path / "job", "bash", "-c", STOPPED).startswith("again stopped by SIGUSR1")


def test_a_command_that_comes_to_its_time_limit_asks_for_more(tmp_path: Path) -> None:
    told = decide(tmp_path / "job", "bash", "-c", STOPPED, left_s=20)
    assert told == "stop quantize needs more time; submit it again with a longer --time"


WAITS = f"""case "$*" in
  *"-o 90") echo "JobId=90 Dependency=afterok:12(unfulfilled),afterok:5(failed),singleton" ;;
  "update "*) ;;
  *) {SCONTROL} ;;
esac"""


@pytest.mark.parametrize("cluster", [{}, CHAIN])
def test_what_waits_for_a_run_waits_for_the_job_that_takes_over(
    tmp_path: Path, cluster: dict[str, object]
) -> None:
    site = Site(tmp_path, **cluster)
    (site.run_dir / "slurm").mkdir(exist_ok=True)
    (site.run_dir / "slurm" / "dependents").write_text("90\n", encoding="utf-8")
    site.answer(scontrol=WAITS, squeue="case $* in *'-j 77 '*) echo 77 ;; esac")
    assert site.run(decision="again").returncode == 75
    moved = [call for call in site.calls("scontrol") if call.startswith("scontrol update")]
    to = "JobId=90 Dependency=afterok:77,afterok:5,singleton"
    assert [call.partition(" update ")[2] for call in moved] == ([to] if cluster else [])


def test_a_run_that_is_taken_up_again_takes_what_waits_for_it_along(tmp_path: Path) -> None:
    site = Site(tmp_path)
    submitted(site.run_dir, "5")
    (site.run_dir / "slurm" / "dependents").write_text("90\n", encoding="utf-8")
    site.answer(scontrol=WAITS)
    assert site.run(decision="done").returncode == 0
    calls = [call for call in site.calls("scontrol") if " update " in call]
    assert calls == ["scontrol update JobId=90 Dependency=afterok:12,afterok:12,singleton"]
