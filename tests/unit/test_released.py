"""An adapter finds its base and its tokenizer again: by hub id and commit, on any machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.metrics.result import loading_code
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

OLD, NEW = "0" * 39 + "1", "0" * 39 + "2"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a model in a hub cache whose branch `old` is not its main."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub" / "models--me--tiny"
    tiny_model(folder / "snapshots" / OLD, "llama")
    shutil.copytree(folder / "snapshots" / OLD, folder / "snapshots" / NEW)
    tiny_model(folder / "snapshots" / NEW, "llama", rope_theta=100.0)
    (folder / "refs").mkdir()
    for branch, commit in (("main", NEW), ("old", OLD)):
        (folder / "refs" / branch).write_text(commit, encoding="ascii")
    return folder


def saved(tmp_path: Path, world: World, name: str, **model: str) -> tuple[ModelSetup, Path]:
    rows = write_jsonl(tmp_path / "rows.jsonl", completion_rows(4))
    recipe = tiny_recipe(
        Path(name), rows, quantization="none", parallel={"strategy": "ddp"}, model=model
    )
    setup = set_up_model(recipe, world, find_base(recipe, tmp_path / "cache"))
    tokens = tokenize_rows(recipe, "train", tmp_path / "cache" / "rows")
    AdapterSaver(setup, tokens).save(tmp_path / "adapter")
    return setup, tmp_path / "adapter"


def named(adapter: Path) -> tuple[str, str | None]:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return config["base_model_name_or_path"], config["revision"]


def test_an_adapter_loads_on_the_commit_it_was_trained_on_when_its_branch_has_moved(
    tmp_path: Path, alone: World, hub: Path
) -> None:
    setup, adapter = saved(tmp_path, alone, "me/tiny", revision="old")
    assert named(adapter) == ("me/tiny", OLD)
    (hub / "refs" / "old").write_text(NEW, encoding="ascii")
    again = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    ids = torch.arange(12)[None]
    setup.model.eval()
    with torch.no_grad():
        ours = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
        torch.testing.assert_close(again(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)
    told = "\n".join(loading_code(adapter, {"method": "lora"}, setup.released.name))
    assert "elsewhere" not in told


def test_a_default_branch_is_pinned_as_well(tmp_path: Path, alone: World, hub: Path) -> None:
    _, adapter = saved(tmp_path, alone, "me/tiny")
    assert named(adapter) == ("me/tiny", NEW)


def test_a_folder_of_the_hub_cache_is_known_by_its_id(
    tmp_path: Path, alone: World, hub: Path
) -> None:
    _, adapter = saved(tmp_path, alone, str(hub / "snapshots" / OLD))
    assert named(adapter) == ("me/tiny", OLD)


def test_any_other_folder_keeps_its_path_and_the_tokenizer_lies_beside_the_adapter(
    tmp_path: Path, alone: World
) -> None:
    tiny_model(tmp_path / "model", "llama")
    setup, adapter = saved(tmp_path, alone, str(tmp_path / "model"))
    assert named(adapter) == (str(tmp_path / "model"), None)
    wanted = AutoTokenizer.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    found = AutoTokenizer.from_pretrained(adapter)
    assert found.chat_template == wanted.chat_template is not None
    assert found("the cat")["input_ids"] == wanted("the cat")["input_ids"]
    told = "\n".join(loading_code(adapter, {"method": "lora"}, setup.released.name))
    assert f"elsewhere, with a copy of {tmp_path / 'model'}" in told
