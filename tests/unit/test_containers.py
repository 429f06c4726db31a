"""What runs an image: one command per runtime, with its GPU flag, mounts and set-up lines inside.

Stand-ins run the command here; no real runtime is in Debian's archive.
"""

from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import ClusterError
from peft_dist.config.cluster import check_cluster
from peft_dist.slurm.job_scripts import render_job, render_node
from peft_dist.slurm.validate import check_cluster_files, try_set_up
from tests.unit.run_folders import slurm_commands
from tests.unit.slurm_jobs import APPTAINER_COMMAND, CPUS, GPUS, Machines, job
from tests.unit.test_slurm_scripts import ON_A_NODE, node_of

SHIFTER = r"""
printf '%s\0' "$@" >"$SEEN/shifter"
while :; do case $1 in --*) shift ;; *) break ;; esac; done
echo "shifter says hello" # what an image prints first
exec "$@"
"""
INSIDE = """
echo "modules are loaded"
export FROM_INSIDE="it's \\"$HOME\\""
quote='"'
false || true
"""


def on(runtime: str, **container: Any) -> dict[str, Any]:
    image = {"runtime": runtime, "image": "/images/a.sif", "mounts": ["/lustre"], **container}
    return {**GPUS, "python": None, "container": image}


def machines_with_images(folder: Path) -> Machines:
    machines = Machines(folder)
    slurm_commands(
        machines.commands,
        singularity=APPTAINER_COMMAND.replace("--nv)", "--nv | --rocm)"),
        shifter=SHIFTER,
    )
    return machines


@pytest.mark.parametrize(
    ("runtime", "container", "begins"),
    [
        ("apptainer", {}, ["apptainer", "exec", "--nv", "--bind"]),
        ("apptainer", {"gpu": "rocm"}, ["apptainer", "exec", "--rocm", "--bind"]),
        ("singularity", {"gpu": "none", "start": "run"}, ["singularity", "run", "--bind"]),
        ("singularity", {}, ["singularity", "exec", "--nv", "--bind"]),
        ("shifter", {"image": "docker:a:1"}, ["shifter", "--image=docker:a:1", "--module=gpu"]),
        ("shifter", {"gpu": "none"}, ["shifter", "--image=/images/a.sif", "'--volume=/lustre:/lu"]),
    ],
)
def test_each_runtime_gets_its_own_words(
    runtime: str, container: dict[str, Any], begins: list[str]
) -> None:
    made = job(on(runtime, **container))
    (line,) = [
        line
        for line in render_node(made, made.folder).replace(" \\\n ", "").splitlines()
        if line.startswith("python=(")
    ]
    assert line.startswith(f"python=({' '.join(begins)}"), line
    assert "--container-" not in render_job(made)


def test_in_singularity_set_up_lines_run_inside_and_what_they_export_arrives(
    tmp_path: Path,
) -> None:
    machines = machines_with_images(tmp_path)
    cluster = on("singularity", start="run", gpu="rocm", setup=INSIDE)
    made = job({**cluster, "setup": "export FROM_OUTSIDE=1"}, nodes=2, folder=tmp_path / "run")
    done = machines.run(node_of(machines, made), nodes=2, **ON_A_NODE)
    assert done.returncode == 0, done.stderr
    run = str(made.folder)
    words = machines.words("apptainer")
    assert words[:7] == ["run", "--rocm", "--bind", "/lustre:/lustre", "--bind", f"{run}:{run}",
                         "/images/a.sif"]  # fmt: skip
    assert words[7:9] == ["bash", "-c"] and words[10:12] == ["bash", "python3"]
    variables = machines.variables()
    assert variables["FROM_INSIDE"] == f'it\'s "{machines.seen}"'
    assert variables["FROM_OUTSIDE"] == "1"
    # What the lines print does not become the folder of launch/.
    assert "/share of/it/launch/train.py" in machines.words("argv-0")


def test_a_set_up_line_that_fails_inside_ends_the_node(tmp_path: Path) -> None:
    machines = machines_with_images(tmp_path)
    made = job(on("singularity", setup="false\nexport A=1"), folder=tmp_path / "run")
    assert machines.run(node_of(machines, made), **ON_A_NODE).returncode == 1
    assert not (machines.seen / "argv-0").exists()


def test_in_shifter_the_volumes_are_one_option(tmp_path: Path) -> None:
    machines = machines_with_images(tmp_path)
    made = job(on("shifter", mounts=["/a", "/b:/c:ro"]), folder=tmp_path / "run")
    done = machines.run(node_of(machines, made), **ON_A_NODE)
    assert done.returncode == 0, done.stderr
    run = str(made.folder)
    assert machines.words("shifter")[:4] == [
        "--image=/images/a.sif", "--module=gpu", f"--volume=/a:/a;/b:/c:ro;{run}:{run}", "python3",
    ]  # fmt: skip
    assert "/share of/it/launch/train.py" in machines.words("argv-0")


@pytest.mark.parametrize("runtime", ["edf", "pyxis"])
def test_an_environment_definition_file_goes_to_srun(runtime: str) -> None:
    image = {"image": "./my-env.toml", "mounts": ["/scratch"], "setup": "export INSIDE=1"}
    made = job({**on(runtime, **image), "setup": "export ALSO_INSIDE=1"}, nodes=2)
    script = render_job(made)
    assert script.count("--environment=./my-env.toml") == 2  # the nodes', and who decides
    assert "--container-" not in script
    node = render_node(made, made.folder)
    assert "export ALSO_INSIDE=1\nexport INSIDE=1\n" in node
    assert "python=(python3)" in node


def test_a_run_that_an_environment_definition_file_does_not_mount_is_refused() -> None:
    made = job(on("edf", image="my-env", mounts=["/capstor"]))
    with pytest.raises(ClusterError, match=r"--run-dir: .* is in none of container.mounts; have"):
        render_job(made)


MISTAKES = {
    ("shifter", "start", "run"): "start is not for shifter; remove it",
    ("pyxis", "start", "exec"): "start is not for pyxis; remove it",
    ("edf", "gpu", "nv"): "gpu is not for edf, which sees to GPUs; remove it",
    ("pyxis", "gpu", "none"): "gpu is not for pyxis, which sees to GPUs; remove it",
    ("shifter", "gpu", "rocm"): "gpu: rocm is not for shifter; remove it",
    ("apptainer", "gpu", "cuda"): "container.gpu: got 'cuda'; must be one of 'nv', 'rocm', 'none'",
}


@pytest.mark.parametrize("case", MISTAKES, ids="-".join)
def test_a_setting_that_a_runtime_does_not_have_is_refused(case: tuple[str, str, str]) -> None:
    runtime, key, value = case
    with pytest.raises(ClusterError) as refused:
        check_cluster(on(runtime, **{key: value}), where="x.yaml")
    line = str(refused.value)
    assert MISTAKES[case] in line and len(line.splitlines()) == 1


def test_an_image_may_lie_in_ones_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    cluster = check_cluster(on("apptainer", image="~/a.sif"), where="x.yaml")
    assert cluster.container is not None and cluster.container.image == "/home/alice/a.sif"
    docker = check_cluster(on("apptainer", image="docker://a/b:1"), where="x.yaml")
    assert docker.container is not None and docker.container.image == "docker://a/b:1"


def test_the_login_node_tries_what_nodes_do_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = machines_with_images(tmp_path)
    monkeypatch.setenv("PATH", f"{machines.commands}:/usr/bin:/bin")
    monkeypatch.setenv("SEEN", str(machines.seen))
    monkeypatch.setenv("STAND_IN_SHARE", "x")
    try_set_up(check_cluster(on("singularity", setup="true"), where="x.yaml"))
    assert machines.words("apptainer")[:2] == ["exec", "/images/a.sif"]
    failing = check_cluster(on("singularity", setup="echo no such env >&2\nfalse"), where="x.yaml")
    with pytest.raises(ClusterError, match="fails on this machine: no such env"):
        try_set_up(failing)
    for cluster in (on("edf"), {**CPUS, "python": "$SLURM_TMPDIR/env/bin/python"}):
        with pytest.raises(ClusterError, match="--try: needs a"):
            try_set_up(check_cluster(cluster, where="x.yaml"))


def test_set_up_lines_inside_that_bash_cannot_read_are_refused() -> None:
    with pytest.raises(ClusterError, match=r"container\.setup: line 2: syntax error"):
        check_cluster_files(check_cluster(on("apptainer", setup="if"), where="x.yaml"))


def test_an_interpreter_on_a_nodes_own_disk_is_found_there(tmp_path: Path) -> None:
    machines = Machines(tmp_path)
    disk = tmp_path / "a disk's $HOME"
    (disk / "env").mkdir(parents=True)
    (disk / "env" / "python").symlink_to(machines.interpreter)
    made = job({**CPUS, "python": "$SLURM_TMPDIR/env/python"}, folder=tmp_path / "run")
    script = node_of(machines, made)
    done = machines.run(script, SLURM_TMPDIR=str(disk), **ON_A_NODE)
    assert done.returncode == 0, done.stderr
    words = machines.words("argv-0")
    assert words[words.index("--") + 1] == f"{disk}/env/python"
    assert machines.run(script, **ON_A_NODE).returncode == 1  # unset there
