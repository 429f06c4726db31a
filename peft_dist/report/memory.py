"""Panels of memory: the peak of each rank over the steps, and what it consists of."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft_dist.report.learning import STEP_AXIS
from peft_dist.report.panel import (
    OVER_STEPS_HEAD,
    Panel,
    Trace,
    TraceStyle,
    bar_axis,
    bar_name,
    byte_axis,
    legend_name,
    make_panel,
    over_steps_rows,
)
from peft_dist.report.run_data import RunData
from peft_dist.report.series import Series, number, short
from peft_dist.report.text import off_by, size, sizes

LINES_OF_RANKS = 8
"""Most ranks of one run that get a line each; of more, the fullest and the emptiest do."""
ADAPTER_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 4, 8
"""Per trained parameter: float32 weight, float32 gradient, AdamW's two float32 moments."""
BARS_OF_RANKS = 16
"""Most bars of a run; of more ranks, and of several runs, the fullest one gets a bar alone."""
PARTS = ("base", "adapter", "gradients", "optimizer", "the rest")


def memory_panels(runs: Sequence[RunData]) -> list[Panel]:
    """Return the figures of memory, those that the runs have numbers for."""
    found = [_over_steps(runs), _bytes(runs)]
    return [panel for panel in found if panel is not None]


@dataclass(frozen=True)
class RankBytes:
    """What the memory of one rank was used for, as far as it is known."""

    rank: int
    parts: Sequence[float | None]
    """In the order of `PARTS`."""
    peak: float | None
    planned: float | None


def rank_bytes(run: RunData) -> list[RankBytes]:
    """Return what is known of every rank of a run."""
    base, peaks, planned = run.base_bytes, run.peak_bytes, run.planned_bytes
    ranks = max(len(base), len(peaks))
    trained = number(run.result.get("trainable_parameters"))
    shared = str(run.result.get("strategy", "")).startswith("zero")
    # A base that waits in the host is no part of what is counted on the GPU.
    on_gpu = run.result.get("device") == "cuda"
    elsewhere = on_gpu and run.recipe.get("parallel.offload") == "cpu"
    found = []
    for rank in range(ranks):
        optimizer = OPTIMIZER_BYTES / (ranks if shared else 1)
        own = [
            None if trained is None else each * trained
            for each in (ADAPTER_BYTES, GRADIENT_BYTES, optimizer)
        ]
        known = [None if elsewhere else _at(base, rank), *own]
        peak = _at(peaks, rank)
        rest = None if peak is None else max(0.0, peak - sum(part or 0.0 for part in known))
        plan = planned[0] if len(planned) == 1 else _at(planned, rank)
        found.append(RankBytes(rank, [*known, rest], peak, plan))
    return found


def _at(values: Sequence[float], rank: int) -> float | None:
    return values[rank] if rank < len(values) else None


def _over_steps(runs: Sequence[RunData]) -> Panel | None:
    labels: list[RunData] = []
    lines: list[Series] = []
    traces: list[Trace] = []
    for run_index, run in enumerate(runs):
        for index, (name, series) in enumerate(_lines_of(run, alone=len(runs) == 1)):
            style = TraceStyle(index if len(runs) == 1 else run_index)
            drawn = series.thinned()
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": short(drawn.x), "y": short(drawn.y),
                    "name": name, "line": style.line, "hovertemplate": "step %{x}: %{y:.4s}B",
                }
            )  # fmt: skip
            lines.append(series)
            labels.append(run)
    if not traces:
        return None
    text = f"Most that a rank has held so far: {sizes([series.y[-1] for series in lines])}."
    for run_index, run in enumerate(runs):
        if run.planned_bytes:
            planned = max(run.planned_bytes)
            of_run = f" for {run.name}" if len(runs) > 1 else ""
            peaks = [line.y[-1] for line, own in zip(lines, labels, strict=True) if own is run]
            off = off_by(planned, max(peaks, default=0.0))
            text += f" Planned{of_run}: {sizes(run.planned_bytes)}{off}."
            steps = [min(line.x[0] for line in lines), max(line.x[-1] for line in lines)]
            colour = TraceStyle(run_index).colour if len(runs) > 1 else "var(--ink)"
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": steps, "y": [planned, planned],
                    "name": f"planned {legend_name(run)}" if len(runs) > 1 else "planned",
                    "line": {"color": colour,
                             "dash": "longdashdot", "width": 1.5},
                }
            )  # fmt: skip
    return make_panel(
        "memory",
        "Peak memory over the steps",
        text,
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": byte_axis("peak memory")},
        head=("line", *OVER_STEPS_HEAD[1:]),
        rows=[
            [str(trace["name"]), *row[1:]]
            for trace, row in zip(
                traces, over_steps_rows(labels, lines, size), strict=False
            )  # planned lines come last
        ],
    )


def _lines_of(run: RunData, *, alone: bool) -> list[tuple[str, Series]]:
    """Return the lines of one run, each with its name."""
    known = [(s.step, s.rank_memory_bytes) for s in run.steps if s.rank_memory_bytes]
    steps = [step for step, _ in known]
    if not known:
        series = Series.of(run.steps, "peak_memory_bytes")
        return [("rank 0" if alone else legend_name(run), series)] if len(series) else []
    count = len(known[-1][1])
    if not alone:
        return [(legend_name(run), Series(steps, [max(ranks) for _, ranks in known]))]
    if count > LINES_OF_RANKS or any(len(ranks) != count for _, ranks in known):
        return [
            ("fullest rank", Series(steps, [max(ranks) for _, ranks in known])),
            ("emptiest rank", Series(steps, [min(ranks) for _, ranks in known])),
        ]
    return [
        (f"rank {rank}", Series(steps, [ranks[rank] for _, ranks in known]))
        for rank in range(count)
    ]


def _bytes(runs: Sequence[RunData]) -> Panel | None:
    every = [(run, found) for run in runs for found in rank_bytes(run)]
    if not any(part for _, found in every for part in found.parts):
        return None
    alone = len(runs) == 1
    drawn = every
    if not alone or len(every) > BARS_OF_RANKS:
        drawn = [(run, found) for run, found in map(_fullest, runs) if found.parts]
    names = [f"rank {found.rank}" if alone else bar_name(run) for run, found in drawn]
    indices = list(range(len(drawn)))
    traces: list[Trace] = []
    for index, part in enumerate(PARTS):
        values = [found.parts[index] or 0.0 for _, found in drawn]
        if any(values):
            traces.append(
                {
                    "type": "bar", "orientation": "h", "y": indices, "x": short(values),
                    "name": part, "marker": TraceStyle(index).fill,
                    "hovertemplate": f"{part}: %{{x:.4s}}B",
                }
            )  # fmt: skip
    planned = [(run_index, found.planned) for run_index, (_, found) in enumerate(drawn)]
    marks = [(run_index, value) for run_index, value in planned if value is not None]
    if marks:
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": "planned",
                "y": [run_index for run_index, _ in marks], "x": short(value for _, value in marks),
                "marker": {"symbol": "line-ns-open", "size": 18, "color": "var(--ink)",
                           "line": {"width": 3, "color": "var(--ink)"}},
                "hovertemplate": "planned: %{x:.4s}B",
            }
        )  # fmt: skip
    left_out = len(every) - len(drawn)
    ends = ["peak", "planned"] if marks else ["peak"]
    return make_panel(
        "bytes",
        "Where the bytes are",
        _bytes_text(runs),
        traces,
        layout={
            "barmode": "stack",
            "bargap": 0.35,
            "height": 120 + 36 * len(drawn),
            "xaxis": byte_axis("bytes"),
            "yaxis": bar_axis(names),
            "legend": {"traceorder": "normal"},
        },
        head=("rank", *PARTS, *ends),
        rows=[
            [
                f"rank {found.rank}" if alone else f"{run.name}, rank {found.rank}",
                *map(_shown, [*found.parts, found.peak, found.planned][: len(PARTS) + len(ends)]),
            ]
            for run, found in every
        ],
        note="Drawn is the rank that held most; the numbers are of all." if left_out else "",
        wide=True,
    )


def _fullest(run: RunData) -> tuple[RunData, RankBytes]:
    ranks = rank_bytes(run) or [RankBytes(0, [], None, None)]
    return run, max(ranks, key=lambda found: found.peak or 0.0)


def _shown(value: float | None) -> str:
    return "" if value is None else size(value)


def _bytes_text(runs: Sequence[RunData]) -> str:
    parts = []
    for run in runs:
        if not run.base_bytes:
            continue
        whole = number(run.result.get("base_bytes_total"))
        of_whole = f" of {size(whole)}" if whole else ""
        name = f"{run.name}: e" if len(runs) > 1 else "E"
        parts.append(f"{name}ach rank holds {sizes(run.base_bytes)}{of_whole} of the base.")
    parts.append("The rest is activations, buffers and libraries, up to the peak.")
    return " ".join(parts)
