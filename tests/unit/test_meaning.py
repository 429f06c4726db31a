"""Every key of a recipe means something, or is refused: derived from the schema."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from peft_dist.common.errors import RecipeError
from peft_dist.config import load_recipe, render_recipe
from peft_dist.config.explain import _sections
from peft_dist.config.meaning import CONDITIONS
from peft_dist.config.recipe import Recipe
from peft_dist.config.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[2]
Write = Callable[[str], Path]
HELD = "data.eval=train.jsonl"
PREFIX = "method.kind=prefix"

# A key stands here where it has an effect whatever the others say, or where its section refuses
# it. A new key belongs here or into CONDITIONS: whoever adds it says which.
ALWAYS = re.findall(
    r"\S+",
    """
model.name model.task model.dropout model.dtype model.attention model.compile model.fp8
quantization
method.lora.kind method.lora.rank method.lora.alpha method.lora.dropout method.lora.targets
method.lora.target_parameters
method.lora.init method.lora.learning_rate_ratio method.lora.rslora method.lora.dora
method.lora.bias method.lora.extra
method.lora.exclude_modules method.lora.layers_to_transform method.lora.rank_pattern
method.lora.alpha_pattern method.lora.modules_to_save method.lora.trainable_tokens
method.bottleneck.kind method.bottleneck.placement method.bottleneck.bottleneck_size
method.bottleneck.reduction_factor method.bottleneck.activation method.bottleneck.residual
method.bottleneck.dropout method.prefix.kind method.prefix.virtual_tokens method.prefix.projection
method.prompt.kind method.prompt.virtual_tokens method.prompt.init method.prompt.text
method.bitfit.kind method.bitfit.targets method.bitfit.add_bias method.peft.kind method.peft.type
data.train data.eval data.train_split data.max_length data.truncation data.packing data.streaming
data.max_bad_rows data.date data.template data.columns.prompt data.columns.completion
data.columns.text data.columns.messages data.columns.chosen data.columns.rejected data.columns.label
objective.sft.kind objective.dpo.kind objective.dpo.beta objective.dpo.label_smoothing
objective.dpo.length_normalised
objective.dpo.sft_weight objective.ipo.kind objective.ipo.beta objective.ipo.sft_weight
objective.kto.kind objective.kto.beta objective.kto.desirable_weight
objective.kto.undesirable_weight objective.orpo.kind objective.orpo.beta objective.simpo.kind
objective.simpo.beta objective.simpo.gamma objective.simpo.label_smoothing
objective.simpo.sft_weight objective.reward.kind objective.reward.center
method.lora.start_from method.bottleneck.start_from method.prefix.start_from
method.prompt.start_from method.bitfit.start_from method.peft.start_from
train.steps train.epochs train.global_batch_size train.global_batch_tokens
train.micro_batch_size train.learning_rate train.warmup_fraction train.schedule train.betas
train.epsilon train.max_grad_norm train.activation_checkpointing train.non_finite train.seed
train.deterministic
evaluate.every_steps evaluate.choices parallel.strategy parallel.processes parallel.shard_size
parallel.max_restarts parallel.offload parallel.reshard
parallel.dequantized_blocks
checkpoint.every_steps checkpoint.every_seconds
checkpoint.keep_last checkpoint.keep_best checkpoint.background checkpoint.max_failed_saves
watchdog.min_s watchdog.setup_s watchdog.save_s tracking.wandb.mode tracking.wandb.project
tracking.wandb.entity tracking.wandb.group tracking.wandb.tags tracking.wandb.wait_s
tracking.system_every_s profile.steps
""",
)

# For each condition: a value that is no default, overrides without which it has no meaning, and
# overrides that give it one.
EXAMPLES: dict[str, tuple[str, list[str], list[str]]] = {
    "model.revision": ("v1", [], ["model.name=someone/model"]),
    "method.lora.init_rows": ("8", [], ["method.init=eva"]),
    "method.lora.fused": ("auto", ["quantization=none"], ["quantization=nf4"]),
    "method.prefix.init": ("vocabulary", [PREFIX, "method.projection=true"], [PREFIX]),
    "method.prefix.text": ("a cat", [PREFIX, "method.projection=true"], [PREFIX]),
    "method.prefix.projection_size": ("16", [PREFIX], [PREFIX, "method.projection=true"]),
    "data.eval_split": ("dev", [], [HELD]),
    "train.weight_decay": ("0.1", ["method.kind=bitfit"], []),
    "train.optimizer": ("muon", ["method.kind=bitfit"], []),
    "train.max_skipped_steps": ("3", ["train.non_finite=stop"], []),
    "profile.ranks": ("[1]", [], ["profile.steps=[1,2]"]),
    "evaluate.at_start": ("false", [], [HELD]),
    "evaluate.max_rows": ("5", [], [HELD]),
    "evaluate.samples": ("2", [], [HELD]),
    "evaluate.sample_tokens": ("5", [HELD, "evaluate.samples=0"], [HELD]),
    "evaluate.micro_batch_size": ("2", [], [HELD]),
    "watchdog.evaluation_s": ("5", [], [HELD]),
    "tracking.system_nodes": ("true", ["tracking.system_every_s=null"], []),
}


def keys(section: type[BaseModel], path: str = "") -> Iterator[str]:
    """Yield every key of a section by its dotted path; of several sections, with their kinds."""
    for name, field in section.model_fields.items():
        inner = _sections(field.annotation)
        if not inner:
            yield f"{path}{name}"
        for one in inner:
            kind = ""
            if len(inner) > 1:
                (kind,) = one.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
                kind += "."
            yield from keys(one, f"{path}{name}.{kind}")


def test_every_key_says_when_it_has_an_effect() -> None:
    found = list(keys(Recipe))
    assert len(found) == len(set(found)) > 60
    assert sorted([*ALWAYS, *CONDITIONS]) == sorted(found)
    assert EXAMPLES.keys() == CONDITIONS.keys()


def test_every_key_is_read_by_the_program() -> None:
    """A key that stands in the schema alone would do nothing, whatever its condition says."""
    package = ROOT / "peft_dist"
    schema = {package / "config" / name for name in ("recipe.py", "method.py", "meaning.py")}
    source = "\n".join(
        file.read_text(encoding="utf-8") for file in package.rglob("*.py") if file not in schema
    )
    unread = [key for key in keys(Recipe) if not re.search(rf"\.{key.split('.')[-1]}\b", source)]
    assert unread == []


@pytest.mark.parametrize("key", CONDITIONS)
def test_a_setting_without_effect_is_refused_and_one_with_effect_is_not(
    recipe_file: Path, tmp_path: Path, key: str
) -> None:
    value, useless, useful = EXAMPLES[key]
    parts = key.split(".")
    field = ".".join([parts[0], parts[-1]])
    assert load_recipe(recipe_file, useless), "the others alone are no fault"
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [*useless, f"{field}={value}"])
    assert re.fullmatch(
        rf"{re.escape(str(recipe_file))}: {field}: has no meaning here: .+; remove it",
        str(caught.value),
    )
    recipe = load_recipe(recipe_file, [*useful, f"{field}={value}"])
    owner: Any = getattr(recipe, parts[0])
    assert owner.model_dump(mode="json")[parts[-1]] == parse_yaml(value, where=key)


def test_defaults_that_a_run_directory_writes_out_are_no_fault(
    recipe_file: Path, tmp_path: Path
) -> None:
    for overrides in ([], [PREFIX, "method.projection=true"], ["method.kind=bitfit"]):
        recipe = load_recipe(recipe_file, overrides)
        (tmp_path / "recipe.yaml").write_text(render_recipe(recipe), encoding="utf-8")
        assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_recipe_that_nothing_is_trained_by_is_read_as_it_is(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file, ["evaluate.max_rows=5"], check_paths=False)
    assert recipe.evaluate.max_rows == 5
