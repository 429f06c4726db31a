"""Keys of other tools: each gets the answer that is true here, and names a real key."""

import re
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import RecipeError
from peft_dist.config import load_recipe
from peft_dist.config.explain import _paths
from peft_dist.config.recipe import Recipe
from peft_dist.config.synonyms import SYNONYMS


def error_of(recipe: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


def test_every_answer_names_settings_that_there_are() -> None:
    known = set(_paths(Recipe, ""))
    for theirs, answer in SYNONYMS.items():
        named = re.findall(r"\b[a-z]+(?:\.[a-z_]+)+\b|^quantization", answer)
        assert named or "nothing:" in answer or "--run-dir" in answer, theirs
        assert set(named) <= known, theirs
        assert theirs.lower() == theirs and theirs not in {path for path in known if path in named}


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("lr=1e-4", "train.learning_rate"),
        ("learning_rate=1e-4", "train.learning_rate"),
        ("train.lr=1e-4", "train.learning_rate"),
        ("num_train_epochs=1", "train.epochs"),
        ("method.r=8", "method.rank"),
        ("method.lora_r=8", "method.rank"),
        ("method.lora-r=8", "method.rank"),
        ("gradient_accumulation_steps=2", "train.global_batch_size"),
        ("per_device_train_batch_size=2", "train.micro_batch_size"),
        ("train.batch_size=2", "train.global_batch_size (rows per step) and train.micro_batch"),
        ("bf16=true", "model.dtype: bfloat16"),
        ("fp16=true", "model.dtype: float16"),
        ("max_seq_length=512", "data.max_length"),
        ("output_dir=x", "the option --run-dir"),
        ("method.learning_rate=1", "train.learning_rate"),
        ("train.rank=8", "method.rank"),
    ],
)
def test_a_key_of_another_tool_is_answered_with_ours(
    recipe_file: Path, given: str, answer: str
) -> None:
    assert f"no such key; here that is {answer}" in error_of(recipe_file, given)
    key, _, value = given.partition("=")
    if "." not in key:  # the same in the file itself
        recipe_file.write_text(f"{recipe_file.read_text()}\n{key}: {value}\n", encoding="utf-8")
        assert f"no such key; here that is {answer}" in error_of(recipe_file)


def test_a_setting_of_another_kind_of_method_is_answered_with_what_this_one_has(
    recipe_file: Path,
) -> None:
    told = error_of(recipe_file, "method={kind: prompt, rank: 8, alpha: 16, dropout: 0.1}")
    assert "method.rank: no such key; valid: init, kind, start_from, text, virtual_tokens" in told
    assert "(also wrong: method.alpha, method.dropout)" in told


def test_a_slip_of_the_pen_still_gets_the_nearest_name(recipe_file: Path) -> None:
    assert "did you mean 'schedule'?" in error_of(recipe_file, "train.shedule=linear")


def test_a_key_that_is_given_two_values_is_not_decided_without_a_word(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["validate", str(recipe_file), "train.seed=1", "train.seed=2"]
    assert main(words) == 0
    told = "train.seed is given 2 times; the last one counts: '2' (to train each: --array "
    assert f"{told}train.seed=1,2)" in capsys.readouterr().err
    assert main([*words[:3], "train.seed=1"]) == 0
    assert capsys.readouterr().err == ""
