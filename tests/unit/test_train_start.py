"""Which run directory a worker trains in, decided before anything is loaded."""

import argparse
from pathlib import Path

import pytest

from peft_dist.config import Recipe
from peft_dist.errors import LaunchError, RunDirError
from peft_dist.run_dir import RunDir
from peft_dist.train import _prepared_run, _require_trackers


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "d"}})
    return RunDir.create(tmp_path / "run", recipe)


def started(recipe: Path, *overrides: str, run_dir: Path | None = None) -> argparse.Namespace:
    return argparse.Namespace(recipe=recipe, overrides=list(overrides), run_dir=run_dir)


def test_the_recipe_of_a_prepared_run_trains_in_its_own_folder(run: RunDir) -> None:
    assert _prepared_run(started(run.recipe)) == run


@pytest.mark.parametrize("left", ["ledger", "result"])
def test_a_run_that_has_trained_is_never_trained_over(run: RunDir, left: str) -> None:
    getattr(run, left).write_text('{"step": 1}\n', encoding="utf-8")
    with pytest.raises(RunDirError, match="has trained already; name another folder"):
        _prepared_run(started(run.recipe))


def test_an_old_recipe_with_changes_is_the_start_of_another_run(run: RunDir) -> None:
    run.ledger.write_text('{"step": 1}\n', encoding="utf-8")
    assert _prepared_run(started(run.recipe, "train.seed=1")) is None
    assert _prepared_run(started(run.recipe, run_dir=run.path.parent / "b")) is None


def test_any_other_recipe_is_in_no_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {name: m}\n", encoding="utf-8")
    assert _prepared_run(started(recipe)) is None


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = {"model": {"name": "m"}, "data": {"train": "d"}}
    offline = Recipe.model_validate(raw | {"tracking": {"wandb": {"mode": "offline"}}})
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.path_importer_cache", {})
    monkeypatch.delitem(__import__("sys").modules, "wandb", raising=False)
    with pytest.raises(LaunchError, match="tracking.wandb.mode: wandb is not installed"):
        _require_trackers(offline)
    _require_trackers(Recipe.model_validate(raw))
