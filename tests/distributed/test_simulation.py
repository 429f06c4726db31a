"""What a simulation counts is what real processes do, to the byte; and what the kernel says."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.config.recipe import Recipe
from peft_dist.distributed.world import World
from peft_dist.plan.candidate import Candidate
from peft_dist.plan.hardware import find_gpu, hardware_of
from peft_dist.plan.subject import subject_of
from peft_dist.simulation.run import Simulated, simulate
from tests.configs import model_folder
from tests.faults.long import only_long
from tests.processes import ROOT, environment, forked_world, run

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
    "fsdp kept over backward": {
        "parallel": {"strategy": "fsdp", "reshard": "backward"},
        "train": {"global_batch_size": 8},
    },
    "fsdp kept over a step": {
        "parallel": {"strategy": "fsdp", "reshard": "step"},
        "train": {"global_batch_size": 8},
    },
    "fsdp dequantized": {"parallel": {"strategy": "fsdp", "dequantized_blocks": 1}},
    "bfloat16": {"parallel": {"strategy": "fsdp"}, "model": {"dtype": "bfloat16"}},
    "unquantized": {"parallel": {"strategy": "fsdp"}, "quantization": "none"},
    "bottleneck": {"parallel": {"strategy": "ddp"}, "method": {"kind": "bottleneck"}},
    "prefix": {"parallel": {"strategy": "fsdp"}, "method": {"kind": "prefix"}},
    "prompt": {"parallel": {"strategy": "fsdp"}, "method": {"kind": "prompt"}},
    "bitfit": {"parallel": {"strategy": "fsdp"}, "method": {"kind": "bitfit", "add_bias": True}},
}


FOUR: dict[str, dict[str, Any]] = {
    "fsdp": {"parallel": {"strategy": "fsdp"}},
    "ddp": {"parallel": {"strategy": "ddp"}},
    "fsdp recomputed": CASES["fsdp recomputed"],
    "hsdp": {"parallel": {"strategy": "hsdp", "shard_size": 2}},
}
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "vocab_size": 40_960, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
EXPERTS = {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


def recipe_of(case: dict[str, Any], folder: Path, processes: int = 2) -> dict[str, Any]:
    """Return the values of a recipe for so many processes."""
    sections = {
        "model": {"name": str(folder), "dtype": "float32"},
        "quantization": "nf4",
        "method": LORA,
        "data": {"train": "x.jsonl", "max_length": 32},
        "train": {"global_batch_size": 2 * processes, "micro_batch_size": 2},
        "parallel": {"processes": processes},
    }
    for name, section in case.items():
        old = sections[name]
        replaced = name == "method" or not isinstance(section, dict)
        sections[name] = section if replaced else {**old, **section}  # type: ignore[dict-item]
    return sections


def measured(
    folder: Path, recipes: dict[str, dict[str, Any]], processes: int, script: str
) -> dict[str, Any]:
    """Return what rank 0 of real processes says of recipes."""
    (folder / "recipes.json").write_text(json.dumps(recipes))
    done = run(
        [*forked_world(processes), str(ROOT / "tests" / "distributed" / script),
         str(folder / "recipes.json"), str(folder / "out.json")],
        environment=environment(folder / "cache", MALLOC_MMAP_THRESHOLD_="65536"),
        cwd=folder,
        timeout_s=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def simulated(values: dict[str, Any], processes: int) -> Simulated:
    """Return what a simulation says of rank 0."""
    recipe = Recipe.model_validate(values)
    world = World(0, processes, 0, processes, torch.device("cpu"))
    return simulate(recipe, Path(recipe.model.name), world)


GATHER, EXCHANGE = "_allgather_base_", "alltoall_base_"


@pytest.mark.distributed
def test_blocks_are_gathered_as_often_as_the_recipe_says(tmp_path: Path) -> None:
    """Two passes a step: 4 gathers of each block, 2, or 1; what is simulated is what is done."""
    model = model_folder(tmp_path / "model", "shallow", **SIZES)
    names = ("fsdp accumulated", "fsdp kept over backward", "fsdp kept over a step")
    recipes = {name: recipe_of(CASES[name], model) for name in (*names, "fsdp dequantized")}
    real = measured(tmp_path, recipes, 2, "measured_steps.py")
    for name, values in recipes.items():
        found = asdict(simulated(values, 2))
        assert {**found, "start_peak_bytes": 0} == {**real[name], "start_peak_bytes": 0}, name
        if name not in names:
            continue
        # Of the embedding, each pass asks for the rows of its tokens, and tells which. Slices of
        # the head give gradients for hidden states of both processes, which are float32.
        positions, targets, hidden = 2 * 32, 2 * 31, SIZES["hidden_size"]
        assert real[name]["collectives"][EXCHANGE] == 2 * 2
        row_bytes = 2 * hidden  # of bfloat16, as the file has it
        exchanged = positions * row_bytes + 2 * targets * 4 * hidden
        assert real[name]["carried_bytes"][EXCHANGE] == 2 * exchanged
    # Of each pass: ids of the embedding; hidden states, targets and three numbers of each slice.
    anew, backward, step = (real[name]["collectives"][GATHER] - 2 * 4 for name in names)
    layers = SIZES["num_hidden_layers"]
    assert anew - backward == 2 * layers and backward == 2 * step
    ids = 2 * (2 * positions * 4)
    scored = 2 * (2 * targets * (4 * hidden + 4 + 2 * 3 * 4))
    carried = [real[name]["carried_bytes"][GATHER] - ids - scored for name in names]
    assert carried[0] > carried[1] == 2 * carried[2]
    peaks = [real[name]["peak_bytes"] for name in names]
    assert peaks[0] < min(peaks[1:])


@only_long
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_a_simulation_counts_what_real_processes_do(tmp_path: Path, processes: int) -> None:
    dense = model_folder(tmp_path / "model", "shallow", **SIZES)
    mixture = model_folder(tmp_path / "mixture", "qwen3-30b-a3b", **SIZES, **EXPERTS)
    cases = CASES if processes == 2 else FOUR
    recipes = {name: recipe_of(case, dense, processes) for name, case in cases.items()}
    recipes["mixture"] = recipe_of(cases["fsdp"], mixture, processes)
    recipes["mixture, ddp"] = recipe_of(cases["ddp"], mixture, processes)
    real = measured(tmp_path, recipes, processes, "measured_steps.py")
    for name, values in recipes.items():
        found = asdict(simulated(values, processes))
        assert found["flops"] > 0 and found["peak_bytes"] > found["base_bytes"]
        assert {**found, "start_peak_bytes": 0} == {**real[name], "start_peak_bytes": 0}, name


LARGER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 3, "vocab_size": 16384,
}  # fmt: skip


def larger(folder: Path, strategy: str) -> dict[str, Any]:
    """Return a recipe whose tensors are much larger than what else a process needs."""
    model = model_folder(folder / "larger", "shallow", **LARGER)
    values = recipe_of({"parallel": {"strategy": strategy}}, model)
    values["data"] = {**values["data"], "max_length": 256}
    return values


@only_long
@pytest.mark.distributed
def test_the_kernel_sees_what_a_simulation_counts(tmp_path: Path) -> None:
    values = larger(tmp_path, "fsdp")
    real = measured(tmp_path, {"fsdp": values}, 2, "resident_steps.py")
    assert real["fsdp"] == pytest.approx(simulated(values, 2).peak_bytes, rel=0.10)


@only_long
@pytest.mark.distributed
def test_zero3_takes_what_its_formula_says(tmp_path: Path) -> None:
    values = larger(tmp_path, "zero3")
    real = measured(tmp_path, {"zero3": values}, 2, "measured_steps.py")
    recipe = Recipe.model_validate(values)
    config = json.loads((tmp_path / "larger" / "config.json").read_text())
    subject = subject_of(recipe, config)
    one = Candidate("zero3", 1, 2, 2, micro_batch=2, recompute=False, offload=False)
    gpu = replace(find_gpu("h100-80gb", where=""), bfloat16=False)
    planned = subject.estimate(one, hardware_of(None, gpu, gpus_per_node=2))
    assert planned.bytes.allocated == pytest.approx(real["zero3"]["peak_bytes"], rel=0.03)
