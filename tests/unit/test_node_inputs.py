"""What a node finds of a recipe's files: told apart cheaply, wherever a copy of them lies."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.common.env import STAGED
from peft_dist.config import load_recipe
from peft_dist.config.load import render_yaml
from peft_dist.preflight.inputs import (
    INDEX,
    MOST_FILES,
    WHOLE_BYTES,
    Inputs,
    inputs_of_run,
    local_inputs,
)
from peft_dist.preflight.node_info import NOTHING
from peft_dist.slurm.stage_model import stage

SAMPLED = 3 * WHOLE_BYTES
"""Bytes of a file of which both ends are read."""


def write_index(folder: Path, *weights: str) -> None:
    index = {"weight_map": {f"weight of {name}": name for name in weights}}
    (folder / "model" / INDEX).write_text(json.dumps(index), encoding="utf-8")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a folder with a recipe and every kind of local input."""
    folder = tmp_path / "project"
    for name in ("model", "run/adapter", "shards"):
        (folder / name).mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (folder / "model" / name).write_text("{}", encoding="utf-8")
    for name in ("1.safetensors", "2.safetensors"):
        (folder / "model" / name).write_bytes(bytes(SAMPLED))
    write_index(folder, "1.safetensors", "2.safetensors")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "run" / "adapter" / name).write_bytes(b"adapter")
    for number in range(MOST_FILES + 6):
        (folder / "shards" / f"part-{number:03}.jsonl").write_text('{"text": "a"}\n')
    (folder / "chat.jinja").write_text("a", encoding="utf-8")
    (folder / "held.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    recipe = {
        "model": {"name": "./model"},
        "method": {"start_from": "run"},
        "data": {"train": "shards/part-*.jsonl", "eval": "held.jsonl", "template": "chat.jinja"},
    }
    (folder / "recipe.yaml").write_text(render_yaml(recipe), encoding="utf-8")
    return folder


def found(folder: Path) -> Inputs:
    """Return the inputs of a project, by names without its place."""
    inputs = local_inputs(load_recipe(folder / "recipe.yaml", check_paths=False))
    return {name.replace(str(folder), ""): told for name, told in inputs.items()}


def flip(name: str, at: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(at)
            file.write(b"~")

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json of the model", flip("model/config.json", 0)),
        ("tokenizer.json of the model", flip("model/tokenizer.json", 1)),
        (f"{INDEX} of the model", flip(f"model/{INDEX}", 18)),
        ("model.name", flip("model/1.safetensors", 9)),
        ("model.name", flip("model/2.safetensors", SAMPLED - 1)),
        ("model.name", flip("model/2.safetensors", SAMPLED)),
        ("model.name", lambda folder: (folder / "model" / "2.safetensors").unlink()),
        ("method.start_from", flip("run/adapter/adapter_model.safetensors", 3)),
        ("data.train /shards/part-*.jsonl", flip("shards/part-000.jsonl", 9)),
        ("data.train /shards/part-*.jsonl", flip("shards/part-001.jsonl", 99)),
        ("data.eval /held.jsonl", flip("held.jsonl", 2)),
        ("data.template /chat.jinja", flip("chat.jinja", 0)),
    ],
)
def test_a_copy_is_the_same_and_every_change_of_a_file_is_told(
    project: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(project, copy)
    first = found(project)
    assert found(copy) == first
    change(copy)
    other = found(copy)
    assert [key for key in first if other[key] != first[key]] == [name]
    assert first.keys() == other.keys()


def test_what_is_told_is_short_and_what_is_on_a_hub_is_left_out(project: Path) -> None:
    told = found(project)["model.name"]
    assert told.startswith(f"2 files, {2 * SAMPLED:,} bytes with digest ")
    overrides = ["model.name=org/model", "data.train=org/rows", "data.eval=null"]
    overrides += ["method.start_from=org/sft", "data.template=null"]
    assert local_inputs(load_recipe(project / "recipe.yaml", overrides)) == {}


def test_what_this_node_alone_lacks_is_told(project: Path) -> None:
    recipe = load_recipe(project / "recipe.yaml")
    (project / "held.jsonl").unlink()
    shutil.rmtree(project / "model")
    inputs = local_inputs(recipe)
    assert inputs["model.name"] == inputs[f"data.eval {project}/held.jsonl"] == NOTHING


def test_a_nodes_own_copy_of_the_model_is_the_same(project: Path, tmp_path: Path) -> None:
    (project / "model" / "consolidated.safetensors").write_bytes(b"of another program")
    copy = stage(project / "model", tmp_path / "own")
    first = found(project)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STAGED, json.dumps({str(project / "model"): str(copy)}))
        assert found(project) == first
        (copy / "config.json").write_text("[]", encoding="utf-8")
        assert found(project) != first


def test_a_run_whose_recipe_cannot_be_read_has_none(tmp_path: Path) -> None:
    assert inputs_of_run(tmp_path) == {}


def test_a_model_of_many_large_files_takes_less_than_a_second(project: Path) -> None:
    names = [f"more-{number:03}.safetensors" for number in range(200)]
    for name in names:
        with (project / "model" / name).open("wb") as file:
            file.truncate(5_000_000_000)
    write_index(project, *names)
    began = time.process_time()
    told = found(project)["model.name"]
    assert time.process_time() - began < 1.0
    assert told.startswith(f"200 files, {200 * 5_000_000_000:,} bytes")
