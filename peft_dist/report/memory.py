"""Figures of memory: what each rank held over the steps, and what its bytes were."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft_dist.report.facts import Run
from peft_dist.report.learning import STEP_AXIS
from peft_dist.report.panel import (
    OVER_STEPS_HEAD,
    Look,
    Panel,
    Trace,
    byte_axis,
    legend_name,
    make_panel,
    over_steps_rows,
    thinning_note,
)
from peft_dist.report.series import Series, number, numbers, short
from peft_dist.report.wording import size, sizes

LINES_OF_RANKS = 8
"""Most ranks of one run that get a line each; of more, the fullest and the emptiest do."""
ADAPTER_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 4, 8
"""Per trained parameter: float32 weight, float32 gradient, AdamW's two float32 moments."""
PARTS = ("base", "adapter", "gradients", "optimizer", "the rest")


def memory_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the figures of memory, those that the runs have numbers for."""
    found = [_over_steps(runs), _bytes(runs)]
    return [panel for panel in found if panel is not None]


@dataclass(frozen=True)
class RankBytes:
    """What the memory of one rank was used for, as far as it is known, in the order of `PARTS`."""

    parts: Sequence[float | None]
    peak: float | None

    @classmethod
    def of(cls, run: Run) -> "list[RankBytes]":
        """Return those of every rank of a run."""
        base, peaks = run.base_bytes, run.peak_bytes
        ranks = max(len(base), len(peaks))
        trained = number(run.result.get("trainable_parameters"))
        shared = str(run.result.get("strategy", "")).startswith("zero")
        # A base that waits in the host is no part of what is counted on the GPU.
        elsewhere = run.result.get("device") == "cuda" and (
            run.recipe.get("parallel.offload") == "cpu"
        )
        found = []
        for rank in range(ranks):
            own = [None] * 3 if trained is None else [
                ADAPTER_BYTES * trained,
                GRADIENT_BYTES * trained,
                OPTIMIZER_BYTES * trained / (ranks if shared else 1),
            ]  # fmt: skip
            known = [base[rank] if rank < len(base) and not elsewhere else None, *own]
            peak = peaks[rank] if rank < len(peaks) else None
            rest = None if peak is None else max(0.0, peak - sum(part or 0.0 for part in known))
            found.append(cls([*known, rest], peak))
        return found


def _over_steps(runs: Sequence[Run]) -> Panel | None:
    labels: list[Run] = []
    lines: list[Series] = []
    traces: list[Trace] = []
    for place, run in enumerate(runs):
        for index, (name, series) in enumerate(_lines_of(run, alone=len(runs) == 1)):
            look = Look(index if len(runs) == 1 else place)
            drawn = series.thinned()
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": short(drawn.x), "y": short(drawn.y),
                    "name": name, "line": look.line, "hovertemplate": "step %{x}: %{y:.4s}B",
                }
            )  # fmt: skip
            lines.append(series)
            labels.append(run)
    if not traces:
        return None
    text = f"Most that a rank has held so far: {sizes([series.y[-1] for series in lines])}."
    for place, run in enumerate(runs):
        if run.planned_bytes:
            planned = max(run.planned_bytes)
            of_run = f" for {run.name}" if len(runs) > 1 else ""
            text += f" Planned{of_run}: {sizes(run.planned_bytes)}."
            steps = [min(line.x[0] for line in lines), max(line.x[-1] for line in lines)]
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "x": steps, "y": [planned, planned],
                    "name": f"planned {legend_name(run)}" if len(runs) > 1 else "planned",
                    "line": {"color": Look(place).colour if len(runs) > 1 else "var(--soft)",
                             "dash": "dot", "width": 1.5},
                }
            )  # fmt: skip
    return make_panel(
        "memory",
        "Memory",
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
        note=thinning_note(lines),
    )


def _lines_of(run: Run, *, alone: bool) -> list[tuple[str, Series]]:
    """Return the lines of one run, each with its name."""
    told = [(r["step"], numbers(r.get("rank_memory_bytes"))) for r in run.steps]
    known = [(step, ranks) for step, ranks in told if ranks]
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


def _bytes(runs: Sequence[Run]) -> Panel | None:
    of_runs = [(run, RankBytes.of(run)) for run in runs]
    places = [
        (f"{legend_name(run)}, rank {rank}" if len(runs) > 1 else f"rank {rank}", found)
        for run, ranks in of_runs
        for rank, found in enumerate(ranks)
    ]
    if not any(part for _, found in places for part in found.parts):
        return None
    names = [name for name, _ in places]
    traces: list[Trace] = []
    for index, part in enumerate(PARTS):
        values = [found.parts[index] or 0.0 for _, found in places]
        if any(values):
            traces.append(
                {
                    "type": "bar", "orientation": "h", "y": names, "x": short(values),
                    "name": part, "marker": Look(index).fill,
                    "hovertemplate": f"{part}: %{{x:.4s}}B",
                }
            )  # fmt: skip
    planned = [
        (f"{legend_name(run)}, rank {rank}" if len(runs) > 1 else f"rank {rank}", value)
        for run, ranks in of_runs
        for rank, value in enumerate(_for_each(run.planned_bytes, len(ranks)))
    ]
    if planned:
        traces.append(
            {
                "type": "scatter", "mode": "markers", "name": "planned",
                "y": [name for name, _ in planned], "x": short(value for _, value in planned),
                "marker": {"symbol": "line-ns-open", "size": 18, "color": "var(--ink)",
                           "line": {"width": 3, "color": "var(--ink)"}},
                "hovertemplate": "planned: %{x:.4s}B",
            }
        )  # fmt: skip
    rows = [
        [name, *("" if part is None else size(part) for part in found.parts),
         "" if found.peak is None else size(found.peak)]
        for name, found in places
    ]  # fmt: skip
    return make_panel(
        "bytes",
        "Where the bytes are",
        _bytes_text(of_runs),
        traces,
        layout={
            "barmode": "stack",
            "bargap": 0.35,
            "height": 150 + 34 * len(places),
            "xaxis": byte_axis("bytes"),
            "yaxis": {"autorange": "reversed", "type": "category"},
            "legend": {"traceorder": "normal"},
        },
        head=("rank", *PARTS, "peak"),
        rows=rows,
        wide=True,
    )


def _for_each(values: Sequence[float], ranks: int) -> Sequence[float]:
    return list(values) * ranks if len(values) == 1 else values


def _bytes_text(of_runs: Sequence[tuple[Run, Sequence[RankBytes]]]) -> str:
    told = []
    for run, ranks in of_runs:
        base = [found.parts[0] for found in ranks if found.parts[0] is not None]
        if not base:
            continue
        whole = number(run.result.get("base_bytes_total"))
        of_whole = f" of {size(whole)}" if whole else ""
        name = f"{run.name}: e" if len(of_runs) > 1 else "E"
        told.append(f"{name}ach rank holds {sizes(base)}{of_whole} of the base.")
    told.append("The rest is activations, buffers and libraries, up to the peak.")
    return " ".join(told)
