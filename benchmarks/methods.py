"""Train every adapter family on one real task, each by its shipped recipe, and print a table.

`python benchmarks/methods.py` needs the quickstart's model; `make methods` sees to that. Ends with
code 1 where a family does not reach its accuracy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
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


def main() -> int:
    """Train the recipes asked for and say how they did."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("recipes", nargs="*", default=list(LEAST_ACCURACY))
    parser.add_argument("--out", type=Path, help="folder of the runs; default: a temporary one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.out or Path(temporary)
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


def _train(name: str, run: Path) -> dict[str, Any]:
    started = time.monotonic()
    recipe = ROOT / "configs" / "recipes" / f"{name}.yaml"
    command = [sys.executable, "-m", "peft_dist", "train", str(recipe), "--run-dir", str(run)]
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
