"""The objective section of a recipe: its two forms, and the settings that make no sense."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from peft_dist.common.errors import RecipeError
from peft_dist.config.load import load_recipe, render_recipe
from peft_dist.config.objective import Dpo, Objective, Sft
from peft_dist.config.recipe import Recipe

WriteRecipe = Callable[[str], Path]
KINDS = ("dpo", "ipo", "kto", "orpo", "reward", "sft", "simpo")


def test_a_recipe_without_one_is_supervised(recipe_file: Path) -> None:
    assert load_recipe(recipe_file).objective == Sft()


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_alone_is_the_section_with_its_defaults(
    recipe_file: Path, tmp_path: Path, kind: str
) -> None:
    short = load_recipe(recipe_file, [f"objective={kind}"])
    assert short == load_recipe(recipe_file, [f"objective.kind={kind}"])
    assert short.objective == TypeAdapter(Objective).validate_python({"kind": kind})
    again = tmp_path / "rendered.yaml"
    again.write_text(render_recipe(short), encoding="utf-8")
    assert load_recipe(again) == short


def test_settings_are_read_from_the_file_and_the_command_line(write_recipe: WriteRecipe) -> None:
    file = write_recipe(
        "model: {name: ./model}\ndata: {train: train.jsonl}\nobjective: {kind: dpo, beta: 0.3}\n"
    )
    found = load_recipe(file, ["objective.label_smoothing=0.1"])
    assert found.objective == Dpo(kind="dpo", beta=0.3, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["objective=dpoo"], "objective: kind 'dpoo' is not known; did you mean 'dpo'?"),
        (["objective.kind=orpo", "objective.gamma=1"], "objective.gamma: no such key"),
        (["objective.beta=1"], "objective.beta: no such key"),
        (["objective.kind=dpo", "objective.beta=0"], "objective.beta: got 0; must be a number ab"),
        (["objective.kind=kto", "objective.sft_weight=1"], "objective.sft_weight: no such key"),
        (["objective.kind=ipo", "objective.label_smoothing=.1"], "label_smoothing: no such key"),
        (["objective.kind=dpo", "objective.label_smoothing=0.5"], "label_smoothing: got 0.5; must"),
        (["objective=dpo", "model.task=sequence-classification"], "objective dpo is for causal-lm"),
        (["objective=dpo", "data.eval=train.jsonl", "evaluate.choices=[a, b]"],
         "evaluate.choices is for objective sft"),
        (["objective=reward", "method.kind=prefix"], "objective reward is not for method prefix"),
        (["objective=reward", "method.kind=prompt"], "objective reward is not for method prompt"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_refused_in_one_line(
    recipe_file: Path, settings: list[str], words: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe_file, settings)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_run_of_an_earlier_version_goes_on_where_what_it_lacks_is_off() -> None:
    from peft_dist.checkpoint.run_identity import refuse_another_run
    from peft_dist.common.errors import RunDirError
    from peft_dist.config.resume_rules import learning_settings

    raw = {"model": {"name": "m"}, "data": {"train": "t"}}
    now = {"content": {}, "recipe": learning_settings(Recipe.model_validate(raw))}
    old = {"content": {}, "recipe": dict(now["recipe"])}
    for field in ("objective.kind", "method.modules_to_save", "method.rank_pattern"):
        old["recipe"].pop(field, None)  # what is off now was off when there was no field for it
    refuse_another_run(old, now, (), where="run")
    before = {"content": {}, "recipe": dict(old["recipe"])}
    del before["recipe"]["model.dropout"]  # the base's own was on
    with pytest.raises(RunDirError, match="model.dropout .*: as-configured before, off now"):
        refuse_another_run(before, now, (), where="run")
    other = learning_settings(Recipe.model_validate(raw | {"objective": "dpo"}))
    with pytest.raises(RunDirError, match=r"objective\.beta .*objective\.kind"):
        refuse_another_run(old, {"content": {}, "recipe": other}, (), where="run")


def test_rows_that_an_earlier_version_read_otherwise_are_not_said_to_have_changed_alone() -> None:
    from peft_dist.checkpoint.run_identity import refuse_another_run
    from peft_dist.common.errors import RunDirError

    now = {"content": {"data.train": "new"}, "recipe": {}, "rows_format": 2}
    same = now | {"content": {"data.train": "old"}}
    earlier = {"content": {"data.train": "old"}, "recipe": {}}
    for saved, told in ((same, False), (earlier, True)):
        with pytest.raises(RunDirError, match="data.train .*: old before, new now") as refused:
            refuse_another_run(saved, now, (), where="run")
        assert ("of an earlier version" in str(refused.value)) is told


def test_a_run_that_began_before_there_was_a_setting_goes_on_with_its_default() -> None:
    """Whoever adds a field whose default is not off says in EARLIER what was done before."""
    from peft_dist.checkpoint.run_identity import refuse_another_run
    from peft_dist.config.resume_rules import learning_settings

    raw = {"model": {"name": "m", "dropout": "as-configured"}, "data": {"train": "t"}}
    now = learning_settings(Recipe.model_validate(raw))
    saved = {field: value for field, value in now.items() if field in AT_FIRST}
    assert saved.keys() == AT_FIRST
    refuse_another_run(
        {"content": {}, "recipe": saved}, {"content": {}, "recipe": now}, (), where="run"
    )


AT_FIRST = {
    "method.alpha", "method.bias", "method.dora", "method.dropout", "method.init", "method.kind",
    "method.learning_rate_ratio", "method.rank", "method.rslora", "method.targets", "model.dtype",
    "model.task", "quantization", "train.betas", "train.epochs", "train.epsilon",
    "train.global_batch_size", "train.learning_rate", "train.max_grad_norm", "train.schedule",
    "train.seed", "train.steps", "train.warmup_fraction", "train.weight_decay",
}  # fmt: skip
"""The fields of LoRA and SFT that checkpoints have had from the beginning."""
