"""What tokenising a million short chats costs, and what opening them costs at the next start.

`PYTHONPATH=. python benchmarks/rows.py` needs the quickstart's model, for its tokenizer, and two
cores, which it keeps to. The libraries are imported before the clock starts, as a rank's are. Peak
memory is the proportional set size of all processes together. Ends with code 1 where it takes more
than six minutes, 1.5 GB, or two seconds at the next start.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from peft_dist.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "recipes" / "quickstart.yaml"
WORDS = ("the", "cat", "sat", "on", "some", "mat", "and", "ran", "after", "every", "river", "barn")
MOST_SECONDS, MOST_GB, MOST_SECONDS_NEXT = 360.0, 1.5, 2.0
SAMPLE_S = 0.5
CORES = 2


def main() -> int:
    """Write the rows, tokenise them in a process of its own, open them in another."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        _tokenise(arguments.folder)
        return 0
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(row)}\n" for row in _chats(arguments.rows))
        model = QUICKSTART.parent / load_recipe(QUICKSTART, check_paths=False).model.name
        recipe = {"model": {"name": str(model)}, "data": {"train": "rows.jsonl"}}
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        first, next_start = _measured(folder), _measured(folder)
    print("| rows | tokens | wall, s | CPU, s | peak memory, GB | next start, s |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {arguments.rows:,} | {first['tokens']:,} | {first['wall_s']:.0f} "
        f"| {first['cpu_s']:.0f} | {first['peak_gb']:.2f} | {next_start['wall_s']:.1f} |"
    )
    slow = (
        first["wall_s"] > MOST_SECONDS
        or first["peak_gb"] > MOST_GB
        or next_start["wall_s"] > MOST_SECONDS_NEXT
    )
    return int(slow)


def _chats(count: int) -> Iterator[dict[str, object]]:
    """Yield conversations of two or four turns, some words each."""
    source = random.Random(0)
    for _ in range(count):
        turns = []
        for number in range(source.choice((2, 2, 4))):
            words = " ".join(source.choices(WORDS, k=source.randint(3, 15)))
            turns.append({"role": ("user", "assistant")[number % 2], "content": words})
        yield {"messages": turns}


def _measured(folder: Path) -> dict[str, float]:
    """Tokenise, or open, the rows in another process; return its figures and its tree's peak."""
    command = [sys.executable, __file__, "--folder", str(folder)]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak, spent_s = 0, dict[int, float]()
    while process.poll() is None:
        held = 0
        with suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    held += one.memory_full_info().pss
                    used = one.cpu_times()
                    spent_s[one.pid] = used.user + used.system
        peak = max(peak, held)
        time.sleep(SAMPLE_S)
    if process.returncode:
        raise SystemExit(f"{command} ended with code {process.returncode}")
    found: dict[str, float] = json.loads(process.stdout.read())
    return found | {"peak_gb": peak / 1e9, "cpu_s": sum(spent_s.values())}


def _tokenise(folder: Path) -> None:
    """Do what a start does with the rows, and print its figures as JSON."""
    from transformers import AutoTokenizer

    from peft_dist.data.token_cache import tokenize_rows

    assert AutoTokenizer.__name__  # transformers imports it when it is asked for
    recipe = load_recipe(folder / "recipe.yaml")
    started = time.monotonic()
    rows = tokenize_rows(recipe, "train", folder / "cache")
    wall_s = time.monotonic() - started
    print(json.dumps({"tokens": len(rows.tokens), "wall_s": wall_s}))


if __name__ == "__main__":
    sys.exit(main())
