"""Figures of how fast a run went: tokens per second, utilisation, and the ranks beside each other."""

from collections.abc import Sequence
from statistics import median

from peft_dist.report.facts import Run
from peft_dist.report.learning import STEP_AXIS, with_series
from peft_dist.report.panel import (
    OVER_STEPS_HEAD,
    Look,
    Panel,
    Trace,
    axis,
    in_words,
    legend_name,
    line_over_steps,
    make_panel,
    over_steps_rows,
    thinning_note,
)
from peft_dist.report.series import Series, numbers, quantile, short
from peft_dist.report.wording import duration, figure, share

WARM_UP_STEPS = 2
"""The first steps of an attempt pay for everything lazy; no rank is judged by them."""


def speed_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the figures of speed, those that the runs have numbers for."""
    found = [_throughput(runs), _utilisation(runs), _rank_times(runs), _imbalance(runs)]
    return [panel for panel in found if panel is not None]


def rank_times(run: Run) -> tuple[list[int], list[list[float]]]:
    """Return the steps that tell each rank's own time, in seconds, and those times.

    Of steps before the number of ranks changed nothing can be compared; they are left out.
    """
    told = [(r["step"], numbers(r.get("rank_step_s"))) for r in _warm_steps(run)]
    known = [(step, times) for step, times in told if times]
    ranks = len(known[-1][1]) if known else 0
    fitting = [(step, times) for step, times in known if len(times) == ranks]
    return [step for step, _ in fitting], [times for _, times in fitting]


def _warm_steps(run: Run) -> list[dict[str, object]]:
    begun = {record["attempt"]: record["step"] for record in run.events("start")}
    return [
        record
        for record in run.steps
        if record["step"] > begun.get(record["attempt"], 0) + WARM_UP_STEPS
    ]


def _throughput(runs: Sequence[Run]) -> Panel | None:
    placed, lines = with_series(runs, "tokens_per_s")
    if not placed:
        return None
    traces: list[Trace] = []
    for (place, run), series in zip(placed, lines, strict=True):
        alone = len(runs) == 1
        traces += line_over_steps(series, Look(place), name=legend_name(run), alone=alone)
    middles = [median(series.y) for series in lines]
    own = [run for _, run in placed]
    if len(own) == 1:
        text = f"Half of the steps are faster than {figure(middles[0])} tokens per second."
    else:
        fastest = max(range(len(own)), key=middles.__getitem__)
        text = f"{own[fastest].name} is the fastest, with {figure(middles[fastest])} tokens/s."
    rows = over_steps_rows(own, lines, figure)
    return make_panel(
        "throughput",
        "Throughput",
        text,
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis("tokens per second", rangemode="tozero")},
        head=(*OVER_STEPS_HEAD, "median"),
        rows=[[*row, figure(middle)] for row, middle in zip(rows, middles, strict=True)],
        note=thinning_note(lines),
    )


def _utilisation(runs: Sequence[Run]) -> Panel | None:
    placed, lines = with_series(runs, "mfu")
    if not placed:
        return None
    traces: list[Trace] = []
    for (place, run), series in zip(placed, lines, strict=True):
        alone = len(runs) == 1
        traces += line_over_steps(series, Look(place), name=legend_name(run), alone=alone)
    own = [run for _, run in placed]
    middles = ", ".join(share(median(series.y)) for series in lines)
    return make_panel(
        "mfu",
        "Model FLOPs utilisation",
        f"Median {middles}. Counted are 4 operations per token and parameter of the frozen base, "
        "against the devices' dense bfloat16 peak.",
        traces,
        layout={
            "xaxis": STEP_AXIS,
            "yaxis": axis("share of peak", tickformat=".0%", rangemode="tozero"),
        },
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, share),
        note=thinning_note(lines),
    )


def _rank_times(runs: Sequence[Run]) -> Panel | None:
    traces: list[Trace] = []
    rows, text = [], ""
    for place, run in enumerate(runs):
        _, times = rank_times(run)
        if not times or len(times[0]) < 2:
            continue
        by_rank = [list(column) for column in zip(*times, strict=True)]
        middles = [median(column) for column in by_rank]
        highs = [quantile(column, 0.95) for column in by_rank]
        traces.append(
            {
                "type": "bar", "x": list(range(len(middles))), "y": short(middles),
                "name": legend_name(run), "marker": Look(place).fill,
                "error_y": {
                    "type": "data", "symmetric": False, "array": short(
                        high - middle for high, middle in zip(highs, middles, strict=True)
                    ), "arrayminus": [0] * len(middles), "color": "var(--soft)", "thickness": 1.5,
                },
                "hovertemplate": "rank %{x}: median %{y:.4g} s",
            }
        )  # fmt: skip
        slowest = [0] * len(middles)
        for step in times:
            slowest[step.index(max(step))] += 1
        rows += [
            [run.name, str(rank), duration_of_a_step(middle), duration_of_a_step(high),
             share(slowest[rank] / len(times))]
            for rank, (middle, high) in enumerate(zip(middles, highs, strict=True))
        ]  # fmt: skip
        worst = middles.index(max(middles))
        slower = middles[worst] / median(middles) - 1
        told = f"rank {worst} has the longest median, {share(slower)} above the middle one"
        text += f" {run.name}: {told}." if len(runs) > 1 else f" {told[0].upper()}{told[1:]}."
    if not traces:
        return None
    return make_panel(
        "rank-times",
        "Time of a step by rank",
        f"Each rank's own part of a step, without waiting for others.{text} The whiskers end at "
        "the 95th percentile.",
        traces,
        layout={
            "xaxis": axis("rank", dtick=1 if len(traces[0]["x"]) <= 16 else None),
            "yaxis": axis("seconds", rangemode="tozero"),
            "barmode": "group",
            "showlegend": len(traces) > 1,
        },
        head=("run", "rank", "median", "95th percentile", "slowest in"),
        rows=rows,
    )


def duration_of_a_step(seconds: float) -> str:
    """Return a short time, in milliseconds where that reads better."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else duration(seconds)


def _imbalance(runs: Sequence[Run]) -> Panel | None:
    lines, own, traces = [], [], list[Trace]()
    for place, run in enumerate(runs):
        steps, times = rank_times(run)
        if not times or len(times[0]) < 2:
            continue
        series = Series(steps, [max(step) / max(median(step), 1e-9) for step in times])
        name, alone = legend_name(run), len(runs) == 1
        traces += line_over_steps(series, Look(place), name=name, alone=alone)
        lines.append(series)
        own.append(run)
    if not own:
        return None
    if len(own) == 1:
        text = in_words(own[0], lines[0], figure)
    else:
        text = "; ".join(
            f"{run.name}: median {figure(median(series.y))}"
            for run, series in zip(own, lines, strict=True)
        )
    return make_panel(
        "imbalance",
        "Slowest rank against the middle one",
        f"1 is balance: whoever is slower lets all others wait. {text}",
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis("slowest / median")},
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, figure),
        note=thinning_note(lines),
    )
