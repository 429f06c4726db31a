"""The loss of each source in a mixture, as the ledger has it."""

from pathlib import Path
from typing import Any

import pytest

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.ledger.events import LedgerEvent
from peft_dist.ledger.read_event import from_fields
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.trainer import Trainer
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl


class Steps(list[dict[str, Any]]):
    """A tracker that keeps the steps."""

    def write(self, event: LedgerEvent) -> None:
        """Keep one, as a line of the ledger could hold it."""
        if event.event == "step":
            self.append(from_fields(event.fields()).fields())

    def close(self) -> None:
        """Nothing is held back."""


def steps_of(folder: Path, world: World, train: Any, *, rows: int, steps: int = 1) -> Steps:
    settings = {"steps": steps, "global_batch_size": rows, "micro_batch_size": 4}
    recipe = tiny_recipe(
        folder / "llama", folder, data={"train": train}, train=settings, quantization="none"
    )
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    trained = Trainer(setup, tokenize_rows(recipe, "train", folder / "cache"), None)
    found = Steps()
    trained.trackers = [found]
    trained.run()
    return found


def test_the_loss_of_a_source_is_what_it_would_be_alone(tmp_path: Path, alone: World) -> None:
    tiny_model(tmp_path / "llama", "llama")
    rows = completion_rows(20)
    paths = [
        str(write_jsonl(tmp_path / f"{at}.jsonl", part))
        for at, part in enumerate((rows[:5], rows[5:]))
    ]
    (mixed,) = steps_of(tmp_path, alone, [{"path": path} for path in paths], rows=20)
    own = [
        steps_of(tmp_path, alone, path, rows=count)[0]
        for path, count in zip(paths, (5, 15), strict=True)
    ]
    assert mixed["source_loss"] == pytest.approx([step["loss"] for step in own], rel=1e-5)
    assert own[0]["loss"] != pytest.approx(own[1]["loss"], rel=1e-3)
    assert all("source_loss" not in step for step in own)


def test_a_source_without_a_row_in_a_step_has_no_loss(tmp_path: Path, alone: World) -> None:
    tiny_model(tmp_path / "llama", "llama")
    path = str(write_jsonl(tmp_path / "rows.jsonl", completion_rows(3)))
    train = [{"path": path}, {"path": path, "rows": 1}]
    found = steps_of(tmp_path, alone, train, rows=1, steps=4)
    for step in found:
        (loss,) = [loss for loss in step["source_loss"] if loss is not None]
        assert loss == pytest.approx(step["loss"])
    assert sum(step["source_loss"][1] is not None for step in found) == 1
