"""Train the same QLoRA job on CPU through TRL and through us, in turns, and print one table.

Same model, rows, global batch, LoRA targets, optimizer, learning rate and NF4 base. Sides take
turns round after round, so that a busy machine slows all of them. It judges nothing: the numbers
and their ratios are the result. `trl_worker.py` says how TRL is set up and why.

    python benchmarks/peers.py --json peers.json
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from timed_command import ROOT, free_port, run_command

from peft_dist.ledger.events import StepEvent
from peft_dist.ledger.reader import LedgerReader

SIDES = {"trl": "TRL ddp", "ddp": "ours ddp", "fsdp": "ours fsdp"}
SETTLING_STEPS = 2
"""First steps left out of s/step and tokens/s: allocators and caches fill in them."""


@dataclass(frozen=True)
class Job:
    """What both sides train."""

    model: Path
    rows: Path
    steps: int
    global_batch: int
    processes: int
    compute: str
    time_limit_s: float


@dataclass(frozen=True)
class Run:
    """What one run of one side measured."""

    side: str
    round: int
    first_step_s: float
    """From starting the command to the end of the first optimizer step."""
    step_s: list[float]
    """From the end of one step to the end of the next, settling steps left out."""
    tokens: list[int]
    """Real tokens of every step over all processes, padding excluded."""
    loss: list[float]
    peak_rss_bytes_per_rank: list[int]
    base_bytes_per_rank: list[int]


def as_run(
    side: str,
    round_number: int,
    *,
    started: float,
    ended: list[float],
    tokens: list[int],
    loss: list[float],
    result: dict[str, Any],
) -> Run:
    """Make a run of the clock times at which the command started and each step ended."""
    gaps = [after - before for before, after in zip(ended, ended[1:], strict=False)]
    return Run(
        side,
        round_number,
        ended[0] - started,
        gaps[SETTLING_STEPS - 1 :],
        tokens,
        loss,
        _list(result["peak_rss_bytes_per_rank"]),
        _list(result["base_bytes_per_rank"]),
    )


def _list(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]


def recipe(job: Job, strategy: str) -> dict[str, Any]:
    """Return our recipe for the job; no evaluation, so that only training is timed."""
    return {
        "model": {"name": str(job.model), "dtype": job.compute},
        "quantization": "nf4",
        "method": {"kind": "lora", "rank": 8, "alpha": 16.0, "targets": "all-linear"},
        # TRL runs without a length limit: a row that ours would cut must stop the benchmark.
        "data": {"train": str(job.rows), "truncation": "error", "packing": True},
        "train": {
            "steps": job.steps,
            "global_batch_size": job.global_batch,
            "micro_batch_size": job.global_batch // job.processes,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "warmup_fraction": 0.0,
            "seed": 0,
        },
        "parallel": {"strategy": strategy, "processes": job.processes},
    }


def run_trl(job: Job, round_number: int, *, folder: Path, cache: Path) -> Run:
    """Run TRL's side once."""
    out = folder / "trl.json"
    argv = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(job.processes), "--master-port", str(free_port())),
        *(str(ROOT / "benchmarks" / "trl_worker.py"), "--model", str(job.model)),
        *("--rows", str(job.rows), "--steps", str(job.steps), "--out", str(out)),
        *("--global-batch", str(job.global_batch), "--compute", job.compute),
    ]
    started = run_command(argv, folder=folder, cache=cache, limit_s=job.time_limit_s)
    result = json.loads(out.read_text())
    return as_run(
        "trl",
        round_number,
        started=started,
        ended=result["step_ended"],
        tokens=result["tokens"],
        loss=result["loss"],
        result=result,
    )


def run_ours(job: Job, round_number: int, strategy: str, *, folder: Path, cache: Path) -> Run:
    """Run our side once under one strategy."""
    path, run_dir = folder / "recipe.yaml", folder / "run"
    path.write_text(json.dumps(recipe(job, strategy), indent=1))  # JSON is YAML
    argv = [sys.executable, "-m", "peft_dist", "train", str(path), "--run-dir", str(run_dir)]
    started = run_command(argv, folder=folder, cache=cache, limit_s=job.time_limit_s)
    events = LedgerReader(run_dir / "ledger.jsonl").all()
    steps = [event for event in events if isinstance(event, StepEvent)]
    return as_run(
        strategy,
        round_number,
        started=started,
        ended=[step.time for step in steps],
        tokens=[step.tokens for step in steps if step.tokens is not None],
        loss=[step.loss for step in steps],
        result=json.loads((run_dir / "result.json").read_text()),
    )


def summarize(runs: list[Run]) -> dict[str, float]:
    """Reduce all rounds of one side to the figures of the table."""
    rates = [sum(run.tokens[SETTLING_STEPS:]) / sum(run.step_s) for run in runs]
    return {
        "first step, cold caches, s": runs[0].first_step_s,
        "first step, warm caches, s": median([r.first_step_s for r in runs[1:] or runs]),
        "s/step, median": median([s for run in runs for s in run.step_s]),
        "s/step, fastest": min(s for run in runs for s in run.step_s),
        "tokens/s": median(rates),
        "peak memory per rank, MB": max(max(r.peak_rss_bytes_per_rank) for r in runs) / 1e6,
        "base per rank, MB": max(max(r.base_bytes_per_rank) for r in runs) / 1e6,
        "mean train loss": mean(mean(r.loss) for r in runs),
        "last-step train loss": mean(r.loss[-1] for r in runs),
    }


def table(summary: dict[str, dict[str, float]]) -> str:
    """Lay the figures out, one line each, every side with its ratio to TRL."""
    sides = list(summary)
    header = f"{'':28}" + "".join(
        f"{SIDES[s]:>12}" + (f"{'/ TRL':>8}" if s != "trl" and "trl" in sides else "")
        for s in sides
    )
    lines = [header]
    for name in summary[sides[0]]:
        line = f"{name:28}"
        for side in sides:
            value = summary[side][name]
            line += f"{value:12.{1 if value >= 100 else 3}f}"
            if side != "trl" and "trl" in sides:
                line += f"{value / summary['trl'][name]:8.2f}"
        lines.append(line)
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "trl", "datasets")
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"cores": os.cpu_count(), "arch": platform.machine(), "versions": versions}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = Path("~/.cache/peft-dist/models/smollm2-135m-instruct")
    rows = ROOT / "configs" / "data" / "wordnet_category_train.jsonl"
    parser.add_argument("--model", type=Path, default=model, help="folder (default: %(default)s)")
    parser.add_argument(
        "--rows",
        type=Path,
        default=rows,
        help="JSONL of prompt/completion rows; "
        "the first steps x global batch of them are trained, each once",
    )
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a run")
    parser.add_argument("--global-batch", type=int, default=16, help="rows per step, all ranks")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="turns of every side")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds per run")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    args = parser.parse_args()
    args.model, args.rows = args.model.expanduser().resolve(), args.rows.resolve()
    if not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model}: no config.json there; `make quickstart` makes it")
    if not args.rows.is_file():
        parser.error(f"--rows {args.rows}: no such file")
    if args.steps <= SETTLING_STEPS:
        parser.error(f"--steps {args.steps}: give more than the {SETTLING_STEPS} settling steps")
    if args.global_batch % args.processes:
        parser.error(f"--global-batch {args.global_batch} does not divide by --processes")
    return args


def first_rows(source: Path, target: Path, count: int) -> None:
    """Copy the first `count` rows: both sides then see the same rows once, in their own order."""
    rows = source.read_text(encoding="utf-8").splitlines()
    if len(rows) < count:
        sys.exit(f"peers: {source} has {len(rows)} rows, steps x global batch needs {count}")
    target.write_text("\n".join(rows[:count]) + "\n", encoding="utf-8")


def main() -> int:
    """Run all sides in turns and print the table."""
    args = arguments()
    runs: list[Run] = []
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        work = Path(name)
        rows = work / "rows.jsonl"
        first_rows(args.rows, rows, args.steps * args.global_batch)
        job = Job(
            args.model,
            rows,
            args.steps,
            args.global_batch,
            args.processes,
            args.compute,
            args.time_limit,
        )
        for round_number in range(args.rounds):
            for side in args.sides:
                folder = work / f"{side}-{round_number}"
                folder.mkdir()
                # One cache per side: no side may find what another has quantized or tokenised.
                cache = work / f"{side}-cache"
                run = (
                    run_trl(job, round_number, folder=folder, cache=cache)
                    if side == "trl"
                    else run_ours(job, round_number, side, folder=folder, cache=cache)
                )
                runs.append(run)
                print(
                    f"round {round_number + 1} {SIDES[side]:10} first step"
                    f" {run.first_step_s:5.1f} s, then {median(run.step_s):.3f} s/step",
                    flush=True,
                )
    summary = {side: summarize([r for r in runs if r.side == side]) for side in args.sides}
    print(
        f"\n{args.model.name}, NF4 + LoRA r=8 on all linears, {args.compute}, {args.processes} CPU"
        f" processes, {args.global_batch} rows a step, {args.steps} steps, {args.rounds} rounds\n"
    )
    print(table(summary))
    totals = {SIDES[side]: {sum(r.tokens) for r in runs if r.side == side} for side in args.sides}
    if len(set.union(*totals.values())) > 1:
        print(f"\nNot the same tokens on every side: {totals}")
    if load_before > 0.5:
        print(f"\nThe machine was busy at the start (load {load_before:.1f}): repeat when idle")
    if args.json:
        report = {
            "machine": machine(),
            "load_before": load_before,
            "settings": {k: str(v) for k, v in vars(args).items()},
            "summary": summary,
            "runs": [asdict(run) for run in runs],
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
