"""The plan as people read it: tables, what fits and why, and what stands behind the numbers."""

import io
import sys
from dataclasses import fields
from typing import Any

from peft_dist.plan.estimate import Estimate
from peft_dist.plan.hardware import GIB, Assumed
from peft_dist.plan.plan import Plan, Row

WIDTH = 220
"""Most characters of a line of a table."""


def render(plan: Plan, *, title: str, simulated: str = "") -> str:
    """Return the whole text.

    Args:
        plan: What to show.
        title: Name of the recipe.
        simulated: What a simulation has found of the best row.
    """
    subject, hardware = plan.subject, plan.hardware
    shape, adapter = subject.shape, subject.adapter
    gpu = hardware.gpu
    lines = [
        f"{title}: {shape.model_type}, {_count(shape.parameters)} parameters, "
        f"{subject.recipe.quantization}; trains {_count(adapter.parameters)} "
        f"({subject.recipe.method.kind})",
        f"on {gpu.name}, {gpu.memory_gib} GiB, {hardware.gpus_per_node} per node; "
        f"{hardware.inside_gb_s:g} GB/s between GPUs of a node, "
        f"{hardware.between_gb_s:g} GB/s between nodes",
        "",
        _table(_MEMORY, [_memory(row) for row in plan.rows], "GiB of each GPU, at its fullest"),
        _table(_SPEED, [_speed(row) for row in plan.rows], "time and network"),
    ]
    lines += [f"{_name(row.estimate)}: {row.remedy}" for row in plan.rows if not row.estimate.fits]
    if plan.best is None:
        lines.append("best: none; nothing fits")
    else:
        lines.append(f"best: {_name(plan.best.estimate)}: {plan.reason}")
    if simulated:
        lines.append(simulated)
    lines += ["", *_basis(plan)]
    return "\n".join(lines)


_MEMORY = ("strategy", "GPUs", "rows", "recompute", "base", "gathered", "embedding+head", "adapter",
           "gradients", "moments", "activations", "logits", "allocated", "reserved", "in all",
           "host GiB", "verdict")  # fmt: skip
_SPEED = ("strategy", "GPUs", "passes", "s/step", "products", "attention", "other", "dequantize",
          "waits", "reduce", "tokens/s", "MFU", "hours", "GPU-hours", "GB in", "GB between",
          "first start", "requeue")  # fmt: skip


def _memory(row: Row) -> list[str]:
    found, one = row.estimate, row.estimate.candidate
    parts = found.bytes
    sizes = [
        parts.base, parts.gathered_blocks, parts.gathered_vocabulary, parts.adapter,
        parts.gradients, parts.moments, parts.activations, parts.logits, parts.allocated,
        found.reserved_bytes, found.device_bytes,
    ]  # fmt: skip
    return [
        *_who(found),
        str(one.micro_batch),
        "yes" if one.recompute else "no",
        *(f"{size / GIB:.1f}" for size in sizes),
        f"{found.host_bytes / GIB:.0f}",
        _verdict(found),
    ]


def _speed(row: Row) -> list[str]:
    found = row.estimate
    times = found.seconds
    unknown = "?"
    return [
        *_who(found),
        str(found.accumulation),
        f"{times.total:.2f}",
        *(f"{getattr(times, field.name):.2f}" for field in fields(times)),
        f"{found.tokens_per_s:,.0f}",
        f"{found.mfu:.2f}",
        unknown if found.hours is None else f"{found.hours:.1f}",
        unknown if found.gpu_hours is None else f"{found.gpu_hours:.1f}",
        f"{found.sent_inside_bytes / 1e9:.1f}",
        f"{found.sent_between_bytes / 1e9:.1f}",
        f"{found.first_start_s:.0f} s",
        f"{found.requeue_s:.0f} s",
    ]


def _who(found: Estimate) -> list[str]:
    one = found.candidate
    shards = f"/{one.shard_size}" if one.strategy == "hsdp" else ""
    gpus = f"{one.nodes}x{one.processes // one.nodes}" if one.nodes > 1 else str(one.processes)
    return [f"{one.strategy}{shards}{'+offload' if one.offload else ''}", gpus]


def _name(found: Estimate) -> str:
    strategy, gpus = _who(found)
    return f"{strategy} on {gpus} GPU{'s' if gpus != '1' else ''}"


def _verdict(found: Estimate) -> str:
    if found.fits:
        return "fits"
    if not found.fits_host:
        return "host too small"
    return "too large" if found.cannot_fit else "tight"


def _table(columns: tuple[str, ...], rows: list[list[str]], title: str) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    on_terminal = sys.stdout.isatty()
    table: Any = Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD if on_terminal else None,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    text = io.StringIO()
    # A narrow terminal wraps whole lines: rich would fold each column into a few letters.
    Console(file=text, width=WIDTH, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _basis(plan: Plan) -> list[str]:
    """Return what is exact, what is a model, and what is assumed."""
    assumed = plan.hardware.assumed
    values = ", ".join(f"{f.name} {getattr(assumed, f.name):g}" for f in fields(Assumed))
    return [
        "exact: parameters, base, adapter, gradients, moments. formulas, within 3 % of the "
        "simulations that tests compare them with: activations, logits, gathered, allocated.",
        "model: reserved (allocators were seen to hold back 1 to 26 % more), seconds, hours; every "
        f"row counts with {plan.subject.recipe.data.max_length} tokens.",
        f"assumed: {values}.",
    ]


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
