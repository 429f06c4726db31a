"""Train every adapter family on one real task, each by its shipped recipe, and print a table.

With `--ranks`: LoRA of several ranks by the quickstart's recipe, with and without rsLoRA, two seeds
each. `python benchmarks/methods.py` needs the quickstart's model; `make methods` sees to that. Ends
with code 1 where a family does not reach its accuracy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEAST_ACCURACY = {
    "quickstart": 0.82,
    "bottleneck": 0.82,
    "prefix": 0.82,
    "prompt": 0.75,
    "bitfit": 0.80,
}
"""What a recipe that learns reaches on the held-out rows, by its name."""
MOST_SECONDS = 300.0
"""Training and evaluation together, on two CPU cores."""

RANKS = (8, 16, 32, 64)
SEEDS = (0, 1)


def main() -> int:
    """Train the recipes asked for and say how they did."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipes", nargs="*", default=list(LEAST_ACCURACY))
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    parser.add_argument("--ranks", action="store_true", help="compare ranks of LoRA instead")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
        if arguments.ranks:
            print(_ranks(folder))
            return 0
        results = {name: _train(name, folder / name) for name in arguments.recipes}
    print(_table(results))
    short = [
        name
        for name, result in results.items()
        if result["eval"]["last"]["accuracy"] < LEAST_ACCURACY[name]
        or result["train_seconds"] > MOST_SECONDS
    ]
    print(f"below its accuracy or over {MOST_SECONDS:.0f} s: {', '.join(short) or 'none'}")
    return 1 if short else 0


def _ranks(folder: Path) -> str:
    """Train LoRA of each rank and scaling twice, two runs at a time; return a table.

    Alpha is 16 throughout. An update is scaled by alpha / rank, which is meant to suit one learning
    rate, or with rsLoRA by alpha / sqrt(rank): there the rate is such that the two together are as
    at rank 8, so that what differs is the rank.
    """

    def run(rank: int, rslora: bool, seed: int) -> dict[str, Any]:
        rate = 1e-3 * (rank**0.5 / 8 if rslora else 1)
        settings = {
            "method.rank": rank,
            "method.rslora": str(rslora).lower(),
            "train.learning_rate": f"{rate:.2e}",
            "train.seed": seed,
            "model.dtype": "bfloat16",  # twice as fast, on CPUs that have it
            "train.micro_batch_size": 16,
            "evaluate.at_start": "false",
            "parallel.strategy": "ddp",
            "parallel.processes": 1,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        return _train("quickstart", folder / f"{rank}-{rslora}-{seed}", overrides)

    kinds = [(rank, rslora) for rank in RANKS for rslora in (False, True)]
    with ThreadPoolExecutor(2) as pool:
        futures = {kind: [pool.submit(run, *kind, seed) for seed in SEEDS] for kind in kinds}
        results = {kind: [one.result() for one in found] for kind, found in futures.items()}
    lines = ["| rank | rslora | accuracy | held-out loss | adapter, kB | training, s |"]
    lines.append("|---|---|---|---|---|---|")
    for (rank, rslora), found in results.items():
        scores = [result["eval"]["last"] for result in found]
        accuracy, loss = (
            ", ".join(f"{score[name]:.3f}" for score in scores) for name in ("accuracy", "loss")
        )
        seconds = sum(result["train_seconds"] for result in found) / len(found)
        size = found[0]["adapter_bytes"] / 1e3
        lines.append(
            f"| {rank} | {'yes' if rslora else 'no'} | {accuracy} | {loss} | {size:,.0f} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)


def _train(name: str, run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    started = time.monotonic()
    recipe = ROOT / "configs" / "recipes" / f"{name}.yaml"
    command = [sys.executable, "-m", "peft_dist", "train", str(recipe), *overrides]
    command += ["--run-dir", str(run)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=1200)
    result: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["whole_seconds"] = time.monotonic() - started
    result["adapter_bytes"] = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    return result


def _table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| recipe | accuracy before | after | trained parameters | adapter, kB | training, s "
        "| peak memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        score = result["eval"]
        lines.append(
            f"| `{name}.yaml` | {score['first']['accuracy']:.3f} | {score['last']['accuracy']:.3f} "
            f"| {result['trainable_parameters']:,} | {result['adapter_bytes'] / 1e3:,.0f} "
            f"| {result['train_seconds']:.0f} "
            f"| {max(result['peak_rss_bytes_per_rank']) / 1e6:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
