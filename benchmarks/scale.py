"""How Llama 8B, 70B and 405B scale from 8 to 1,024 GPUs, as the plan calculates it.

No GPU is used: bytes and operations are those of the plan's formulas, which `--simulate` holds
against the product's own start and step on fake tensors; seconds are its model of GPUs and links.
Nodes of eight H100; NVLink inside; between nodes an InfiniBand adapter of 400 Gb/s for each GPU, or
one Ethernet adapter of 100 Gb/s for all eight.

    PYTHONPATH=. python benchmarks/scale.py --json scale.json            # seconds
    PYTHONPATH=. python benchmarks/scale.py --simulate                   # many minutes
    PYTHONPATH=. python benchmarks/scale_plot.py scale.json docs         # the pictures; a browser
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from peft_dist.config import Recipe
from peft_dist.plan.estimate import Estimate, setting_of
from peft_dist.plan.gathers import gathered_bytes
from peft_dist.plan.hardware import GIB, Hardware, find_gpu, hardware_of
from peft_dist.plan.memory import base_bytes
from peft_dist.plan.plan import best_setting
from peft_dist.plan.subject import Subject, subject_of

MODELS = {
    "8B": (4096, 14336, 32, 32), "70B": (8192, 28672, 80, 64), "405B": (16384, 53248, 126, 128),
}  # fmt: skip
"""Llama 3.1: width, inner width, layers and heads."""
FABRICS = {"InfiniBand": 45.0, "Ethernet": 1.4}
"""GB/s that a node receives per GPU: nine tenths of what the adapters have."""
WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
ON_NODE = 8
LENGTH = 2048
STRONG_ROWS = 1024
"""Rows of a step, whatever the number of GPUs."""
WEAK_ROWS = 8
"""Rows of a step for each GPU."""
START_S = 60.0
"""Assumed: seconds from a requeue to reading the base, for nodes, Python and the process group."""
STRATEGIES = ("ddp", "fsdp", "hsdp")
RANKS = (16, 64, 256)
"""Of LoRA on all linears, to see where an adapter that is whole on every GPU stops paying."""
SIMULATED = {"8B": (8, 1024), "70B": (8, 1024), "405B": (8, 512, 1024)}


def config_of(model: str) -> dict[str, Any]:
    """Return a model's config.json."""
    hidden, inner, layers, heads = MODELS[model]
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    }


def subject(model: str, rows: int, *, rank: int = 16) -> Subject:
    """Return LoRA on all linears of a model in 4 bits, with so many rows a step."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": model, "dtype": "bfloat16"},
            "quantization": "nf4",
            "method": {"kind": "lora", "rank": rank},
            "data": {"train": "rows.jsonl", "max_length": LENGTH},
            "train": {
                "steps": 1000,
                "global_batch_size": rows,
                "micro_batch_size": "auto",
                "activation_checkpointing": "auto",
            },
            "parallel": {"reshard": "forward", "dequantized_blocks": 0},
        }
    )
    return subject_of(recipe, config_of(model))


def hardware(fabric: str) -> Hardware:
    """Return nodes of eight H100 with a fabric between them."""
    found = hardware_of(None, find_gpu("h100-80gb", where="gpu"), gpus_per_node=ON_NODE)
    return replace(found, between_gb_s=FABRICS[fabric])


def point(found: Estimate) -> dict[str, Any]:
    """Return what is told of one way to run."""
    one = found.candidate
    return {
        "strategy": one.strategy,
        "gpus": one.processes,
        "micro_batch": one.micro_batch,
        "recompute": one.recompute,
        "fits": found.fits,
        "gib": found.device_bytes / GIB,
        "tokens_per_s": found.tokens_per_s,
        "step_s": found.seconds.total,
        "seconds": asdict(found.seconds),
        "inside_bytes": found.sent_inside_bytes,
        "between_bytes": found.sent_between_bytes,
        "first_start_s": found.first_start_s,
        "requeue_s": found.requeue_s,
    }


def scaled(model: str, fabric: str, *, strong: bool) -> list[dict[str, Any]]:
    """Return every strategy on every number of GPUs, those that cannot fit left out."""
    nodes = hardware(fabric)
    found = []
    for gpus in WORLDS:
        rows = STRONG_ROWS if strong else WEAK_ROWS * gpus
        for strategy in STRATEGIES:
            if strategy == "hsdp" and gpus == ON_NODE:
                continue
            one = best_setting(subject(model, rows), nodes, strategy, gpus // ON_NODE)
            if one.fits:
                found.append(point(one))
    return found


def adapters(model: str) -> list[dict[str, Any]]:
    """Return what an adapter takes that every GPU holds whole: bytes, and seconds of a sum."""
    found = []
    for rank in RANKS:
        for fabric in FABRICS:
            nodes = hardware(fabric)
            for gpus in (8, 64, 512):
                planned = subject(model, WEAK_ROWS * gpus, rank=rank)
                one = best_setting(planned, nodes, "fsdp", gpus // ON_NODE)
                parts = one.bytes
                base = base_bytes(
                    planned.shape,
                    replace(setting_of(planned.recipe, one.candidate, nodes), shards=1),
                )
                own = parts.adapter + parts.gradients + parts.moments
                found.append(
                    {
                        "rank": rank,
                        "fabric": fabric,
                        "gpus": gpus,
                        "gib": own / GIB,
                        "base_shard_gib": parts.base / GIB,
                        "larger_than_base_shard_from_gpus": -(-base // own),
                        "reduce_share": one.seconds.reduce / one.seconds.total,
                        "fits": one.fits,
                    }
                )
    return found


def simulated(model: str, gpus: int) -> dict[str, Any]:
    """Run the product's own start and steps of one rank on fake tensors, and compare.

    Raises:
        CalledProcessError: Where the simulation fails.
    """
    planned = subject(model, gpus)
    found = best_setting(planned, hardware("InfiniBand"), "fsdp", max(1, gpus // ON_NODE))
    one = found.candidate
    values = planned.recipe.model_dump(mode="json", exclude_none=True)
    values["train"] |= {
        "micro_batch_size": one.micro_batch,
        "activation_checkpointing": one.recompute,
    }
    values["parallel"] |= {"strategy": "fsdp", "processes": gpus}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(json.dumps(values))
        done = subprocess.run(
            [sys.executable, "-m", "peft_dist.entrypoints.simulate", str(file),
             "--per-node", str(ON_NODE)],
            input=json.dumps(config_of(model)), capture_output=True, text=True, check=True,
        )  # fmt: skip
    counted = json.loads(done.stdout.splitlines()[-1])
    setting = setting_of(planned.recipe, one, hardware("InfiniBand"))
    gathered = gathered_bytes(planned.shape, planned.adapter, setting)
    carried = counted["carried_bytes"]
    return {
        "model": model,
        "gpus": gpus,
        "micro_batch": one.micro_batch,
        "recompute": one.recompute,
        "peak_gib": counted["peak_bytes"] / GIB,
        "planned_gib": found.bytes.allocated / GIB,
        "gathered_bytes": carried["_allgather_base_"] + carried.get("alltoall_base_", 0),
        "planned_gathered_bytes": gathered,
        "tflop": counted["flops"] / 1e12,
    }


def main() -> int:
    """Calculate, print, and write what is asked for."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--json", type=Path, help="write every figure to this file")
    made.add_argument("--simulate", action="store_true", help="compare with simulations")
    made.add_argument("--models", default=",".join(MODELS), help="such as 8B,405B")
    args = made.parse_args()
    models = args.models.split(",")
    if args.simulate:
        for model in models:
            for gpus in SIMULATED[model]:
                print(json.dumps(simulated(model, gpus)), flush=True)
        return 0
    found = {
        model: {
            "strong": {fabric: scaled(model, fabric, strong=True) for fabric in FABRICS},
            "weak": {fabric: scaled(model, fabric, strong=False) for fabric in FABRICS},
            "adapters": adapters(model),
        }
        for model in models
    }
    for model, parts in found.items():
        _print(model, parts)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def per_gpu_at_first(points: list[dict[str, Any]]) -> float:
    """Return the tokens per second and GPU on the fewest GPUs on which anything fits."""
    fewest = min(point["gpus"] for point in points)
    return max(float(p["tokens_per_s"]) for p in points if p["gpus"] == fewest) / float(fewest)


def requeue_gpu_hours(one: dict[str, Any]) -> float:
    """Return what all GPUs lose while a run comes back: processes start, the base is read."""
    return float(one["gpus"] * (one["requeue_s"] + START_S) / 3600)


def _print(model: str, parts: dict[str, Any]) -> None:
    for kind in ("strong", "weak"):
        for fabric, points in parts[kind].items():
            print(
                f"\n{model}, {kind} scaling, {fabric}: thousand tokens/s, and per GPU of the first"
            )
            first = per_gpu_at_first(points)
            for gpus in WORLDS:
                here = [one for one in points if one["gpus"] == gpus]
                texts = []
                for one in here:
                    speed = one["tokens_per_s"]
                    share = speed / gpus / first
                    texts.append(f"{one['strategy']} {speed / 1e3:9,.1f} ({share:4.0%})")
                if here:
                    cost = f"{here[-1]['requeue_s']:.1f} s, {requeue_gpu_hours(here[-1]):.2f}"
                    texts.append(f"a requeue of {here[-1]['strategy']} reads {cost} GPU-hours")
                print(f"{gpus:5}  {'  '.join(texts) or 'nothing fits'}")
    print(f"\n{model}: adapter, gradient and moments whole on every GPU")
    for one in parts["adapters"]:
        more = one["larger_than_base_shard_from_gpus"]
        print(
            f"r {one['rank']:3} on {one['gpus']:4} ({one['fabric']}): {one['gib']:.1f} GiB, base "
            f"shard {one['base_shard_gib']:.1f}, smaller from {more} GPUs; "
            f"the sum is {one['reduce_share']:.1%} of a step"
        )


if __name__ == "__main__":
    sys.exit(main())
