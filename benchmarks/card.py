"""Measure one real card in under ten minutes, and write all of it into one JSON: `make gpu`.

Values of the card's kernels against the CPU's, whether two trainings agree to the bit, the
quickstart with a trace of some steps, speed and memory of an 8B over quantization, engine,
recomputation and row length, and the tests of `tests/gpu`, as far as the time goes. `--dry` takes a
tiny model and judges nothing: on the fake CUDA runtime there are no values.

    PYTHONPATH=. python benchmarks/card.py --json card.json
"""

import argparse
import gc
import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bitsandbytes
import gpu
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from peft_dist import __version__
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.methods.fused import Shape, find_problem
from peft_dist.model import attention, capped, fp8, varlen
from peft_dist.model.cross_entropy import cross_entropy
from peft_dist.model.nf4 import dequantize, quantize_rows
from peft_dist.model.token_rows import OutputMatrix
from peft_dist.worker.process import set_allocator

SECONDS = 540.0
"""Time for all of it; what is not done by then is named and left out."""
TOKENS = 8192
"""Of a micro-batch: rows of every length are as many as these hold."""
LENGTHS = (2048, 512, 8192)
ATTENTION = (("causal", None, None), ("window", 64, None), ("capped", None, 30.0))
"""Names, windows and caps of scores."""


def main(words: list[str] | None = None) -> int:
    """Measure, write the JSON and print its table; return 1 where a value is wrong."""
    reader = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    reader.add_argument("--json", type=Path, default=Path("card.json"))
    reader.add_argument("--seconds", type=float, default=SECONDS)
    reader.add_argument("--dry", action="store_true", help="a tiny model, and no judgement")
    options = reader.parse_args(words)
    set_allocator(os.environ)
    world = read_world()
    if world.device.type != "cuda":
        print("no GPU that torch sees", file=sys.stderr)
        return 2
    until = time.monotonic() + options.seconds
    process_group.start(world)
    report: dict[str, Any] = {"facts": facts(world), "values": values(world.device)}
    report["determinism"] = repeats(options, world)
    report["quickstart"] = {} if options.dry else quickstart(until)
    report["speed"], report["left_out"] = speed(options, world, until)
    report["tests"] = {} if options.dry else tests(until)
    options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(f"written: {options.json}")
    return 0 if options.dry else int(bool(faults(report)))


def facts(world: World) -> dict[str, Any]:
    """Return what the figures belong to."""
    properties = torch.cuda.get_device_properties(world.device)
    return {
        "device": world.device_name,
        "capability": list(torch.cuda.get_device_capability(world.device)),
        "memory_bytes": properties.total_memory,
        "peft_dist": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "one_attention_call": varlen.has_kernel(world.device, torch.bfloat16),
    }


def values(device: torch.device) -> dict[str, Any]:
    """Compare the card's kernels with the CPU's."""
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 4096, generator=source)
    packed, absmax = quantize_rows(weight, 64)
    packed_there, absmax_there = (part.cpu() for part in quantize_rows(weight.to(device), 64))
    plain = dequantize(packed, absmax, block_size=64, dtype=torch.float32)
    there = dequantize(packed.to(device), absmax.to(device), block_size=64, dtype=torch.float32)
    found: dict[str, Any] = {
        "nf4_bytes": packed.numel(),
        "nf4_bytes_that_differ": int((packed != packed_there).sum()),
        "nf4_scales_that_differ": int((absmax != absmax_there).sum()),
        "nf4_dequantized_difference": float((plain - there.cpu()).abs().max()),
    }
    found["cross_entropy_difference"] = cross_entropy_difference(device)
    found["fused_lora_problem"] = find_problem(Shape(1024, 4096, 64, 16), device, torch.bfloat16)
    if varlen.has_kernel(device, torch.bfloat16):
        for name, window, softcap in ATTENTION:
            found[f"attention_{name}_difference"] = attention_difference(device, window, softcap)
    if torch.cuda.get_device_capability(device) >= fp8.LEAST_CAPABILITY:
        found["fp8_problem"] = fp8.find_problem(1024, 4096, 64, device)
    return found


def cross_entropy_difference(device: torch.device) -> float:
    """Return how far loss and gradient are from the CPU's in float32, relative."""
    source = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(rows, 512, generator=source).mul(0.2).to(torch.bfloat16) for rows in (300, 9000)
    )
    targets = torch.randint(9000, (300,), generator=source)
    worst, found = 0.0, []
    for place, dtype in ((device, torch.bfloat16), (torch.device("cpu"), torch.float32)):
        own = hidden.clone().to(place, dtype).requires_grad_()
        matrix = OutputMatrix(weight.to(place, dtype), None)
        nll = cross_entropy(own, matrix, targets.to(place), None)
        nll.sum().backward()
        assert own.grad is not None
        found.append((nll.detach().cpu().float(), own.grad.cpu().float()))
    for ours, theirs in zip(*found, strict=True):
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    return worst


def attention_difference(
    device: torch.device, window: int | None, softcap: float | None = None
) -> float:
    """Return how far outputs and gradients of one call are from the CPU's in float32, relative."""
    lengths, heads, groups, size = (300, 7, 129), 8, 2, 128
    total, source = sum(lengths), torch.Generator().manual_seed(1)
    shapes = [(1, count, total, size) for count in (heads, groups, groups)]
    parts = [torch.randn(shape, generator=source).to(torch.bfloat16) for shape in shapes]
    ours = [part.to(device).requires_grad_() for part in parts]
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    if softcap is None:
        one_call = varlen.attend_rows(
            *ours,
            row_bounds=ends.to(device),
            longest=max(lengths),
            past=None,
            scaling=None,
            sliding_window=window,
        )
    else:
        places = torch.cat([torch.arange(length) for length in lengths]).to(device)
        blocks = capped.row_blocks(places, window=window, learned=0, softcap=softcap)
        in_blocks = capped.attend_rows(*ours, blocks=blocks, past=None, scaling=None)
        if in_blocks is None:
            return float("nan")  # it does not compile; a warning says why
        one_call = in_blocks
    one_call.float().square().sum().backward()
    theirs = [part.float().requires_grad_() for part in parts]
    rows = []
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in theirs), strict=True):
        if softcap is not None:
            rows.append(attention.capped_attention(q, k, v, window or total, 0.0, None, softcap))
            continue
        place = torch.arange(q.shape[2])
        distance = place[:, None] - place[None, :]
        mask = (distance >= 0) & (distance < (window or total))
        rows.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True))
    reference = torch.cat(rows, dim=2).transpose(1, 2)
    reference.square().sum().backward()
    pairs = [(one_call, reference), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
    worst = 0.0
    for found, wanted in pairs:
        assert found is not None and wanted is not None
        difference = (found.detach().cpu().float() - wanted.detach()).abs().max()
        worst = max(worst, float(difference / wanted.detach().abs().max()))
    return worst


def repeats(options: argparse.Namespace, world: World) -> dict[str, bool]:
    """Train a small model twice, with and without `train.deterministic`; compare the bits."""
    found = {}
    for name in ("deterministic", "as it is"):
        words = ["--shape", "tiny", "--rows", "8", "--length", "128", "--shortest", "16"]
        words += ["--steps", "5", "--strategy", "ddp"]
        words += ["--deterministic"] if name == "deterministic" else []
        adapters = []
        for _ in range(2):
            with TemporaryDirectory(prefix="peft-dist-") as folder:
                trainer = gpu.make_trainer(gpu.arguments(words), world, Path(folder))
            trainer.run()
            adapters.append(trainer.setup.engine.adapter_state())
        first, second = adapters
        found[name] = all(torch.equal(first[key], second[key]) for key in first)
    torch.use_deterministic_algorithms(False)
    return found


def cases(options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the command lines of the matrix, the most telling first."""
    shape = ["--shape", "tiny"] if options.dry else []
    tokens = 256 if options.dry else TOKENS
    lengths = (128, 64) if options.dry else LENGTHS
    for quantization, recomputed in itertools.product(("nf4", "none"), (False, True)):
        for strategy, length in itertools.product(("ddp", "fsdp"), lengths):
            words = [*shape, "--quantization", quantization, "--strategy", strategy]
            words += ["--length", str(length), "--rows", str(max(1, tokens // length))]
            words += ["--steps", "8"] + ["--activation-checkpointing"] * recomputed
            yield words
            if length == lengths[0]:
                yield [*words, "--shortest", str(length // 10)]
                if quantization == "nf4":
                    yield [*words, "--fused"]
                    if torch.cuda.get_device_capability() >= fp8.LEAST_CAPABILITY:
                        yield [*words, "--fp8"]
                if quantization == "nf4" and not recomputed:
                    few = [*words, "--length", str(min(lengths)), "--rows", "1"]
                    yield few
                    yield [*few, "--dequantized", "99"]


def speed(
    options: argparse.Namespace, world: World, until: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure the cases until the time is over; return the figures, and what is left out."""
    done: list[dict[str, Any]] = []
    left: list[str] = []
    for words in cases(options):
        if time.monotonic() > until:
            left.append(" ".join(words))
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        try:
            found = gpu.measure(gpu.arguments(words), world)
        except torch.OutOfMemoryError:
            found = {"out_of_memory": True}
        done.append({"case": " ".join(words), "seconds": time.monotonic() - started, **found})
    return done, left


def quickstart(until: float) -> dict[str, Any]:
    """Train the quickstart on the card; return its result and the kernels of steps 10 to 12."""
    recipe = str(Path(__file__).parents[1] / "configs" / "recipes" / "quickstart.yaml")
    with TemporaryDirectory(prefix="peft-dist-") as folder:
        run = Path(folder, "run")
        own = ["parallel.processes=1", "profile.steps=[10,12]"]
        for command in (
            ["-m", "peft_dist.entrypoints.quickstart", recipe],
            ["-m", "peft_dist", "train", recipe, "--run-dir", str(run), *own],
        ):
            left_s = max(60.0, until - time.monotonic())
            try:
                ended = subprocess.run(
                    [sys.executable, *command], capture_output=True, text=True, timeout=left_s,
                    check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return {"left_out": "not done in time"}
            if ended.returncode:
                return {"left_out": (ended.stderr or ended.stdout).strip().splitlines()[-1:]}
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        (trace,) = (run / "profile").iterdir()
        return {"result": result, "microseconds_by_kernel": longest_kernels(trace)}


def longest_kernels(trace: Path, kind: str = "kernel", count: int = 20) -> dict[str, float]:
    """Return the microseconds of the kernels of a trace by name, the longest first."""
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == kind:
            spent[event["name"][:120]] += event["dur"]
    return dict(spent.most_common(count))


def tests(until: float) -> dict[str, Any]:
    """Run tests/gpu in a process of its own, as long as there is time."""
    folder = Path(__file__).parents[1] / "tests" / "gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    started = time.monotonic()
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=max(60.0, until - started), check=False
        )
    except subprocess.TimeoutExpired:
        return {"exit_code": None, "last_line": "not done in time"}
    lines = ended.stdout.strip().splitlines() or [""]
    return {"exit_code": ended.returncode, "last_line": lines[-1]}


def faults(report: dict[str, Any]) -> list[str]:
    """Return what is wrong on this card."""
    checked = report["values"]
    limits = {"nf4_dequantized_difference": 1e-6, "cross_entropy_difference": 0.02}
    limits |= {f"attention_{name}_difference": 0.02 for name, _, _ in ATTENTION}
    wrong = [name for name, limit in limits.items() if not checked.get(name, 0.0) <= limit]
    if checked["fused_lora_problem"]:
        wrong.append(f"method.fused: {checked['fused_lora_problem']}")
    if checked.get("fp8_problem"):
        wrong.append(f"model.fp8: {checked['fp8_problem']}")
    if not report["determinism"]["deterministic"]:
        wrong.append("two deterministic trainings differ")
    if report["tests"].get("exit_code") not in (0, None):
        wrong.append("tests/gpu")
    return wrong


def table(report: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    lines = ["| case | tokens/s/GPU | MFU(4N) | peak | reserved |", "|---|---|---|---|---|"]
    for row in report["speed"]:
        if "out_of_memory" in row:
            lines.append(f"| {row['case']} | out of memory | | | |")
            continue
        memory, mfu = row["memory_bytes"], row.get("mfu_4n")
        cells = [row["case"], f"{row['tokens_per_s_per_gpu']:.0f}"]
        cells += ["" if mfu is None else f"{mfu:.1%}"]
        cells += [gpu.gigabytes(memory[name]) for name in ("peak_train", "peak_reserved")]
        lines.append(f"| {' | '.join(cells)} |")
    wrong = faults(report)
    lines += ["", f"wrong: {', '.join(wrong)}" if wrong else "nothing is wrong"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
