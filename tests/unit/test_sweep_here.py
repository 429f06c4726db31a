"""Arrays on this machine: one run after the other, and a command that goes on where it ended."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import EXIT_DO_NOT_RETRY, EXIT_INTERRUPTED
from peft_dist.launch import packages, sweep_here
from peft_dist.launch.run_here import LocalLaunch
from peft_dist.run.directory import RunDir

Capture = pytest.CaptureFixture[str]


class Trainings:
    """Stands where `train_here` does: notes what it is given, and makes runs that have ended."""

    def __init__(self, codes: Sequence[int] = ()) -> None:
        """End the first ones with these codes, and the others well."""
        self._codes, self.given = list(codes), list[tuple[str, float | None, int]]()

    def __call__(self, start: LocalLaunch, *, fresh: bool = False) -> int:
        """Train one."""
        recipe, code = start.recipe, self._codes.pop(0) if self._codes else 0
        self.given.append((start.run.path.name, recipe.train.learning_rate, recipe.train.seed))
        if code == 0 and not start.run.is_finished:
            run = RunDir.create(start.run.path, recipe)
            run.result.write_text(json.dumps({"final_loss": recipe.train.seed / 4}))
        return code


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trainings:
    """Return what is trained in this test."""
    made = Trainings()
    monkeypatch.setattr(sweep_here, "train_here", made)
    monkeypatch.setattr(packages, "TRAIN_PACKAGES", ())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(tmp_path)
    return made


GRID = ("--array", "train.learning_rate=1e-4,2e-4", "--array", "train.seed=1,2")


def test_every_combination_is_trained_in_turn_and_the_results_are_shown(
    trainings: Trainings, recipe_file: Path, capsys: Capture
) -> None:
    assert main(["train", str(recipe_file), "--run-dir", "runs/all", *GRID]) == 0
    assert trainings.given == [
        ("000", 1e-4, 1), ("001", 1e-4, 2), ("002", 2e-4, 1), ("003", 2e-4, 2)
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "all: 4 runs: 4 done" in out
    assert "results of all" in out and "learning_rate  seed" in out


def test_nothing_is_made_where_one_of_the_runs_cannot_be(
    trainings: Trainings, recipe_file: Path, capsys: Capture
) -> None:
    words = ["train", str(recipe_file), "--run-dir", "runs/all", "--array", "train.seed=1,x"]
    assert main(words) == 2
    assert "train.seed: got 'x'" in capsys.readouterr().err
    assert not trainings.given and not Path("runs").exists()


def test_a_dry_run_shows_each_run_and_makes_nothing(
    trainings: Trainings, recipe_file: Path, capsys: Capture
) -> None:
    words = ["train", str(recipe_file), "--run-dir", "runs/all", *GRID, "--dry-run"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::2][1] == "001: train.learning_rate=1e-4 train.seed=2"
    assert lines[3].endswith("runs/all/001/recipe.yaml")
    assert not Path("runs").exists()


def test_a_run_that_fails_is_left_behind_and_a_stop_ends_them_all(
    trainings: Trainings, recipe_file: Path
) -> None:
    words = ["train", str(recipe_file), "--run-dir", "runs/all", "--array", "train.seed=1,2,3"]
    trainings._codes = [EXIT_DO_NOT_RETRY]
    assert main(words) == EXIT_DO_NOT_RETRY
    assert [seed for _, _, seed in trainings.given] == [1, 2, 3]
    trainings._codes, trainings.given = [EXIT_INTERRUPTED], []
    assert main(words) == EXIT_INTERRUPTED
    assert [seed for _, _, seed in trainings.given] == [1]


def test_another_array_is_not_mixed_into_one_that_is_there(
    trainings: Trainings, recipe_file: Path, capsys: Capture
) -> None:
    words = ["train", str(recipe_file), "--run-dir", "runs/all", "--array"]
    assert main([*words, "train.seed=1,2"]) == 0
    assert main([*words, "train.seed=1,2,3"]) == 2
    assert "holds another array; choose another folder" in capsys.readouterr().err
    assert main(["resume", "runs/all"]) == 2
    assert "is an array of this machine; give its `peft-dist train" in capsys.readouterr().err
