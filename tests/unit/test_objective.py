"""Learning from preferences: one process, from rows to a trained adapter."""

import math
from pathlib import Path
from typing import Any

import pytest

from peft_dist.data.tokenize import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.evaluation.scoring import EvalSet, make_eval_set
from peft_dist.ledger.events import LedgerEvent
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.objective.reference import reference_scores
from peft_dist.trainer import Trainer
from tests.tiny import preference_rows, tiny_model, tiny_recipe, write_jsonl

REFERENCED = ("dpo", "ipo", "kto")
PAIRED = ("dpo", "ipo", "orpo", "simpo")


class Records(list[dict[str, Any]]):
    """A tracker that keeps what the ledger would hold."""

    def write(self, event: LedgerEvent) -> None:
        """Keep one."""
        self.append(event.fields())

    def close(self) -> None:
        """Nothing is held back."""

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the events of a kind."""
        return [record for record in self if record["event"] == event]


def trainer(folder: Path, world: World, kind: str, **sections: Any) -> Trainer:
    """Return a trainer of an objective, its reference scored."""
    if not (folder / "llama").is_dir():
        tiny_model(folder / "llama", "llama")
    sections["objective"] = {"kind": kind, **sections.get("objective", {})}
    sections.setdefault("train", {"steps": 20, "global_batch_size": 8, "learning_rate": 5e-3})
    form = "judged" if kind == "kto" else "pair"
    held = write_jsonl(folder / f"{form}-eval.jsonl", preference_rows(7, form, seed=1))
    rows_file = write_jsonl(folder / f"{form}.jsonl", preference_rows(24, form))
    recipe = tiny_recipe(folder / "llama", rows_file, data={"eval": str(held)}, **sections)
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    rows = tokenize_rows(recipe, "train", folder / "cache" / "rows")
    eval_set = make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "cache" / "rows"))
    reference = None
    if recipe.objective.has_reference:
        cache = folder / "cache" / "reference"
        reference = reference_scores(setup, rows, cache)
        held_scores = reference_scores(setup, eval_set.rows, cache)
        eval_set = EvalSet(eval_set.rows, (), None, held_scores)
    return Trainer(setup, rows, eval_set, reference=reference)


@pytest.mark.parametrize("kind", [*PAIRED, "kto"])
def test_an_objective_learns_what_its_rows_prefer(tmp_path: Path, alone: World, kind: str) -> None:
    found = trainer(tmp_path, alone, kind)
    records = Records()
    found.trackers = [records]
    outcome = found.run()
    steps = records.of("step")
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["reward_margin"] > steps[0]["reward_margin"]
    assert outcome.first is not None and outcome.last is not None
    assert outcome.last.loss < outcome.first.loss
    first, last = records.of("evaluation")
    assert last["eval_reward_margin"] > first["eval_reward_margin"]
    if kind in PAIRED:
        assert last["eval_accuracy"] == 1.0
        assert all(0 <= step["reward_accuracy"] <= 1 for step in steps)


@pytest.mark.parametrize("kind", REFERENCED)
@pytest.mark.parametrize(
    "method",
    [{"kind": "lora"}, {"kind": "prefix", "virtual_tokens": 3}, {"kind": "prompt"}],
    ids=lambda method: str(method["kind"]),
)
def test_the_reference_is_the_model_as_training_starts_it(
    tmp_path: Path, alone: World, kind: str, method: dict[str, Any]
) -> None:
    found = trainer(tmp_path, alone, kind, method=method, train={"steps": 1})
    records = Records()
    found.trackers = [records]
    found.run()
    (step,) = records.of("step")
    start = {"dpo": math.log(2), "ipo": (1 / 0.2) ** 2, "kto": 0.5}[kind]
    assert step["loss"] == pytest.approx(start, abs=1e-4)
    assert step["reward_chosen"] == pytest.approx(0.0, abs=1e-5)
