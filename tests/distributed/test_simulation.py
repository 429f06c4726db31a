"""What a simulation counts is what two real processes do, to the byte."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.config.recipe import Recipe
from peft_dist.distributed.world import World
from peft_dist.simulation.run import simulate
from tests.configs import model_folder
from tests.faults.long import only_long
from tests.processes import ROOT, environment, run, torchrun

LORA = {"kind": "lora", "rank": 8}
CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": {"strategy": "fsdp"}},
    "ddp": {"parallel": {"strategy": "ddp"}},
    "fsdp recomputed": {
        "parallel": {"strategy": "fsdp"},
        "train": {"activation_checkpointing": True},
    },
    "hsdp": {"parallel": {"strategy": "hsdp", "shard_size": 2}},
    "fsdp accumulated": {"parallel": {"strategy": "fsdp"}, "train": {"global_batch_size": 8}},
    "bfloat16": {"parallel": {"strategy": "fsdp"}, "model": {"dtype": "bfloat16"}},
    "unquantized": {"parallel": {"strategy": "fsdp"}, "quantization": "none"},
    "bottleneck": {"parallel": {"strategy": "ddp"}, "method": {"kind": "bottleneck"}},
    "prefix": {"parallel": {"strategy": "fsdp"}, "method": {"kind": "prefix"}},
    "prompt": {"parallel": {"strategy": "fsdp"}, "method": {"kind": "prompt"}},
    "bitfit": {"parallel": {"strategy": "fsdp"}, "method": {"kind": "bitfit", "add_bias": True}},
}


def recipe_of(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the values of a recipe for two processes."""
    sections = {
        "model": {"name": str(folder), "dtype": "float32"},
        "quantization": "nf4",
        "method": LORA,
        "data": {"train": "x.jsonl", "max_length": 32},
        "train": {"global_batch_size": 4, "micro_batch_size": 2},
        "parallel": {"processes": 2},
    }
    for name, section in case.items():
        old = sections[name]
        replaced = name == "method" or not isinstance(section, dict)
        sections[name] = section if replaced else {**old, **section}  # type: ignore[dict-item]
    return sections


@only_long
@pytest.mark.distributed
def test_a_simulation_counts_what_two_processes_do(tmp_path: Path) -> None:
    folder = model_folder(
        tmp_path / "model", "shallow", hidden_size=128, intermediate_size=256, vocab_size=1024,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3,
    )  # fmt: skip
    recipes = {name: recipe_of(case, folder) for name, case in CASES.items()}
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    script = str(ROOT / "tests" / "distributed" / "measured_steps.py")
    done = run(
        [*torchrun(2), script, str(tmp_path / "recipes.json"), str(tmp_path / "out.json")],
        environment=environment(tmp_path / "cache"),
        cwd=tmp_path,
        timeout_s=550,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    real = json.loads((tmp_path / "out.json").read_text())
    for name, values in recipes.items():
        world = World(0, 2, 0, 2, torch.device("cpu"))
        found = asdict(simulate(Recipe.model_validate(values), folder, world))
        assert found["flops"] > 0 and found["peak_bytes"] > found["base_bytes"]
        assert {**found, "start_peak_bytes": 0} == {**real[name], "start_peak_bytes": 0}, name
