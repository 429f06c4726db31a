"""Time every strategy and micro-batch on this machine, and see whether `auto` picks the fastest.

Two CPU processes train SmolLM2-135M by the product's own trainer, one step of each way in turns, so
that a busy machine slows all of them. The plan is told how fast this machine multiplies and copies,
and learns its efficiency from one of the ways. Then, for every limit of memory between what the
ways take, what `auto` picks is held against the fastest of those that fit.

    make quickstart                                     # makes the model once
    PYTHONPATH=. python benchmarks/auto.py --json auto.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from peft_dist.config import load_recipe
from peft_dist.plan.candidate import Candidate
from peft_dist.plan.hardware import GIB, Assumed, GpuKind, Hardware
from peft_dist.plan.learn import solve
from peft_dist.plan.plan import Subject, choose, read_config, subject_of

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "quickstart.yaml"
PROCESSES = 2
STRATEGIES = ("ddp", "fsdp")
MICRO_BATCHES = (1, 2, 4, 8)
TAUGHT_BY = ("ddp", 4)
"""The way that the plan learns from."""
LINK_GB_S = 1.0
"""What gloo carries over loopback, about."""
CLOSE = 0.05
"""How much slower than the fastest a pick may be: ways that are closer cannot be told apart."""


def main() -> int:
    """Measure, compare, print; return 1 where `auto` picks a way that is slower than another."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--rounds", type=int, default=4)
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    made.add_argument("--rank-out", type=Path, help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.rank_out is not None:
        return _run_rank(args)
    with tempfile.TemporaryDirectory(prefix="peft-dist-auto-") as folder:
        out = Path(folder, "out.json")
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             str(PROCESSES), __file__, "--rounds", str(args.rounds), "--rank-out", str(out)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=1800,
        )  # fmt: skip
        report = json.loads(out.read_text())
    found = _compared(report)
    print(f"in {found['dtype']}, {found['flops'] / 1e9:.0f} GFLOP/s a process")
    for one in found["ways"]:
        print(
            f"{one['strategy']:4} x {one['micro_batch']}: {one['measured_s']:6.3f} s a step, "
            f"planned {one['planned_s']:6.3f}; {one['gib']:.2f} GiB"
        )
    for one in found["picks"]:
        print(
            f"in {one['limit_gib']:.2f} GiB fit {one['feasible']} ways; auto picks "
            f"{one['picked']}, {one['slower']:+.1%} against the fastest, {one['fastest']}"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(one["slower"] > CLOSE for one in found["picks"]) else 0


def _run_rank(args: argparse.Namespace) -> int:
    """Train as one of two ranks, and write how long the steps of every way took."""
    import torch.distributed as torch_dist

    from peft_dist.common.cache_folder import usable_cache_dir
    from peft_dist.data.token_cache import tokenize_rows
    from peft_dist.distributed import process_group
    from peft_dist.distributed.world import read_world
    from peft_dist.model.precision import compute_dtype, name_of
    from peft_dist.model.source import find_base
    from peft_dist.model_setup import set_up_model
    from peft_dist.run.prediction import with_rows
    from peft_dist.trainer import Trainer

    world = read_world()
    process_group.start(world)
    trainers = {}
    for strategy in STRATEGIES:
        recipe = load_recipe(RECIPE, [f"parallel.strategy={strategy}"])
        rows = tokenize_rows(recipe, "train", usable_cache_dir() / "rows")
        setup = set_up_model(recipe, world, find_base(recipe, usable_cache_dir()))
        trainers[strategy] = Trainer(setup, rows, None)
        setup.model.train()
    batch = next(trainers["ddp"].rows.batches(trainers["ddp"].plan.steps()))
    seconds: dict[str, list[float]] = {}
    for turn in range(1 + args.rounds):  # the first one settles, and does not count
        for strategy, trainer in trainers.items():
            for rows_of_pass in MICRO_BATCHES:
                trainer.recipe = with_rows(trainer.recipe, rows_of_pass)
                torch_dist.barrier()
                started = time.monotonic()
                trainer._step(batch)
                torch_dist.barrier()
                if turn:
                    key = f"{strategy} {rows_of_pass}"
                    seconds.setdefault(key, []).append(time.monotonic() - started)
    if world.is_main:
        lengths = batch.rows.example_lengths[batch.ids]
        dtype, _ = compute_dtype(trainers["ddp"].recipe.model, world.device)
        report = {
            "seconds": seconds,
            "length": round(float(lengths.mean())),
            "dtype": name_of(dtype),
            **_rates(dtype),
        }
        args.rank_out.write_text(json.dumps(report))
    process_group.stop()
    return 0


def _rates(dtype: Any) -> dict[str, float]:
    """Return operations and bytes per second of one thread, the best of some tries."""
    import torch

    left, right = (torch.randn(1024, 1024, dtype=dtype) for _ in range(2))
    large = torch.randn(1 << 24)
    multiply = min(_timed(lambda: left @ right) for _ in range(5))
    copy = min(_timed(large.clone) for _ in range(5))
    return {"flops": 2 * 1024**3 / multiply, "memory_gb_s": 2 * large.nbytes / copy / 1e9}


def _timed(action: Any) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def _compared(report: dict[str, Any]) -> dict[str, Any]:
    """Return each way as planned and measured, and what is picked under each limit of memory."""
    open_ones = ["train.micro_batch_size=auto", "parallel.strategy=auto"]
    settings = [f"data.max_length={report['length']}", f"model.dtype={report['dtype']}"]
    recipe = load_recipe(RECIPE, [*open_ones, *settings])
    subject = subject_of(recipe, read_config(recipe.model.name, None, network=False))
    measured = {key: median(times) for key, times in report["seconds"].items()}
    # A card's speed is that in bfloat16, of which the plan takes half in float32.
    in_bfloat16 = report["dtype"] == "bfloat16"
    cpu = GpuKind("cpu", 1024.0, report["memory_gb_s"], LINK_GB_S, bfloat16=in_bfloat16,
              measured_flops=report["flops"] * (1 if in_bfloat16 else 2))  # fmt: skip
    assumed = Assumed(context_gib=0, nccl_gib=0, hop_inside_us=30.0)
    machine = Hardware(cpu, PROCESSES, LINK_GB_S, LINK_GB_S, None, assumed)
    taught = _candidate(*TAUGHT_BY)
    factor = solve(
        lambda value: (
            subject.estimate(taught, replace(machine, assumed=assumed.times(value))).seconds.total
        ),
        measured[f"{TAUGHT_BY[0]} {TAUGHT_BY[1]}"],
    )
    assert factor is not None, "no efficiency explains what was measured"
    machine = replace(machine, assumed=assumed.times(factor))
    ways = []
    for strategy in STRATEGIES:
        for rows in MICRO_BATCHES:
            planned = subject.estimate(_candidate(strategy, rows), machine)
            ways.append(
                {
                    "strategy": strategy,
                    "micro_batch": rows,
                    "measured_s": measured[f"{strategy} {rows}"],
                    "planned_s": planned.seconds.total,
                    "gib": planned.device_bytes / GIB,
                }
            )
    picks = [_pick(subject, machine, ways, limit) for limit in sorted({w["gib"] for w in ways})]
    return {"ways": ways, "picks": picks, "factor": factor, **report}


def _candidate(strategy: str, rows: int) -> Candidate:
    shards = 1 if strategy == "ddp" else PROCESSES
    return Candidate(strategy, 1, PROCESSES, shards, rows, recompute=False, offload=False)


def _pick(
    subject: Subject, machine: Hardware, ways: list[dict[str, Any]], limit_gib: float
) -> dict[str, Any]:
    """Return what `auto` picks where so much memory is there, and the fastest that fits."""
    limit = limit_gib * (1 + 1e-9)
    found = choose(subject, replace(machine, gpu=replace(machine.gpu, memory_gib=limit)), 1)
    feasible = [way for way in ways if way["gib"] <= limit]
    own = (found.candidate.strategy, found.candidate.micro_batch)
    (picked,) = [way for way in feasible if (way["strategy"], way["micro_batch"]) == own]
    fastest = min(feasible, key=lambda way: float(way["measured_s"]))
    return {
        "limit_gib": limit_gib,
        "feasible": len(feasible),
        "picked": f"{own[0]} x {own[1]}",
        "fastest": f"{fastest['strategy']} x {fastest['micro_batch']}",
        "slower": picked["measured_s"] / fastest["measured_s"] - 1,
    }


if __name__ == "__main__":
    sys.exit(main())
