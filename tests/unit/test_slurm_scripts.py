"""The two scripts of a job: the same bytes each time, valid shell, and arguments that arrive."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_dist import __version__
from peft_dist.common.errors import ClusterError
from peft_dist.slurm.examples import examples
from peft_dist.slurm.scripts import Array, render_job, render_node
from peft_dist.slurm.template import _templates
from tests.unit.slurm_jobs import (
    APPTAINER,
    CPUS,
    EVERYTHING,
    GPUS,
    MODEL,
    PYXIS,
    Machines,
    job,
    jobs,
    json_lines,
    render,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
CASES = [(name, script) for name in jobs() for script in ("job.sbatch", "node.sh")]
each_script = pytest.mark.parametrize(("name", "script"), CASES, ids=[f"{n}/{s}" for n, s in CASES])


def without_version(text: str) -> str:
    return text.replace(f"Made by peft-dist {__version__}", "Made by peft-dist VERSION")


@each_script
def test_scripts_are_those_that_a_person_has_looked_at(name: str, script: str) -> None:
    """PEFT_DIST_UPDATE_GOLDEN=1 writes them anew, for a person to look at."""
    text = without_version(render(jobs()[name])[script])
    file = GOLDEN / name / script
    if os.environ.get("PEFT_DIST_UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    assert str(ROOT) not in text


def test_every_golden_script_belongs_to_a_job() -> None:
    found = {(file.parent.name, file.name) for file in GOLDEN.rglob("*") if file.is_file()}
    assert found == set(CASES)


def test_another_process_makes_the_same_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.slurm_jobs"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=True,
    )
    assert json.loads(done.stdout) == {name: render(made) for name, made in jobs().items()}


@each_script
def test_bash_reads_every_script(name: str, script: str) -> None:
    text = render(jobs()[name])[script]
    read = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


@pytest.mark.slow
@each_script
def test_shellcheck_has_nothing_to_say(name: str, script: str) -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("PEFT_DIST_CLUSTER") == "required":
            pytest.fail("PEFT_DIST_CLUSTER=required, and shellcheck is not installed")
        pytest.skip("shellcheck is not installed; on Debian: apt install shellcheck")
    text = render(jobs()[name])[script]
    told = subprocess.run(
        ["shellcheck", "--shell=bash", "-"], input=text, text=True, capture_output=True, check=False
    )
    assert told.stdout == ""


def test_directives_are_read_as_they_were_meant() -> None:
    folder = Path("/scratch/a \"b\" 'c' $(d) `e` #f; 100%")
    text = render_job(job(EVERYTHING, nodes=4, folder=folder, array=Array(9, 3), singleton=True))
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert [shlex.split(line.removeprefix("#SBATCH ")) for line in lines] == [
        [word]
        for word in (
            "--job-name=first", "--partition=gpu", "--account=my-project", "--qos=long",
            "--reservation=course", "--constraint=[rack1*2&rack2*4]", "--nodes=4",
            "--ntasks-per-node=1", "--cpus-per-task=64", "--gres=gpu:a100:4", "--mem=480G",
            "--time=1-00:00:00", "--signal=USR1@180", "--array=0-8%3", "--dependency=singleton",
            "--open-mode=append", f"--output={folder}%/logs/job-%A_%a.log", "--export=ALL",
            "--requeue", "--exclusive",
        )
    ]  # fmt: skip


def test_nothing_follows_the_directives_that_sbatch_would_read() -> None:
    for made in jobs().values():
        lines = render_job(made).splitlines()
        first = next(index for index, line in enumerate(lines) if not line.startswith("#"))
        assert not any(line.startswith("#SBATCH") for line in lines[first:])


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "a\u2028b", "a\udce9b", "a\\b"])
def test_a_folder_that_no_script_can_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ClusterError, match="choose a name without it") as refused:
        render_job(job(CPUS, folder=Path("/scratch") / name))
    assert str(refused.value).isprintable()


def test_a_template_cannot_forget_to_quote() -> None:
    with pytest.raises(AssertionError, match="unquoted"):
        _templates().from_string("echo {{ name }}").render(name="$(x)")


def test_every_node_runs_the_launcher_as_it_was_written(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    folder = tmp_path / 'it\'s a "run" of $HOME; `x` \t*'[:-2]
    (folder / "slurm").mkdir(parents=True)
    interpreter = tmp_path / "Py 'thon\" $3" / "python"
    interpreter.parent.mkdir()
    interpreter.symlink_to(machines.interpreter)
    environment = {"NOTE": "it's 100% \"$HOME\" `x` \\n ~", "EMPTY": "", "DASH": "-n", "N": 7,
                   "UNICODE": "naïve ☃", "OMP_NUM_THREADS": 3}  # fmt: skip
    made = job(
        {**EVERYTHING, "python": str(interpreter), "setup": "set +e\nfalse\nexport FROM_SETUP=1",
         "environment": environment, "secrets_file": f"{tmp_path}/se cr'ets"},
        nodes=2, folder=folder,
    )  # fmt: skip
    for path, text in ((folder / "node.sh", render_node(made, folder, model=MODEL)),
                       (folder / "job.sbatch", render_job(made))):  # fmt: skip
        path.write_text(text, encoding="utf-8")
    done = machines.run(folder / "job.sbatch", nodes=2)
    assert done.returncode == 0, done.stderr
    for node in (0, 1):
        own, launcher = split(machines.words(f"argv-{node}"))
        assert own == [
            "-m", "peft_dist.slurm.supervisor", "--run-dir", str(folder), "--max-starts", "100",
            "--max-starts-without-progress", "5", "--secrets", f"{tmp_path}/se cr'ets",
            "--interface=ib0",
            "--devices", "4", "--preflight-timeout-s", "90", "--arrival-s", "1800",
            "--min-free-gb", "20.5", "--max-clock-offset-s", "60",
        ]  # fmt: skip
        assert launcher == [
            str(interpreter), "-m", "accelerate.commands.launch",
            "--config_file", "/share of/it/launch/strategies/fsdp.yaml", "--num_processes", "8",
            "--num_machines", "2", "--machine_rank", str(node), "--main_process_ip", "node1",
            "--main_process_port", launcher[launcher.index("--main_process_port") + 1],
            "--rdzv_conf", "node={},host=node1,port={},join_timeout_s=120".format(
                node, launcher[launcher.index("--main_process_port") + 1]
            ),
            "--rdzv_backend", "peft-dist",
            "--max_restarts", "3", "/share of/it/launch/train.py", str(folder / "recipe.yaml"),
        ]  # fmt: skip
        variables = machines.variables(node)
        expected = {name: str(value) for name, value in environment.items()}
        expected |= {"FROM_SETUP": "1", "PYTHONSAFEPATH": "1", "PEFT_DIST_STAGED": '{"a": "b"}',
                     "PEFT_DIST_HOSTS": "node1,node2", "SRUN_CPUS_PER_TASK": "8"}  # fmt: skip
        assert {name: variables.get(name) for name in expected} == expected
        assert variables["PET_RDZV_ID"].startswith("12-0-")
        assert machines.words(f"stage-{node}")[2:] == ["--json", MODEL, "/local/peft-dist"]
    assert machines.words("srun")[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    events = json_lines(folder / "slurm" / "jobs.jsonl")
    assert [event["event"] for event in events] == ["started", "ended"]


def split(words: list[str]) -> tuple[list[str], list[str]]:
    place = words.index("--")
    return words[:place], words[place + 1 :]


def node_of(machines: Machines, made: Any) -> Path:
    """Write the node script of a job whose folder is real."""
    (made.folder / "slurm").mkdir(parents=True)
    script: Path = made.folder / "node.sh"
    script.write_text(render_node(made, made.folder, model=MODEL), encoding="utf-8")
    return script


ON_A_NODE = {"SLURM_NODEID": "0", "PEFT_DIST_NONCE": "f00d", "PEFT_DIST_HEAD": "node1",
             "PEFT_DIST_PORT": "20120"}  # fmt: skip


def test_in_apptainer_everything_runs_in_the_image_that_sees_what_it_needs(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    made = job(APPTAINER, nodes=2, folder=tmp_path / "run")
    done = machines.run(node_of(machines, made), nodes=2, **ON_A_NODE)
    assert done.returncode == 0, done.stderr
    run = str(made.folder)
    assert machines.words("apptainer")[:16] == [
        "exec", "--nv", "--bind", "/lustre:/lustre", "--bind", "/disk/models:/local",
        "--bind", "/datasets:/datasets:ro", "--bind", "/a:/b:rw", "--bind", f"{run}:{run}",
        "--bind", "/home/alice/secrets:/home/alice/secrets", "/lustre/images/peft-dist.sif",
        "python3",
    ]  # fmt: skip
    calls = (machines.commands / "calls").read_text().splitlines()
    assert sum(line.startswith("apptainer") for line in calls) == 3  # finds, stages, trains
    assert machines.variables()["PYTHONNOUSERSITE"] == "1"
    _, launcher = split(machines.words("argv-0"))
    assert launcher[0] == "python3"


def test_without_gpus_apptainer_is_not_asked_for_them() -> None:
    made = job({**CPUS, "container": {"runtime": "apptainer", "image": "a.sif"}})
    assert "--nv" not in render_node(made, made.folder)


def test_with_pyxis_srun_starts_the_image_and_the_script_knows_nothing_of_it() -> None:
    made = job(PYXIS, nodes=2)
    run = made.folder
    script = render_job(made)
    assert "--container-image='nvcr.io#nvidia/pytorch:25.01-py3'" in script
    mounts = f"/lustre:/lustre,/disk/models:/local,/datasets:/datasets:ro,/a:/b:rw,{run}:{run}"
    assert f"--container-mounts={mounts},/home/alice/secrets:/home/alice/secrets " in script
    assert "apptainer" not in render_node(made, run)


@pytest.mark.parametrize("cluster", [APPTAINER, PYXIS])
def test_a_folder_that_a_mount_would_misread_is_refused(cluster: dict[str, Any]) -> None:
    made = job(cluster, folder=Path("/scratch/a:b,c"))
    with pytest.raises(ClusterError, match="--run-dir: .* cannot be seen in a container"):
        render_job(made)
        render_node(made, made.folder)


def test_the_program_of_a_node_takes_the_arguments_that_it_is_given(tmp_path: Path) -> None:
    """No stand-in: it complains about the folder, and not about its arguments."""
    machines = Machines(tmp_path)
    for name, cluster in (("a", EVERYTHING), ("b", {**CPUS, "preflight": {"enabled": False}})):
        settings = {"python": sys.executable, "setup": "", "stage": None}
        made = job({**cluster, **settings}, folder=tmp_path / name)
        script = node_of(machines, made)
        places = {"PEFT_DIST_HOSTS": "node1", "PEFT_DIST_LOGS": str(tmp_path)}
        done = machines.run(script, PYTHONPATH=str(ROOT), **ON_A_NODE, **places)
        assert done.returncode == 2, done.stderr
        assert "holds no run (recipe.yaml and run.json missing)" in done.stderr


def test_more_threads_than_cpus_are_never_asked_for(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    made = job({**GPUS, "python": str(machines.interpreter)}, folder=tmp_path / "run")
    script = node_of(machines, made)
    for cpus, threads in (("16", "4"), ("2", "1")):
        machines.run(script, SLURM_CPUS_ON_NODE=cpus, **ON_A_NODE)
        assert machines.variables()["OMP_NUM_THREADS"] == threads


def test_a_set_up_that_fails_ends_the_node_before_python(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    made = job(
        {**CPUS, "python": str(machines.interpreter), "setup": "false\ntrue"},
        folder=tmp_path / "run",
    )
    assert machines.run(node_of(machines, made), **ON_A_NODE).returncode == 1
    assert not (machines.seen / "argv-0").exists()


def job_of(machines: Machines, tmp_path: Path, *, nodes: int = 1, **cluster: Any) -> Path:
    """Write both scripts of a job whose folder is real; return the batch script."""
    values = {**CPUS, "python": str(machines.interpreter), **cluster}
    made = job(values, nodes=nodes, folder=tmp_path / "run")
    node_of(machines, made)
    script: Path = made.folder / "job.sbatch"
    script.write_text(render_job(made), encoding="utf-8")
    return script


@pytest.mark.parametrize(
    ("decision", "state", "after", "code"),
    [
        ("", "RUNNING", "again srun ended", 75),
        ("", "RUNNING", "stop 3 starts in a row", 3),
        ("again stopped by SIGTERM", "COMPLETING", "cancelled by its user", 3),
        ("", "COMPLETING", "cancelled by its user", 3),
    ],
)
def test_what_the_nodes_cannot_know_is_decided_once_more(
    tmp_path: Path, decision: str, state: str, after: str, code: int
) -> None:
    machines = Machines(tmp_path)
    script = job_of(machines, tmp_path, stage={"folder": "/local"})
    done = machines.run(script, decision=decision, STAND_IN_STATE=state, STAND_IN_AFTER=after)
    assert done.returncode == code, done.stderr
    words = machines.words("after")
    own = words[: words.index("--")]
    assert own[-2:] == ["--after", "0"]
    logs = tmp_path / "run" / "logs" / "12-0"
    assert f"JobState={state} " in (logs / "job.txt").read_text(encoding="utf-8")
    assert (logs / "nodes.txt").read_text(encoding="utf-8") == "node1 mixed\n"
    events = json_lines(tmp_path / "run" / "slurm" / "jobs.jsonl")
    expected = {"again": "again", "stop": "stop", "cancelled": "cancelled"}[after.split()[0]]
    assert (events[-1]["event"], events[-1]["decision"]) == ("ended", expected)
    assert (machines.seen / "requeued").exists() is (expected == "again")


def test_a_job_that_slurm_has_queued_again_decides_nothing(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    done = machines.run(job_of(machines, tmp_path), decision="again", STAND_IN_STATE="PENDING")
    assert done.returncode == 75
    assert not (machines.seen / "requeued").exists()
    assert not (machines.seen / "after").exists()


def test_a_set_up_that_fails_everywhere_ends_the_job_with_its_last_line(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    setup = "echo 'module: cuda/99 not found' >&2\nfalse\n"
    done = machines.run(job_of(machines, tmp_path, setup=setup))
    assert done.returncode == 3
    (line,) = [text for text in done.stderr.splitlines() if "peft-dist: error: " in text]
    assert line.endswith(" on 1 of 1 nodes: node1: code 1: module: cuda/99 not found")
    logs = tmp_path / "run" / "logs" / "12-0"
    assert (logs / "decision").read_text(encoding="utf-8").startswith("stop the set-up fails ")


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "from peft_dist import resources; print(resources.root())"],
        ["-m", "peft_dist.slurm.node", "--run-dir", "/a", "--max-starts", "3", "--", "python"],
    ],
)
def test_the_scripts_of_an_earlier_version_are_refused_in_one_line(
    tmp_path: Path, words: list[str]
) -> None:
    places = {"PYTHONPATH": str(ROOT), "PEFT_DIST_LOGS": str(tmp_path), "SLURM_NODEID": "0"}
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, **places}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "were made by another version" in line and "`peft-dist resume RUN`" in line
    assert (tmp_path / "decision").read_text(encoding="utf-8").startswith("stop job.sbatch and")


def test_the_examples_are_what_would_be_submitted() -> None:
    """`make examples` writes them anew."""
    folder = ROOT / "slurm" / "examples"
    found = {
        str(file.relative_to(folder)): without_version(file.read_text(encoding="utf-8"))
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert found == {name: without_version(text) for name, text in examples().items()}
    assert len(found) == 9
    for name, text in found.items():
        if not name.endswith(".md"):
            check = ["bash", "-n"]
            done = subprocess.run(check, input=text, text=True, capture_output=True, check=False)
            assert (done.returncode, done.stderr) == (0, ""), name
