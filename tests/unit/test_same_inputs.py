"""What ranks compare before they train together."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.checkpoint.same_inputs import Inputs, describe_inputs, first_difference
from peft_dist.config.recipe import Recipe
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.model.weights import WeightFiles
from tests.tiny import completion_rows, tiny_model, tiny_recipe, tiny_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_model(folder / "model", "llama")
    for name, seed in (("train", 0), ("eval", 1), ("other", 2)):
        write_jsonl(folder / f"{name}.jsonl", completion_rows(6, seed=seed))
    return folder


def recipe_of(folder: Path, **names: str) -> Recipe:
    """Return the recipe with other files, by the field that names them."""
    model, train = folder / names.get("model", "model"), names.get("train", "train.jsonl")
    held = str(folder / names.get("eval", "eval.jsonl"))
    return tiny_recipe(model, folder / train, data={"eval": held})


def read(folder: Path, recipe: Recipe) -> Inputs:
    cache = folder / "cache"
    rows = {f"data.{w}": tokenize_rows(recipe, w, cache) for w in ("train", "eval")}
    return describe_inputs(recipe, rows, WeightFiles(Path(recipe.model.name)), torch.float32)


def difference(*inputs: Inputs) -> str:
    hosts = [{"host": f"n{rank}", "inputs": one} for rank, one in enumerate(inputs)]
    return first_difference(hosts) or ""


def with_other_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    last = sorted(tensors)[-1]
    tensors[last] = tensors[last] + 0.01
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def with_other_types(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halved, model / "model.safetensors", metadata={"format": "pt"})


def with_other_config(model: Path) -> None:
    text = (model / "config.json").read_text(encoding="utf-8")
    (model / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )


def with_other_template(model: Path) -> None:
    tiny_tokenizer(model, chat_template="{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.name", with_other_weights),
        ("model.name", with_other_types),
        ("config.json", with_other_config),
        ("tokenizer", with_other_template),
    ],
)
def test_another_model_is_told(
    made: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    recipe = recipe_of(made).model_copy(update={"model": recipe_of(tmp_path).model})
    same = read(made, recipe)
    assert difference(read(made, recipe_of(made)), same) == "", "a copy is the same model"
    change(tmp_path / "model")
    line = difference(same, read(made, recipe))
    assert line.startswith(f"rank 1 on host n1 has another {name} than rank 0 on host n0: ")


@pytest.mark.parametrize("which", ["train", "eval"])
def test_other_rows_are_told(made: Path, which: str) -> None:
    first = read(made, recipe_of(made))
    line = difference(first, first, read(made, recipe_of(made, **{which: "other.jsonl"})))
    assert line.startswith(f"rank 2 on host n2 has another data.{which} than rank 0 on host n0: 6 ")


def test_held_out_rows_that_one_rank_lacks_are_told(made: Path) -> None:
    first = read(made, recipe_of(made))
    assert "data.eval than rank 0 on host n0: none, not 6 rows" in difference(
        first, first | {"data.eval": "none"}
    )


def test_every_setting_and_package_is_compared_but_where_files_lie(made: Path) -> None:
    first = read(made, recipe_of(made))
    recipe = recipe_of(made)
    for section, field, value in (
        ("train", "seed", 7),
        ("data", "max_length", 99),
        ("checkpoint", "every_steps", 5),
        ("parallel", "strategy", "ddp"),
    ):
        part = getattr(recipe, section).model_copy(update={field: value})
        other = read(made, recipe.model_copy(update={section: part}))
        assert f"another {section}.{field} than" in difference(first, other)
    assert "another package torch than" in difference(first, first | {"package torch": "2.0"})
    moved = made / "moved.jsonl"
    shutil.copy(made / "train.jsonl", moved)
    assert difference(first, read(made, recipe_of(made, train="moved.jsonl"))) == ""


def test_the_others_are_counted(made: Path) -> None:
    first = read(made, recipe_of(made))
    other = first | {"train.seed": "1"}
    assert "0 (and 1 more ranks)" in difference(first, other, other)
