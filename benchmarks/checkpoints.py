"""What a checkpoint costs: how long training stands still, and how much is written.

The same LoRA job saves every few steps through TRL's trainer and through us, in turns. Needs the
quickstart's model; `trl_worker.py` says how TRL is set up. It judges nothing.

    python benchmarks/checkpoints.py --json checkpoints.json
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from peers import SETTLING_STEPS, Job, first_rows, machine, recipe
from timed_command import ROOT, free_port, run_command

from peft_dist.ledger.events import CheckpointEvent, SavedEvent, StepEvent
from peft_dist.ledger.reader import LedgerReader

SIDES = {"trl": "TRL ddp", "ours": "ours fsdp"}
Figures = dict[str, list[float]]
"""`step_s`, `after_s`: of steps that follow no save, or one; `stall_s`, `bytes`: of saves."""


def run_trl(job: Job, every: int, *, folder: Path, cache: Path) -> Figures:
    """Train once through TRL, saving."""
    out = folder / "trl.json"
    argv = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(job.processes), "--master-port", str(free_port())),
        *(str(ROOT / "benchmarks" / "trl_worker.py"), "--model", str(job.model)),
        *("--rows", str(job.rows), "--steps", str(job.steps), "--out", str(out)),
        *("--global-batch", str(job.global_batch), "--save-every", str(every)),
    ]
    run_command(argv, folder=folder, cache=cache, limit_s=job.time_limit_s)
    result = json.loads(out.read_text())
    ended = result["step_ended"]
    took = {step: ended[step - 1] - ended[step - 2] for step in range(2, job.steps + 1)}
    stalls = [save["stall_s"] for save in result["saves"]]
    for save, stall in enumerate(stalls[:-1], start=1):  # a save lies between two steps
        took[save * every + 1] -= stall
    return figures(took, every, stalls, [save["bytes"] for save in result["saves"]])


def run_ours(job: Job, every: int, *, folder: Path, cache: Path) -> Figures:
    """Train once through `peft-dist train`, saving."""
    path, run_dir = folder / "recipe.yaml", folder / "run"
    settings = recipe(job, "fsdp") | {"checkpoint": {"every_steps": every}}
    path.write_text(json.dumps(settings))  # JSON is YAML
    argv = [sys.executable, "-m", "peft_dist", "train", str(path), "--run-dir", str(run_dir)]
    run_command(argv, folder=folder, cache=cache, limit_s=job.time_limit_s)
    events = list(LedgerReader(run_dir / "ledger.jsonl").all())
    took = {
        event.step: event.tokens / event.tokens_per_s
        for event in events
        if isinstance(event, StepEvent) and event.tokens is not None
    }
    return figures(
        took,
        every,
        [
            event.stall_s
            for event in events
            if isinstance(event, CheckpointEvent) and event.stall_s is not None
        ],
        [
            event.bytes
            for event in events
            if isinstance(event, SavedEvent) and event.bytes is not None
        ],
    )


def figures(took: dict[int, float], every: int, stalls: list[float], sizes: list[float]) -> Figures:
    """Sort the seconds of steps by whether a save came right before them."""
    settled = {step: seconds for step, seconds in took.items() if step > SETTLING_STEPS}
    return {
        "step_s": [seconds for step, seconds in settled.items() if (step - 1) % every],
        "after_s": [seconds for step, seconds in settled.items() if not (step - 1) % every],
        "stall_s": stalls,
        "bytes": sizes,
    }


def summarize(runs: list[Figures], adapter_bytes: int) -> dict[str, float]:
    """Reduce all rounds of one side to the figures of the table."""

    def of(name: str) -> list[float]:
        return [value for run in runs for value in run[name]]

    step = median(of("step_s"))
    return {
        "s/step, median": step,
        "stall per save, median, ms": 1e3 * median(of("stall_s")),
        "stall per save, longest, ms": 1e3 * max(of("stall_s")),
        "stall / step, median": median(of("stall_s")) / step,
        "step after a save / other steps": median(of("after_s")) / step,
        "written per save, MB": median(of("bytes")) / 1e6,
        "written / (adapter + moments)": median(of("bytes")) / (3 * adapter_bytes),
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = Path("~/.cache/peft-dist/models/smollm2-135m-instruct")
    parser.add_argument("--model", type=Path, default=model, help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=22)
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every side")
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    return parser.parse_args()


def main() -> int:
    """Run both sides in turns and print the table."""
    args = arguments()
    runs: dict[str, list[Figures]] = {side: [] for side in SIDES}
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as name:
        work = Path(name)
        rows = work / "rows.jsonl"
        source = ROOT / "configs" / "data" / "wordnet_category_train.jsonl"
        first_rows(source, rows, args.steps * 16)
        job = Job(args.model.expanduser(), rows, args.steps, 16, 2, "float32", 300.0)
        trained = 0
        for turn in range(args.rounds):
            for side, run in (("trl", run_trl), ("ours", run_ours)):
                folder = work / f"{side}-{turn}"
                folder.mkdir()
                runs[side].append(run(job, args.every, folder=folder, cache=work / f"{side}-cache"))
            result = json.loads((folder / "run" / "result.json").read_text())
            trained = result["trainable_parameters"]
    summary = {side: summarize(found, 4 * trained) for side, found in runs.items()}
    print(f"\n{trained:,} trained parameters, a save every {args.every} of {args.steps} steps\n")
    print(f"{'':34}" + "".join(f"{title:>12}" for title in SIDES.values()))
    for figure in summary["trl"]:
        print(f"{figure:34}" + "".join(f"{summary[side][figure]:12.3f}" for side in SIDES))
    if load_before > 0.5:
        print(f"\nThe machine was busy at the start (load {load_before:.1f}): repeat when idle")
    if args.json:
        report: dict[str, Any] = {
            "machine": machine(),
            "load_before": load_before,
            "summary": summary,
            "runs": runs,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
