"""Cluster files: what they may say, and the one line that is told of any other."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.common.durations import duration_s, duration_text
from peft_dist.common.errors import ClusterError
from peft_dist.config.cluster import Cluster, cluster_schema, load_cluster, render_cluster
from peft_dist.config.cluster_values import SET_BY_OTHERS
from peft_dist.config.load import render_yaml
from peft_dist.slurm.secrets import read_secrets
from tests.unit.slurm_jobs import APPTAINER, EVERYTHING

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "slurm" / "clusters").glob("*.yaml"))

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a cluster file."""

    def write(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_every_shipped_cluster_file_loads_and_is_explained(file: Path) -> None:
    load_cluster(file)
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("values", [{}, EVERYTHING, {**APPTAINER, "python": "/usr/bin/python3"}])
def test_a_cluster_file_that_is_written_out_loads_to_the_same(
    write: Write, values: dict[str, Any]
) -> None:
    cluster = load_cluster(write(render_yaml(values)))
    again = load_cluster(write(render_cluster(cluster)))
    assert again == cluster.model_copy(update={"python": cluster.interpreter})


def test_what_is_written_out_names_the_interpreter_but_not_that_of_an_image(write: Write) -> None:
    assert load_cluster(write(render_cluster(Cluster()))).python == sys.executable
    in_an_image = Cluster.model_validate(APPTAINER)
    assert in_an_image.interpreter == "python3"
    assert load_cluster(write(render_cluster(in_an_image))).python is None


def test_a_time_needs_no_quotes(write: Write) -> None:
    """YAML 1.1 would read 86400 there, which Slurm takes for minutes."""
    assert load_cluster(write("max_time: 24:00:00")).max_time == "24:00:00"
    assert load_cluster(write("max_time: 2-00:00:00")).max_time == "2-00:00:00"


@pytest.mark.parametrize(
    ("text", "seconds", "again"),
    [
        ("00:00:01", 1, "00:00:01"),
        ("24:00:00", 86_400, "1-00:00:00"),
        ("100:00:00", 360_000, "4-04:00:00"),
        ("1-12", 129_600, "1-12:00:00"),
        ("1-12:30", 131_400, "1-12:30:00"),
        ("2-01:02:03", 176_523, "2-01:02:03"),
    ],
)
def test_times_are_what_slurm_means_by_them(text: str, seconds: int, again: str) -> None:
    assert duration_s(text) == seconds
    assert duration_text(seconds) == again
    assert duration_s(again) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "90", "90:00", "1h", "-1:00:00", "1:00:60", "1:60:00", "00:00:00", "0-0", "१-१२"],
)
def test_a_time_that_slurm_and_people_read_differently_is_refused(text: str) -> None:
    with pytest.raises(ClusterError, match=r"is no time.*write HH:MM:SS or D-HH:MM:SS"):
        duration_s(text)


NAME = "letters, digits and _ . , : @ / + = -"
MISTAKES = {
    "launcher: srun\nnuma_binding: node": "cluster: numa_binding is for launcher: torchrun; "
    "remove it, and set srun: {cpu-bind: cores}",
    "partitoin: gpu": "partitoin: no such key; did you mean 'partition'?",
    "partition: a b": f"partition: got 'a b'; must be {NAME}",
    "partition: --wrap=x": f"partition: got '--wrap=x'; must be {NAME}",
    "partition: 7": f"partition: got 7; must be {NAME} or null; put it in quotes",
    "max_time: 24": "max_time: got 24; must be a time like HH:MM:SS or null; put it in quotes",
    "max_time: '90'": "max_time: '90' is no time; write HH:MM:SS or D-HH:MM:SS",
    "max_time: 1h": "max_time: got '1h'; must be a time like HH:MM:SS",
    "max_time: 1:00:00\ndefault_time: 2:00:00": "cluster: default_time 2:00:00 is more than "
    "max_time 1:00:00; lower it",
    "gres: gpu:4": "gres: got 'gpu:4'; must be a request like gpu:a100:{gpus}",
    "gpus_per_node: -1": "gpus_per_node: got -1; must be a whole number of at least 0",
    "gpus_per_node: true": "gpus_per_node: got True; must be a whole number of at least 0",
    "cpus_per_gpu: 4": "cluster: cpus_per_gpu is given without gpus_per_node; set that too",
    "gpus_per_node: 1\ncpus_per_gpu: 4\ncpus_per_node: 4": "cluster: cpus_per_gpu and "
    "cpus_per_node are both given; keep one of them",
    "gpus_per_node: 2\nprocesses_per_node: 4": "cluster: processes_per_node 4 is more than "
    "gpus_per_node 2; lower it",
    "memory_per_node: 0": "memory_per_node: got 0; must be a size like 480G, or \"0\" for all of a "
    "node or null; put it in quotes",
    "requeue: {alowed: true}": "requeue.alowed: no such key; did you mean 'allowed'?",
    "shared: /home": "shared: got '/home'; must be a list, each item an absolute path, or one "
    "that begins with ~/",
    "shared: [home]": "shared: got 'home'; must be an absolute path, or one that begins with ~/",
    "python: ~bob/python": "python: got '~bob/python'; must be an absolute path, or one that "
    "begins with ~/, $SLURM_TMPDIR/, $TMPDIR/ or $LOCAL_SCRATCH/",
    "environment: {A-B: x}": "environment: got 'A-B'; must be a variable's name",
    "environment: {A: true}": "environment: got True; must be a section of names, each with text "
    "or a whole number; put it in quotes",
    "environment: {SLURM_NODEID: 0}": "environment: SLURM_NODEID is not set by cluster files; "
    "remove it",
    "environment: {UID: 0}": "environment: UID is not set by cluster files; remove it",
    'environment: {A: "x\\ny"}': r"environment: got 'x\ny'; must be without control characters",
    "interface: ib0;ls": "interface: got 'ib0;ls'; must be a name like ib0, or several, or "
    "^lo,docker for all others",
    "container: {runtime: docker, image: x}": "container.runtime: got 'docker'; must be one of "
    "'apptainer', 'singularity', 'shifter', 'pyxis', 'edf'",
    "container: {runtime: pyxis, image: --x}": "container.image: got '--x'; must be a path or "
    "reference of an image",
    "container: {runtime: pyxis, image: x, mounts: [a]}": "container.mounts: got 'a'; must be "
    "/folder or /here:/there",
    "container: {runtime: pyxis, image: x, mounts: [/a]}\nstage: {folder: /b}": "cluster: "
    "stage.folder /b is in none of container.mounts; add it there",
    'setup: "a\\rb"': "setup: holds a control character; remove it",
    "model: {name: m}\ndata: {train: t}": "is a recipe; name a cluster file",
    "": "is empty; start with partition: NAME",
    "[gpu]": "is not a mapping but ['gpu']; start with partition: NAME",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_with_field_value_and_remedy(write: Write, text: str) -> None:
    file = write(text)
    with pytest.raises(ClusterError) as refused:
        load_cluster(file)
    assert str(refused.value) == f"{file}: {MISTAKES[text]}"


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"none\.yaml: no such file"):
        load_cluster(tmp_path / "none.yaml")
    with pytest.raises(ClusterError, match="is a folder; name a cluster file"):
        load_cluster(tmp_path)


SECRETS = [
    "environment: {WANDB_API_KEY: abc123}",
    "environment: {wandb_api_key: abc123}",
    "environment: {HF_TOKEN: abc123}",
    "environment: {AWS_SECRET_ACCESS_KEY: abc123}",
    "environment: {PGPASSWORD: abc123}",
    "environment: {HTTPS_PROXY: 'http://me:abc123@proxy:3128'}",
    "setup: export WANDB_API_KEY=abc123",
    "setup: 'HF_TOKEN=\"abc123\" python x'",
    "setup: huggingface-cli login --token=abc123",
    "setup: export HTTPS_PROXY=http://me:abc123@proxy:3128",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_never_gets_into_a_script_nor_into_the_complaint(write: Write, text: str) -> None:
    with pytest.raises(ClusterError, match="put it in secrets_file") as refused:
        load_cluster(write(text))
    assert "abc123" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "environment: {TOKENIZERS_PARALLELISM: 'false', NCCL_IB_PKEY: 1, HF_TOKEN_PATH: /x}",
        "environment: {HTTPS_PROXY: 'http://proxy:3128', MAX_TOKENS: 5}",
        'setup: export WANDB_API_KEY=$(cat ~/.wandb-key) HF_TOKEN="$OTHER"',
        "setup: unset HF_TOKEN; export WANDB_API_KEY=",
    ],
)
def test_what_only_sounds_like_a_secret_is_let_through(write: Write, text: str) -> None:
    load_cluster(write(text))


def test_a_tilde_is_the_home_of_whoever_submits(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    text = "{shared: [~/runs, /x], python: ~/p, secrets_file: ~/s, stage: {folder: ~/m}}"
    cluster = load_cluster(write(text))
    assert (cluster.shared, cluster.python) == (("/home/alice/runs", "/x"), "/home/alice/p")
    assert (cluster.secrets_file, cluster.stage) == (
        "/home/alice/s",
        cluster.stage and cluster.stage.model_copy(update={"folder": "/home/alice/m"}),
    )
    assert "~" not in render_cluster(cluster)


def test_gpus_can_be_asked_for_by_kind_or_come_with_the_node() -> None:
    def request(**values: Any) -> str | None:
        return Cluster.model_validate(values).gres_request

    assert request() is None
    assert request(gpus_per_node=4) == "gpu:4"
    assert request(gpus_per_node=4, gres="gpu:a100:{gpus},nvme:1") == "gpu:a100:4,nvme:1"
    assert request(gpus_per_node=4, gres=None) is None


def test_cpus_are_counted_per_gpu_or_per_node() -> None:
    assert Cluster().cpus_of_a_node is None
    assert Cluster.model_validate({"cpus_per_node": 6}).cpus_of_a_node == 6
    assert Cluster.model_validate({"gpus_per_node": 4, "cpus_per_gpu": 3}).cpus_of_a_node == 12


def test_the_schema_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--cluster"]) == 0
    printed = capsys.readouterr().out
    assert printed == cluster_schema() + "\n"
    schema = json.loads(printed)
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        for name, field in section["properties"].items():
            kind = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
            assert field.get("description") or kind["description"], name
    assert schema["properties"].keys() == Cluster.model_fields.keys()
    partition = schema["properties"]["partition"]["anyOf"][0]
    assert partition["pattern"] == "^(?:[A-Za-z0-9_][A-Za-z0-9_.,:@/+=-]{0,127})$"
    assert main(["schema"]) == 0
    assert '"title": "Recipe"' in capsys.readouterr().out


def secrets(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    file = tmp_path / "secrets"
    file.write_text(text, encoding="utf-8")
    file.chmod(mode)
    return file


def test_secrets_are_read_line_by_line(tmp_path: Path) -> None:
    text = "# mine\nWANDB_API_KEY=abc=1\n\nHF_TOKEN = x\n".replace(" = ", "=")
    assert read_secrets(secrets(tmp_path, text)) == {"WANDB_API_KEY": "abc=1", "HF_TOKEN": "x"}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601])
def test_a_secrets_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ClusterError, match="secrets_file: .*: can be read by others; chmod 600"):
        read_secrets(secrets(tmp_path, "A=b\n", mode))


@pytest.mark.parametrize("line", ["hidden", "1A=hidden", "A B=hidden", "=hidden", "é=hidden"])
def test_a_line_that_is_no_variable_is_named_by_its_number_alone(tmp_path: Path, line: str) -> None:
    with pytest.raises(ClusterError, match="line 2 is not NAME=value") as refused:
        read_secrets(secrets(tmp_path, f"A=b\n{line}\n"))
    assert "hidden" not in str(refused.value)


def test_a_secrets_file_that_is_missing_is_told_with_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"No such file or directory; make it, with a line"):
        read_secrets(tmp_path / "none")


@pytest.mark.parametrize("name", ["PEFT_DIST_CACHE", "PEFT_DIST_CACHE_SHARED"])
def test_the_cache_of_the_nodes_is_the_users_to_set(name: str) -> None:
    assert not SET_BY_OTHERS.fullmatch(name)
    assert SET_BY_OTHERS.fullmatch(f"{name}_X")
