"""A trace of the steps that a recipe names, and of no others, that Perfetto reads."""

import gzip
import importlib
import json
from pathlib import Path

import pytest
import torch

from peft_dist.config.run_sections import Profile
from peft_dist.tracking.profiler import StepProfiler

CPU = torch.device("cpu")


def train(folder: Path, steps: int, settings: Profile, *, rank: int = 0) -> list[str]:
    """Go through the phases of a training; return the names of the traces."""
    profiler = StepProfiler(settings, rank=rank, device=CPU)
    profiler.phase("evaluation", 0, into=folder, attempt=2)
    for step in range(1, steps + 1):
        profiler.phase("step", step, into=folder, attempt=2)
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(8, 8) @ torch.ones(8, 8)
        if step % 2 == 0:
            profiler.phase("evaluation", step, into=folder, attempt=2)
            with torch.profiler.record_function(f"evaluation after {step}"):
                torch.ones(3).sum()
    profiler.end(steps, into=folder, attempt=2)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def events(trace: Path) -> set[str]:
    with gzip.open(trace) as file:
        return {str(event.get("name")) for event in json.load(file)["traceEvents"]}


def test_the_named_steps_are_traced_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "profile"
    (name,) = train(folder, 6, Profile(steps=(3, 4)))
    assert name == "steps-3-4-a2-rank-0.json.gz"
    found = events(folder / name)
    assert {"work of step 3", "work of step 4", "aten::mm"} <= found
    assert not {"work of step 2", "work of step 5", "evaluation after 4"} & found
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    spent = importlib.import_module("card").longest_kernels(folder / name, kind="cpu_op")
    assert spent["aten::mm"] > 0
    assert list(spent.values()) == sorted(spent.values(), reverse=True)


def test_what_was_traced_is_kept_where_training_ends_before(tmp_path: Path) -> None:
    (name,) = train(tmp_path / "profile", 3, Profile(steps=(3, 9)))
    assert name == "steps-3-3-a2-rank-0.json.gz"
    assert "work of step 3" in events(tmp_path / "profile" / name)


@pytest.mark.parametrize("settings", [Profile(), Profile(steps=(1, 2), ranks=(1,))])
def test_other_ranks_and_other_recipes_trace_nothing(tmp_path: Path, settings: Profile) -> None:
    assert train(tmp_path / "profile", 4, settings) == []


def test_a_trace_that_cannot_be_written_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "profile"
    folder.write_text("a file", encoding="utf-8")
    profiler = StepProfiler(Profile(steps=(1, 1)), rank=0, device=CPU)
    profiler.phase("step", 1, into=folder, attempt=1)
    profiler.phase("step", 2, into=folder, attempt=1)
    assert "the trace of steps 1 to 1 is lost" in caplog.text
