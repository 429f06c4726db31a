"""How many rows fit into a pass: measured before the first step, kept by every later start."""

import json
import random
from pathlib import Path

import pytest
import torch

from peft_dist.config import Recipe, load_recipe
from peft_dist.distributed.world import World
from peft_dist.micro_batch import MOMENT_BYTES, USABLE, fit_micro_batch, most_that_fit
from peft_dist.run.directory import RunDir
from peft_dist.run.prediction import (
    MEASURES_ROWS,
    Prediction,
    as_measured,
    measures_rows,
    note_measured_rows,
    write_prediction,
)
from peft_dist.simulation.meter import Meter
from tests.unit.test_trainer import trainer


class LiveTensors:
    """Bytes of the tensors that operations make, as a meter of memory: what a GPU would hold."""

    def __init__(self, meter: Meter, limit_bytes: int) -> None:
        self._meter, self._limit_bytes, self._trial = meter, limit_bytes, 0

    def begin(self) -> int:
        """Count from here."""
        self._trial += 1
        self._meter.phase = str(self._trial)
        return self._meter.live_bytes

    def peak_bytes(self) -> int:
        """Return the most since then."""
        return self._meter.peak_bytes[self._meter.phase]

    def limit_bytes(self) -> int:
        """Return what the test allows."""
        return self._limit_bytes


TRAIN = {"global_batch_size": 8, "micro_batch_size": 2, "steps": 2}


def test_rows_are_fitted_to_what_passes_take_and_nothing_of_the_trials_stays(
    tmp_path: Path, alone: World
) -> None:
    found = trainer(tmp_path, alone, train=TRAIN)
    with Meter() as meter:
        free = fit_micro_batch(found, LiveTensors(meter, 1 << 40))
    assert free.tried == [1, 2, 4, 8] and free.chosen == 8
    assert free.peak_memory_bytes is not None
    assert sorted(free.peak_memory_bytes) == free.peak_memory_bytes
    assert found.setup.engine.gradients.abs().sum() == 0
    moments = MOMENT_BYTES * sum(parameter.numel() for parameter in found.setup.adapter.values())
    # Room for twice what 2 rows take, and not for twice what 4 do.
    tight = trainer(tmp_path / "tight", alone, train=TRAIN)
    with Meter() as meter:
        event = fit_micro_batch(
            tight, LiveTensors(meter, int(sum(free.peak_memory_bytes[1:3]) / USABLE) - moments)
        )
    assert (event.planned, event.chosen, event.tried) == (2, 4, [1, 2, 4])
    tight.run()
    fixed = trainer(tmp_path / "fixed", alone, train={**TRAIN, "micro_batch_size": 4})
    fixed.run()
    state, expected = (one.setup.engine.adapter_state() for one in (tight, fixed))
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("seed", range(20))
def test_no_trial_that_the_ones_before_warn_of_is_made(seed: int) -> None:
    source = random.Random(seed)
    held = source.randrange(100)
    fixed, slope = source.randrange(100), source.randrange(1, 50)
    limit, most = held + source.randrange(200, 3000), 1 << source.randrange(1, 8)

    def peak(rows: int) -> int:
        return held + max(fixed + slope * rows, slope * rows * 3 // 2)

    found = most_that_fit(peak, held_bytes=held, limit_bytes=limit, guess=1, most=most)
    assert max(found.peaks.values()) <= limit or found.rows == 1
    doubled = held + 2 * (peak(found.rows) - held)
    assert 2 * found.rows > most or doubled > limit


def test_a_guess_with_formulas_behind_it_is_tried_where_a_line_says_that_it_fits() -> None:
    def peak(rows: int) -> int:
        return 400 + 60 * rows

    free = {"held_bytes": 0, "limit_bytes": 1000, "most": 16}
    assert most_that_fit(peak, guess=1, **free).rows == 2
    assert most_that_fit(peak, guess=8, **free).rows == 8


@pytest.fixture
def run(tmp_path: Path, recipe_file: Path) -> RunDir:
    recipe = load_recipe(recipe_file, ["train.micro_batch_size=4"])
    made = RunDir.create(tmp_path / "run", recipe)
    write_prediction(made, PREDICTION)
    return made


PREDICTION: Prediction = {
    "micro_batch_size": 4, "strategy": "fsdp", "bytes_per_rank": 10, MEASURES_ROWS: True,
}  # fmt: skip


def rows_of(recipe: Recipe) -> object:
    return recipe.train.micro_batch_size


def test_what_was_measured_is_the_runs_own_from_then_on(run: RunDir) -> None:
    assert measures_rows(run)
    note_measured_rows(run, 16)
    assert not measures_rows(run)
    planned = load_recipe(run.recipe, ["train.micro_batch_size=4"], check_paths=False)
    assert rows_of(load_recipe(run.recipe, check_paths=False)) == 16
    assert json.loads(run.plan.read_text())["strategy"] == "fsdp"
    # The recipe is given once more, and its `auto` is the plan's 4 again.
    kept, prediction = as_measured(run, planned, PREDICTION)
    assert rows_of(kept) == 16
    write_prediction(run, prediction)
    assert not measures_rows(run)


def test_what_was_measured_of_something_else_is_not_kept(run: RunDir) -> None:
    planned = load_recipe(run.recipe, check_paths=False)
    note_measured_rows(run, 16)
    for other in ({**PREDICTION, "bytes_per_rank": 11}, {**PREDICTION, "strategy": "ddp"}):
        kept, prediction = as_measured(run, planned, other)
        assert rows_of(kept) == 4 and prediction == other
    given, prediction = as_measured(run, planned, {**PREDICTION, MEASURES_ROWS: False})
    assert rows_of(given) == 4  # a number in the recipe is no guess
