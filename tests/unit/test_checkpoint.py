"""The adapter on disk: PEFT's format, whole or not there, and the same after a reload."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.checkpoint import (
    ADAPTER_FILE,
    keep_newest,
    load_adapter,
    save_adapter,
    saved_names,
)
from peft_dist.dist import World
from peft_dist.errors import PeftDistError, RunDirError, TrainingError
from peft_dist.session import Session, find_base, open_session
from tests.tiny import tiny_model, tiny_recipe


def opened(folder: Path, world: World, architecture: str = "llama", **sections: Any) -> Session:
    tiny_model(folder / architecture, architecture)
    recipe = tiny_recipe(folder / architecture, folder / "rows.jsonl", **sections)
    labels = ("a", "b") if architecture == "bert" else ()
    return open_session(recipe, world, find_base(recipe, folder / "cache"), label_names=labels)


BERT = {"model": {"task": "sequence-classification"}}


@pytest.mark.parametrize(
    ("architecture", "sections"),
    [
        ("llama", {}),
        ("llama", {"method": {"dora": True}}),
        ("qwen2", {"method": {"bias": "all"}}),
        ("qwen2", {"method": {"bias": "lora_only"}}),
        ("bert", BERT),
        ("bert", {**BERT, "method": {"bias": "all"}}),
    ],
)
def test_everything_that_trains_is_saved_and_read_back(
    tmp_path: Path, alone: World, architecture: str, sections: dict[str, Any]
) -> None:
    session = opened(tmp_path, alone, architecture, **sections)
    state = {
        name: torch.randn_like(value) for name, value in session.engine.adapter_state().items()
    }
    assert state.keys() == session.adapter.keys()
    save_adapter(tmp_path / "adapter", session.peft, state)
    stored = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    assert len(stored) == len(state)
    assert not any(".default." in name for name in stored)
    back = load_adapter(tmp_path / "adapter", session.peft, session.adapter)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    session.engine.load_adapter_state(back)
    assert all(torch.equal(session.adapter[name], value) for name, value in state.items())


def test_the_same_adapter_is_the_same_bytes(tmp_path: Path, alone: World) -> None:
    session = opened(tmp_path, alone)
    for name in ("one", "two"):
        save_adapter(tmp_path / name, session.peft, session.engine.adapter_state())
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == sorted(config["target_modules"])
    assert config["base_model_name_or_path"] == str(tmp_path / "llama")


def test_a_new_copy_replaces_the_old_one_and_leaves_nothing_beside_it(
    tmp_path: Path, alone: World
) -> None:
    session = opened(tmp_path, alone)
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    (folder / "old").write_text("", encoding="utf-8")
    save_adapter(folder, session.peft, session.engine.adapter_state())
    assert {f.name for f in folder.iterdir()} == {ADAPTER_FILE, "adapter_config.json"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_tensor_that_peft_would_not_save_is_named(tmp_path: Path, alone: World) -> None:
    session = opened(tmp_path, alone)
    with pytest.raises(TrainingError, match="extra.weight is trained, but PEFT would not save it"):
        saved_names(session.peft, {**session.adapter, "extra.weight": torch.zeros(1)})


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, alone: World) -> None:
    session = opened(tmp_path, alone)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(TrainingError, match="the adapter cannot be written: ") as caught:
        save_adapter(tmp_path / "file" / "adapter", session.peft, session.engine.adapter_state())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other", "shape"])
def test_a_broken_or_foreign_adapter_is_refused(tmp_path: Path, alone: World, damage: str) -> None:
    session = opened(tmp_path, alone)
    folder = tmp_path / "adapter"
    save_adapter(folder, session.peft, session.engine.adapter_state())
    file = folder / ADAPTER_FILE
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:500])
    elif damage == "other":
        save_file({**tensors, "another": torch.zeros(1)}, file)
    else:
        save_file({**tensors, name: torch.zeros(2, 2)}, file)
    with pytest.raises(RunDirError, match=str(file)) as caught:
        load_adapter(folder, session.peft, session.adapter)
    assert isinstance(caught.value, PeftDistError)
    assert "\n" not in str(caught.value)


def test_the_newest_copies_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        (tmp_path / f"step-{step:08d}" / "adapter").mkdir(parents=True)
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
