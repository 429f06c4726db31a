"""What the control-plane tests share: a small recipe that stands on its own."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from peft_dist.run.lease import Attempt
from tests.unit.slurm_desk import Desk

# How long an example takes is the machine's affair; what hangs is pytest-timeout's.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

MINIMAL = "model: {name: ./model}\ndata: {train: train.jsonl}\n"


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that writes a recipe beside a model folder and a row file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")

    def write(text: str = MINIMAL) -> Path:
        path = tmp_path / "recipe-under-test.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def recipe_file(write_recipe: Callable[[str], Path]) -> Path:
    """Return a minimal valid recipe."""
    return write_recipe(MINIMAL)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Return a login node, with nothing else in its PATH that knows Slurm."""
    made = Desk(tmp_path)
    monkeypatch.setenv("PATH", f"{made.slurm}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., Attempt]]:
    """Return a function that begins an attempt in the test's `folder`; all are ended afterwards."""
    begun: list[Attempt] = []

    def start(**options: bool) -> Attempt:
        begun.append(Attempt.begin(folder, **options))
        return begun[-1]

    yield start
    for attempt in begun:
        attempt.end("done")
