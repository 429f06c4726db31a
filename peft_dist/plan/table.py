"""The plan as people read it: tables, what fits and why, and what stands behind the numbers."""

from collections.abc import Sequence
from dataclasses import fields

from peft_dist.common.table import Column, table_lines, table_width
from peft_dist.plan.estimate import Estimate
from peft_dist.plan.hardware import GIB, Assumed
from peft_dist.plan.learn import Learned
from peft_dist.plan.plan import Plan, Row


def render(
    plan: Plan,
    *,
    title: str,
    simulated: str = "",
    learned: Learned | None = None,
    width: int | None = None,
    colour: bool = False,
) -> list[str]:
    """Return all lines.

    Args:
        plan: What to show.
        title: Name of the recipe.
        simulated: What a simulation has found of the best row.
        learned: What runs say, where the plan has learned from some.
        width: Columns of the terminal; None for as many as it takes.
        colour: Whether lines may hold escape sequences.
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
        "GiB of each GPU, at its fullest",
        *_table(_MEMORY, [_memory(row) for row in plan.rows], width, colour=colour),
        "",
        "time and network",
        *_table(_SPEED, [_speed(row) for row in plan.rows], width, colour=colour),
        "",
    ]
    lines += [f"{_name(row.estimate)}: {row.remedy}" for row in plan.rows if not row.estimate.fits]
    if plan.best is None:
        lines.append("best: none; nothing fits")
    else:
        lines.append(f"best: {_name(plan.best.estimate)}: {plan.reason}")
    lines += [_gathers(row.estimate) for row in plan.rows if row.estimate.gathers is not None]
    if simulated:
        lines.append(simulated)
    if learned is not None:
        lines += ["", *_lessons(learned, width, colour=colour)]
    return [*lines, "", *_basis(plan)]


_MEMORY = ("strategy", "GPUs", "rows", "recompute", "reshard", "dequantized", "base", "kept",
           "gathered", "embedding+head", "adapter", "gradients", "moments", "activations", "logits",
           "allocated", "reserved", "in all", "host GiB", "verdict")  # fmt: skip
_SPEED = ("strategy", "GPUs", "passes", "s/step", "products", "attention", "other", "dequantize",
          "waits", "reduce", "tokens/s", "MFU", "hours", "GPU-hours", "GB in", "GB between",
          "first start", "requeue")  # fmt: skip


def _memory(row: Row) -> list[str]:
    found, one = row.estimate, row.estimate.candidate
    parts = found.bytes
    sizes = [
        parts.base, parts.dequantized, parts.gathered_blocks, parts.gathered_vocabulary,
        parts.adapter, parts.gradients, parts.moments, parts.activations, parts.logits,
        parts.allocated, found.reserved_bytes, found.device_bytes,
    ]  # fmt: skip
    return [
        *_who(found),
        str(one.micro_batch),
        "yes" if one.recompute else "no",
        one.reshard if one.strategy in ("fsdp", "hsdp") else "-",
        str(one.dequantized),
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


def _gathers(found: Estimate) -> str:
    """Return how long gathers take, and whether the GPU computes meanwhile."""
    one = found.gathers
    assert one is not None
    beside = f"{1e3 * one.forward:.1f} ms of computing forward"
    if one.backward:
        beside += f", {1e3 * one.backward:.1f} backward"
    blocks = f"{one.blocks_ahead} block{'s' if one.blocks_ahead > 1 else ''} ahead"
    head = f", of the head {1e3 * one.head:.1f}" if one.head else ""
    verdict = "hidden but for the first" if one.are_hidden else "not all hidden"
    return (
        f"gathers of {_name(found)}: {1e3 * one.block:.1f} ms of a block beside {beside}{head}, "
        f"asked for {blocks}: {verdict}; waits {found.seconds.waits_for_gathers:.2f} s of "
        f"{found.seconds.total:.2f}"
    )


def _verdict(found: Estimate) -> str:
    if found.fits:
        return "fits"
    if not found.fits_host:
        return "host too small"
    return "too large" if found.cannot_fit else "tight"


def _table(
    titles: Sequence[str], rows: Sequence[Sequence[str]], width: int | None, *, colour: bool
) -> list[str]:
    """Return the lines of a table; where it is too wide, of several ones below each other."""
    columns = [
        Column(title, right=index > 1, style=_verdict_style if title == "verdict" else _plain)
        for index, title in enumerate(titles)
    ]
    parts = [[0, 1, 2]]
    for index in range(3, len(columns)):
        wider = [*parts[-1], index]
        if width is None or table_width(*_part(columns, rows, wider)) <= width:
            parts[-1] = wider
        else:
            parts.append([0, 1, index])
    lines: list[str] = []
    for part in parts:
        lines += [""] if lines else []
        lines += table_lines(*_part(columns, rows, part), width=width, colour=colour)
    return lines


def _part(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], which: Sequence[int]
) -> tuple[list[Column], list[list[str]]]:
    return [columns[index] for index in which], [[row[index] for index in which] for row in rows]


def _plain(_text: str) -> str:
    return ""


def _verdict_style(verdict: str) -> str:
    return {"fits": "green", "tight": "yellow"}.get(verdict, "red")


def _lessons(learned: Learned, width: int | None, *, colour: bool) -> list[str]:
    """Return what runs have taught: each one calculated and measured, and what follows."""
    titles = ("run", "calculated s/step", "measured", "off by", "GiB calculated", "measured")
    columns = [Column(title, right=index > 0) for index, title in enumerate(titles)]
    rows = [
        (
            one.run,
            f"{one.calculated_s:.3g}",
            f"{one.measured_s:.3g}",
            f"{one.calculated_s / one.measured_s - 1:+.0%}",
            f"{one.calculated_bytes / GIB:.2f}",
            "?" if one.measured_bytes is None else f"{one.measured_bytes / GIB:.2f}",
        )
        for one in learned.lessons
    ]
    count = len(learned.lessons)
    lines = [f"learned from {count} run{'s' if count != 1 else ''}"]
    if rows:
        lines += table_lines(columns, rows, width=width, colour=colour)
        lines.append(f"every efficiency below is the usual one times {learned.factor:.3g}")
    return [*lines, *(f"left out {text}" for text in learned.left_out)]


def _basis(plan: Plan) -> list[str]:
    """Return what is exact, what is a model, and what is assumed."""
    assumed = plan.hardware.assumed
    values = ", ".join(f"{f.name} {getattr(assumed, f.name):g}" for f in fields(Assumed))
    return [
        *_told_of_slices(plan),
        "exact: parameters, base, adapter, gradients, moments. formulas, within 3 % of the "
        "simulations that tests compare them with (zero3: of one run of two processes): "
        "activations, logits, gathered, allocated.",
        "model: reserved (allocators were seen to hold back 1 to 26 % more), seconds, hours; every "
        f"row counts with {plan.subject.recipe.data.max_length} tokens.",
        f"assumed: {values}.",
    ]


def _told_of_slices(plan: Plan) -> list[str]:
    sliced = [_name(row.estimate) for row in plan.rows if row.estimate.head_in_slices]
    if not sliced:
        return []
    names = ", ".join(dict.fromkeys(sliced))
    return [f"the head is never whole, positions are scored in slices of it: {names}."]


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"
