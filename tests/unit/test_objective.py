"""Learning from preferences: one process, from rows to a trained adapter."""

import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from peft_dist.checkpoint.checkpointer import Checkpointer
from peft_dist.checkpoint.start import load_start
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.data.tokenize import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.evaluation.scoring import EvalSet, make_eval_set
from peft_dist.ledger.events import LedgerEvent
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.objective import reference
from peft_dist.trainer import Trainer
from tests.tiny import preference_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl

PAIRED = ("dpo", "ipo", "orpo", "simpo", "reward")


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


def trainer(
    folder: Path, world: World, kind: str, *, packing: bool | None = None, **sections: Any
) -> Trainer:
    """Return a trainer of an objective, its reference scored."""
    if not (folder / "llama").is_dir():
        tiny_model(folder / "llama", "llama")
    sections["objective"] = {"kind": kind, **sections.get("objective", {})}
    sections.setdefault("train", {"steps": 20, "global_batch_size": 8, "learning_rate": 5e-3})
    form = "judged" if kind == "kto" else "pair"
    held = write_jsonl(folder / f"{form}-eval.jsonl", preference_rows(7, form, seed=1))
    rows_file = write_jsonl(folder / f"{form}.jsonl", preference_rows(24, form))
    recipe = tiny_recipe(
        folder / "llama", rows_file, data={"eval": str(held), "packing": packing}, **sections
    )
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    rows = tokenize_rows(recipe, "train", folder / "cache" / "rows")
    eval_set = make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "cache" / "rows"))
    load_start(setup)
    scores = None
    if recipe.objective.has_reference:
        cache = folder / "cache" / "reference"
        scores = reference.reference_scores(setup, rows, cache)
        held_scores = reference.reference_scores(setup, eval_set.rows, cache)
        eval_set = EvalSet(eval_set.rows, (), None, held_scores)
    return Trainer(setup, rows, eval_set, reference=scores)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("dpo", {"kind": "lora"}),
        ("dpo", {"kind": "prefix", "virtual_tokens": 3}),
        ("dpo", {"kind": "prompt"}),
        ("ipo", {"kind": "bottleneck"}),
        ("kto", {"kind": "prefix", "virtual_tokens": 3}),
    ],
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "packing"),
    [
        ({"kind": "lora"}, True),
        ({"kind": "lora"}, False),
        ({"kind": "bottleneck"}, True),
        ({"kind": "bitfit", "add_bias": True}, True),
    ],
)
def test_a_reward_model_is_read_by_plain_peft_to_the_same_rewards(
    tmp_path: Path, alone: World, method: dict[str, Any], packing: bool
) -> None:
    found = trainer(
        tmp_path, alone, "reward", method=method, quantization="none", packing=packing,
        train={"steps": 4, "learning_rate": 1e-2},
    )  # fmt: skip
    saver = AdapterSaver(found.setup, found.rows)
    saver.prove()
    found.run()
    saver.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head that the base lacks
        plain = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "llama", num_labels=1),
            str(tmp_path / "adapter"),
        ).eval()
    rows, setup = found.rows, found.setup
    setup.model.eval()
    with torch.no_grad():
        batch = setup.pack(rows, np.arange(6))
        ours = -setup.model(batch).nll
        for row in range(6):
            tokens = torch.tensor(rows.tokens[rows.offsets[row] : rows.offsets[row + 1]])
            assert plain(input_ids=tokens[None].long()).logits.item() == pytest.approx(
                float(ours[row]), abs=1e-5
            )
    assert ours.std() > 0.01


def test_training_that_starts_from_an_adapter_has_it_for_reference(
    tmp_path: Path, alone: World
) -> None:
    first = trainer(tmp_path, alone, "orpo")
    first.run()
    learned, saved = first.setup, tmp_path / "run" / "adapter"
    save_adapter(saved, learned.method, learned.peft, learned.engine.adapter_state())
    method = {"start_from": str(tmp_path / "run")}
    second = trainer(tmp_path, alone, "dpo", method=method, train={"steps": 1})
    records = Records()
    second.trackers = [records]
    second.run()
    (step,) = records.of("step")
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-4)


def with_checkpoints(found: Trainer, folder: Path) -> Checkpointer:
    """Let a training make checkpoints in a folder."""
    found.checkpointer = Checkpointer(
        AdapterSaver(found.setup, found.rows),
        folder,
        found.recipe.checkpoint,
        attempt=1,
        facts={},
        may_publish=lambda: None,
        sync_ledger=lambda: None,
    )
    return found.checkpointer


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("cached", [True, False], ids=["reference cached", "reference lost"])
def test_a_resumed_training_is_bit_identical(
    tmp_path: Path, alone: World, kind: str, cached: bool
) -> None:
    sections: dict[str, Any] = {
        "train": {"steps": 5, "global_batch_size": 4, "micro_batch_size": 2},
        "checkpoint": {"every_steps": 3, "background": False},
    }
    whole = trainer(tmp_path, alone, kind, **sections)
    checkpointer = with_checkpoints(whole, tmp_path / "checkpoints")
    records = Records()
    whole.trackers = [records]
    whole.run()
    if not cached:
        shutil.rmtree(tmp_path / "cache" / "reference")
    again = trainer(tmp_path, alone, kind, **sections)
    checkpointer = with_checkpoints(again, tmp_path / "checkpoints")
    newest = checkpointer.newest()
    assert newest is not None
    later = Records()
    again.trackers = [later]
    again.resume(newest)
    assert again.progress.step == 3
    again.run()
    for name, tensor in whole.setup.engine.adapter_state().items():
        assert torch.equal(again.setup.engine.adapter_state()[name], tensor), name
    figures = ("loss", "reward_chosen", "reward_margin", "grad_norm")
    for before, after in zip(records.of("step")[3:], later.of("step"), strict=True):
        assert [before[name] for name in figures] == [after[name] for name in figures]


def test_a_reference_that_was_interrupted_goes_on_where_it_was(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "ROWS_PER_FILE", 10)
    found = trainer(tmp_path, alone, "dpo")
    cache = tmp_path / "other"
    batches = 0

    def killed() -> None:
        nonlocal batches
        batches += 1
        if batches > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference.reference_scores(found.setup, found.rows, cache, on_batch=killed)
    (folder,) = cache.iterdir()
    kept = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert kept.keys() == {"0.json", "10.json", "20.json"}
    (folder / "10.json").write_bytes(kept["10.json"].replace(b".", b",", 1))  # damaged
    scored: list[int] = []
    scores = reference.reference_scores(
        found.setup, found.rows, cache, on_batch=lambda: scored.append(1)
    )
    assert len(scored) == 3  # rows 10 to 19, 30 to 39 and 40 to 47
    assert (folder / "10.json").read_bytes() == kept["10.json"]
    again = reference.reference_scores(found.setup, found.rows, cache, on_batch=killed)
    assert (again == scores).all()


def test_the_reference_of_another_start_is_another(tmp_path: Path, alone: World) -> None:
    found = trainer(tmp_path, alone, "dpo")
    cache = tmp_path / "other"
    at_start = reference.reference_scores(found.setup, found.rows, cache)
    state = {n: t + 0.01 for n, t in found.setup.engine.adapter_state().items()}
    found.setup.engine.load_adapter_state(state)
    moved = reference.reference_scores(found.setup, found.rows, cache)
    assert len(list(cache.iterdir())) == 2
    assert abs(moved - at_start).max() > 1e-3
