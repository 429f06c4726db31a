"""Which settings mean something beside the others of a recipe; one that nothing reads is refused.

Somebody who writes a setting believes in its effect. What only a loaded model or a launcher can
tell (biases that are not there, a strategy that has no shards) is refused where that is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RecipeError
from peft_dist.config.recipe import Recipe


@dataclass(frozen=True)
class Condition:
    """When a setting has an effect."""

    holds: Callable[[Recipe], bool]
    otherwise: str
    """Why it has none where the condition does not hold; continues `has no meaning here: `."""


def _writes_on(recipe: Recipe) -> bool:
    classify = recipe.model.task == "sequence-classification"
    return not (classify or recipe.evaluate.choices) and recipe.evaluate.samples > 0


def _learns_by_network(recipe: Recipe) -> bool:
    return bool(getattr(recipe.method, "projection", False))


def _trains_vectors_alone(recipe: Recipe) -> bool:
    return recipe.method.kind == "bitfit" and recipe.model.task == "causal-lm"


def _updates_weights_of_4_bits(recipe: Recipe) -> bool:
    plain = not getattr(recipe.method, "dora", False) and not getattr(recipe.method, "dropout", 0.0)
    return recipe.quantization == "nf4" and plain


_HELD_OUT = Condition(lambda r: r.data.eval is not None, "there is no data.eval")
_OWN_START = Condition(
    lambda r: not _learns_by_network(r), "with projection: true a network makes the prefix"
)

CONDITIONS: dict[str, Condition] = {
    "model.revision": Condition(
        lambda r: not Path(r.model.name).is_absolute(), "model.name is a folder, not a hub id"
    ),
    "method.lora.init_rows": Condition(
        lambda r: bool(getattr(r.method, "starts_from_rows", False)),
        "method.init looks at no rows",
    ),
    "method.lora.fused": Condition(
        _updates_weights_of_4_bits, "it is for a base in 4 bits, without dora and dropout"
    ),
    "method.prefix.init": _OWN_START,
    "method.prefix.text": _OWN_START,
    "method.prefix.projection_size": Condition(_learns_by_network, "projection is off"),
    "data.eval_split": _HELD_OUT,
    "train.weight_decay": Condition(
        lambda r: not _trains_vectors_alone(r), "biases never decay, and nothing else is trained"
    ),
    "train.optimizer": Condition(
        lambda r: not _trains_vectors_alone(r), "there is no matrix to update, AdamW has vectors"
    ),
    "train.max_skipped_steps": Condition(
        lambda r: r.train.non_finite != "stop", "with non_finite: stop no step is skipped"
    ),
    "profile.ranks": Condition(lambda r: r.profile.steps is not None, "profile.steps is off"),
    "evaluate.at_start": _HELD_OUT,
    "evaluate.max_rows": _HELD_OUT,
    "evaluate.samples": _HELD_OUT,
    "evaluate.sample_tokens": Condition(
        lambda r: r.data.eval is not None and _writes_on(r),
        "nothing is written without data.eval and samples, or where there are choices or classes",
    ),
    "evaluate.micro_batch_size": _HELD_OUT,
    "watchdog.evaluation_s": _HELD_OUT,
    "tracking.system_nodes": Condition(
        lambda r: bool(r.tracking.system_every_s), "tracking.system_every_s is off"
    ),
}
"""By dotted field; that of a method by its kind. Every other setting always has an effect, or is
refused by its section where it has none."""


def refuse_meaningless(recipe: Recipe, where: str) -> None:
    """Refuse the first setting with another value than its default that nothing would read.

    Args:
        recipe: With its paths made absolute.
        where: The file it is from.

    Raises:
        RecipeError: Naming the field, and why it has no effect.
    """
    for name, condition in CONDITIONS.items():
        *sections, field = name.split(".")
        if sections[0] == "method" and recipe.method.kind != sections.pop():
            continue
        owner: Any = recipe
        for section in sections:
            owner = getattr(owner, section)
        if is_set(owner, field) and not condition.holds(recipe):
            raise RecipeError(
                f"has no meaning here: {condition.otherwise}",
                where=f"{where}: {'.'.join([*sections, field])}",
                remedy="remove it",
            )


def is_set(section: Any, field: str) -> bool:
    """Whether a field has another value than its default.

    A run directory's recipe has every default written out, so what was typed cannot be asked.
    """
    default = type(section).model_fields[field].get_default(call_default_factory=True)
    return bool(getattr(section, field) != default)
