"""What reading the ledger of a very long run costs: time and memory of goodput, report and status.

    python benchmarks/ledger.py                    # 2,000,000 steps, 740 MB
    python benchmarks/ledger.py --steps 100000

Ends with code 1 where a command takes more than --limit-s CPU seconds or --limit-mb of memory.
Seconds are those of the CPU, so that a busy machine does not change them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timed_command import ROOT

SAVE_EVERY, EVALUATE_EVERY, STOP_EVERY = 500, 2_000, 200_000
STEP_S = 1.5
COMMANDS = (("goodput",), ("goodput", "--json"), ("report", "--out", "report.html"), ("status",))


def lines(steps: int) -> Iterator[str]:
    """Yield the ledger of a run of two ranks that was stopped now and then."""
    now, attempt = 1.8e9, 0

    def line(event: str, step: int, **facts: Any) -> str:
        at_s = now - zero
        stamp = {"attempt": attempt, "time": now, "at_s": at_s, "event": event, "step": step}
        return json.dumps({**stamp, **facts}) + "\n"

    for step in range(1, steps + 1):
        if step % STOP_EVERY == 1:
            attempt, zero, now = attempt + 1, now + 60.0, now + 80.0
            yield line(
                "start", step - 1, steps=steps, world_size=2, strategy="fsdp", startup_s=9.0,
                load_s=10.0, device="cpu", hosts=["node1"], base_parameters=8_000_000_000,
            )  # fmt: skip
        now += STEP_S
        loss = 2.0 + 1.0 / (1.0 + step / steps) + (step * 7919 % 1000) / 5000.0
        yield line(
            "step", step, loss=loss, grad_norm=loss / 3.0, lr=1e-4, rows=16, cursor=16 * step,
            tokens=4096, tokens_per_s=2731.0 + step % 97, mfu=0.31, rank_step_s=[1.31, 1.32],
            rank_memory_bytes=[12_000_000_000, 12_100_000_000], peak_memory_bytes=12_000_000_000,
        )  # fmt: skip
        if step % SAVE_EVERY == 0:
            now += 0.2
            yield line("checkpoint", step, stall_s=0.2)
            yield line("saved", step, seconds=1.0, bytes=50_000_000)
        if step % EVALUATE_EVERY == 0:
            now += 20.0
            yield line("evaluation", step, eval_loss=loss, seconds=20.0)
        if step % STOP_EVERY == 0 or step == steps:
            yield line("end", step, outcome="done" if step == steps else "interrupted")


def make_run(folder: Path, steps: int) -> int:
    """Make a run directory; return the bytes of its ledger."""
    (folder / "attempts").mkdir(parents=True)
    (folder / "logs").mkdir()
    recipe = "model: {name: base}\nmethod: {kind: lora}\ndata: {train: rows.jsonl}\n"
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    (folder / "run.json").write_text("{}\n", encoding="utf-8")
    ledger = folder / "ledger.jsonl"
    with ledger.open("w", encoding="utf-8", buffering=1 << 20) as file:
        file.writelines(lines(steps))
    return ledger.stat().st_size


def measure(words: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Run a command on the run; return its CPU seconds and its largest memory in MB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_dist", words[0], "run", *words[1:]],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    shown = process.stdout.read()
    _, code, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode or not shown:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def main() -> int:
    """Make the run, measure every command and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2_000_000)
    parser.add_argument("--limit-s", type=float, default=15.0)
    parser.add_argument("--limit-mb", type=float, default=500.0)
    options = parser.parse_args()
    slow = False
    with tempfile.TemporaryDirectory(prefix="peft-dist-") as name:
        size = make_run(Path(name, "run"), options.steps)
        print(f"{options.steps:,} steps, {size / 1e6:.0f} MB")
        print(f"{'command':28} {'CPU s':>7} {'MB':>7}")
        for words in COMMANDS:
            seconds, megabytes = measure(words, Path(name))
            slow = slow or seconds > options.limit_s or megabytes > options.limit_mb
            print(f"{' '.join(words):28} {seconds:7.1f} {megabytes:7.0f}", flush=True)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
