"""Training that starts from an adapter which there is."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from peft_dist.checkpoint.start_adapter import load_start, with_start_commit
from peft_dist.common.errors import PeftDistError, RecipeError
from peft_dist.config.load import load_recipe
from peft_dist.distributed.world import World
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.run.directory import RunDir
from tests.tiny import completion_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl

METHODS: tuple[dict[str, Any], ...] = (
    {"kind": "lora"},
    {"kind": "lora", "dora": True},
    {"kind": "bottleneck"},
    {"kind": "prefix", "virtual_tokens": 3},
    {"kind": "prompt", "virtual_tokens": 3},
    {"kind": "bitfit", "add_bias": True},
    {"kind": "peft", "type": "IA3"},
)


def set_up(folder: Path, world: World, method: dict[str, Any]) -> ModelSetup:
    """Return a model with an adapter of a method."""
    if not (folder / "llama").is_dir():
        tiny_model(folder / "llama", "llama")
    rows = write_jsonl(folder / "rows.jsonl", completion_rows(4))
    recipe = tiny_recipe(folder / "llama", rows, method=method)
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"))


def moved(setup: ModelSetup) -> dict[str, torch.Tensor]:
    """Return the adapter as some training might leave it."""
    noise = torch.Generator().manual_seed(0)
    return {
        name: tensor + torch.randn(tensor.shape, generator=noise)
        for name, tensor in setup.engine.adapter_state().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "named"), [*((method, "adapter") for method in METHODS), (METHODS[0], ".")]
)
def test_every_method_starts_from_its_own_adapter_to_the_bit(
    tmp_path: Path, alone: World, method: dict[str, Any], named: str
) -> None:
    first = set_up(tmp_path, alone, method)
    state = moved(first)
    save_adapter(tmp_path / "run" / "adapter", first.method, first.peft, state)
    second = set_up(tmp_path, alone, method | {"start_from": str(tmp_path / "run" / named)})
    load_start(second)
    found = second.engine.adapter_state()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert second.start_sha256 is not None


@pytest.mark.parametrize(
    ("saved", "wanted", "words"),
    [
        ({"kind": "prompt"}, {"kind": "lora"}, "holds a PROMPT_TUNING adapter, but"),
        ({"kind": "lora"}, {"kind": "lora", "alpha": 32.0}, "has lora_alpha 16.0, but the"),
        ({"kind": "lora"}, {"kind": "lora", "rank": 4}, "has r 8, but the recipe's method 4"),
        ({"kind": "lora"}, {"kind": "lora", "targets": ["q_proj"]}, "has target_modules"),
    ],
)
def test_an_adapter_of_another_kind_is_refused_in_one_line(
    tmp_path: Path, alone: World, saved: dict[str, Any], wanted: dict[str, Any], words: str
) -> None:
    first = set_up(tmp_path, alone, saved)
    save_adapter(tmp_path / "adapter", first.method, first.peft, moved(first))
    second = set_up(tmp_path, alone, wanted | {"start_from": str(tmp_path / "adapter")})
    with pytest.raises(RecipeError) as refused:
        load_start(second)
    assert words in str(refused.value)
    assert "method.start_from" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_folder_that_is_not_there_is_refused_before_anything_starts(recipe_file: Path) -> None:
    for name in ("sft", "./runs/sft", "runs/sft/adapter", "../runs/sft", "/runs/sft", "~/sft"):
        with pytest.raises(
            PeftDistError,
            match=rf"start_from: '{name}' is neither a folder here nor a hub id like ORG/NAME; rel",
        ):
            load_recipe(recipe_file, [f"method.start_from={name}"])
    for name in ("org/sft-v1.2", "org/sft@main", "org/sft@refs/pr/3"):
        assert load_recipe(recipe_file, [f"method.start_from={name}"]).method.start_from == name
    (recipe_file.parent / "runs").mkdir()
    with pytest.raises(PeftDistError, match=r"'runs/sft' is neither .+: runs/ is a folder here"):
        load_recipe(recipe_file, ["method.start_from=runs/sft"])
    hub = load_recipe(recipe_file, ["method.start_from=runs/sft@main"])
    assert hub.method.start_from == "runs/sft@main"
    (recipe_file.parent / "runs" / "sft").mkdir()
    found = load_recipe(recipe_file, ["method.start_from=runs/sft"])
    assert found.method.start_from == str(recipe_file.parent / "runs" / "sft")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, alone: World) -> None:
    setup = set_up(tmp_path, alone, {"kind": "lora", "start_from": str(tmp_path)})
    with pytest.raises(RecipeError, match="holds no adapter_model.safetensors"):
        load_start(setup)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def lay_into_cache(home: Path, adapter: Path | None, *, commit: str = COMMIT) -> Path:
    """Make a hub's cache hold an adapter as `org/sft`, on its main branch; return the snapshot."""
    folder = home / "models--org--sft"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit, encoding="utf-8")
    snapshot = folder / "snapshots" / commit
    if adapter is None:
        snapshot.mkdir(parents=True)
    else:
        shutil.copytree(adapter, snapshot)
    return snapshot


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache that is all there is of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_an_adapter_of_the_hub_is_the_start_and_its_commit_is_kept(
    tmp_path: Path, alone: World, hub_cache: Path
) -> None:
    first = set_up(tmp_path, alone, {"kind": "lora"})
    state = moved(first)
    save_adapter(tmp_path / "adapter", first.method, first.peft, state)
    lay_into_cache(hub_cache, tmp_path / "adapter")
    named = first.recipe.method.model_copy(update={"start_from": "org/sft"})
    recipe = with_start_commit(first.recipe.model_copy(update={"method": named}))
    assert recipe.method.start_from == f"org/sft@{COMMIT}"
    second = set_up(tmp_path, alone, recipe.method.model_dump())
    load_start(second)
    found = second.engine.adapter_state()
    assert all(torch.equal(found[name], state[name]) for name in state)

    # the branch moves: a run goes on with what it began with
    lay_into_cache(hub_cache, None, commit=COMMIT[::-1])
    run = RunDir.create(tmp_path / "run", first.recipe)
    before = load_recipe(run.recipe)
    run.accept_recipe(start_from=recipe.method.start_from)
    after = load_recipe(run.recipe)
    assert with_start_commit(after).method.start_from == f"org/sft@{COMMIT}"
    assert after.model_copy(update={"method": before.method}) == before


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (None, "'org/sft' is neither a folder here nor a hub adapter that can be reached"),
        (("adapter_config.json", "adapter_model.bin"), "holds no adapter_model.safetensors"),
    ],
)
def test_what_the_hub_does_not_hold_in_safetensors_is_one_line(
    tmp_path: Path, hub_cache: Path, files: tuple[str, ...] | None, words: str
) -> None:
    if files is not None:
        snapshot = lay_into_cache(hub_cache, None)
        for name in files:
            (snapshot / name).write_text("{}", encoding="utf-8")
    method = {"kind": "lora", "start_from": "org/sft"}
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "rows.jsonl", method=method)
    with pytest.raises(PeftDistError, match=words) as refused:
        with_start_commit(recipe)
    assert "method.start_from: " in str(refused.value)
    assert "\n" not in str(refused.value)
