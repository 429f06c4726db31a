"""`plan --runs`: efficiency is learned from what runs have measured, and nothing else is."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.config import load_recipe
from peft_dist.plan.candidate import Candidate
from peft_dist.plan.hardware import find_gpu, hardware_of
from peft_dist.plan.subject import read_config, subject_of
from peft_dist.run.directory import RunDir
from tests.configs import model_folder
from tests.unit.slurm_desk import Capture, told

LENGTH, ROWS = 700, 64
"""Tokens of a row on average, well below `data.max_length`, and rows of a step."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model_folder(tmp_path / "model", "shallow")
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: {name: model}\nmethod: {kind: lora, rank: 16}\n"
        "data: {train: rows.jsonl, max_length: 2048}\n"
        f"train: {{steps: 100, global_batch_size: {ROWS}, micro_batch_size: 4}}\n"
    )
    return file


def step_s(recipe: Path, factor: float) -> float:
    """Return what a step of such rows takes on GPUs that are `factor` times as efficient."""
    short = load_recipe(recipe, [f"data.max_length={LENGTH}"], check_paths=False)
    subject = subject_of(short, read_config(short.model.name, None, network=False))
    hardware = hardware_of(None, find_gpu("h100-80gb", where=""), gpus_per_node=8)
    hardware = replace(hardware, assumed=hardware.assumed.times(factor))
    one = Candidate("fsdp", 1, 8, 8, micro_batch=4, recompute=False, offload=False)
    return subject.estimate(one, hardware).seconds.total


def trained(folder: Path, recipe: Path, seconds: float, *, steps: int = 8, **facts: Any) -> None:
    """Make a run that has trained so many steps of so many seconds, the first two slower."""
    run = RunDir.create(folder, load_recipe(recipe, ["parallel.strategy=fsdp"], check_paths=False))
    stamp = {"attempt": 1, "time": 0.0, "at_s": 1.0}
    start = {"event": "start", "step": 0, "steps": 100, "world_size": 8, "strategy": "fsdp",
             "hosts": ["a"] * 8, "device": "NVIDIA H100 80GB HBM3", **facts}  # fmt: skip
    lines = [{**start, **stamp}]
    for step in range(1, steps + 1):
        own_s = seconds * (9 if step <= 2 else 1)
        tokens = ROWS * LENGTH
        figures = {"loss": 1.0, "rows": ROWS, "tokens": tokens, "tokens_per_s": tokens / own_s,
                   "rank_memory_bytes": [5 << 30] * 8}  # fmt: skip
        lines.append({"event": "step", "step": step, **stamp, **figures})
    run.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))


def planned(capsys: Capture, recipe: Path, *words: str) -> dict[str, Any]:
    assert main(["plan", str(recipe), "--nodes", "1", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_efficiency_of_runs_is_found_again(
    recipe: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name, factor in (("a", 0.5), ("b", 0.4), ("c", 0.6)):
        trained(tmp_path / "runs" / name, recipe, step_s(recipe, factor))
    trained(tmp_path / "runs" / "other", recipe, 9.0, device="NVIDIA L4")
    trained(tmp_path / "runs" / "short", recipe, 9.0, steps=4)
    usual = planned(capsys, recipe)
    found = planned(capsys, recipe, "--runs", str(tmp_path / "runs" / "*"))
    lessons = {one["run"]: one for one in found["learned"]["lessons"]}
    assert {name: round(one["factor"], 3) for name, one in lessons.items()} == {
        "a": 0.5, "b": 0.4, "c": 0.6,
    }  # fmt: skip
    assert lessons["a"]["calculated_s"] == pytest.approx(step_s(recipe, 1.0))
    assert lessons["a"]["measured_s"] == pytest.approx(step_s(recipe, 0.5))
    assert lessons["a"]["measured_bytes"] == 5 << 30
    left_out = " ".join(found["learned"]["left_out"])
    assert "other: ran on NVIDIA L4" in left_out and "short: has fewer than 5 steps" in left_out
    assert found["learned"]["factor"] == pytest.approx(0.5, rel=1e-3)
    for name in ("gemm_efficiency", "attention_efficiency", "memory_efficiency"):
        assert found["assumed"][name] == pytest.approx(0.5 * usual["assumed"][name], rel=1e-3)
    # Twice the seconds where only GPUs take time; bytes are what they were.
    (before, *_), (after, *_) = usual["rows"], found["rows"]
    assert after["seconds"]["products"] == pytest.approx(
        2 * before["seconds"]["products"], rel=1e-3
    )
    assert after["seconds"]["reduce"] == before["seconds"]["reduce"]
    assert after["bytes"] == before["bytes"]


def test_a_plan_says_what_it_has_learned(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    trained(tmp_path / "runs" / "mine", recipe, step_s(recipe, 0.5))
    assert main(["plan", str(recipe), "--nodes", "1", "--runs", str(tmp_path / "runs/*")]) == 0
    text = capsys.readouterr().out
    assert "learned from 1 run\n" in text
    assert "every efficiency below is the usual one times 0.5" in text
    assert "gemm_efficiency 0.325" in text


@pytest.mark.parametrize("seconds", [1e-9, 1e6])
def test_seconds_that_no_efficiency_explains_teach_nothing(
    recipe: Path, tmp_path: Path, capsys: Capture, seconds: float
) -> None:
    trained(tmp_path / "odd", recipe, seconds)
    found = planned(capsys, recipe, "--runs", str(tmp_path / "odd"))
    assert found["learned"]["lessons"] == [] and found["learned"]["factor"] == 1.0
    assert "which no efficiency explains" in found["learned"]["left_out"][0]


def test_runs_that_are_not_there_are_one_line(recipe: Path, capsys: Capture) -> None:
    assert main(["plan", str(recipe), "--runs", "nowhere/*"]) == 2
    assert told(capsys).startswith("--runs: got 'nowhere/*', and nothing is there; ")
