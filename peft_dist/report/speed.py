"""Panels of speed: tokens per second, utilisation, and the ranks beside each other."""

from collections import Counter
from collections.abc import Sequence
from statistics import median

from peft_dist.ledger.events import StepEvent
from peft_dist.report.learning import STEP_AXIS, lines_of_steps, with_series
from peft_dist.report.panel import (
    OVER_STEPS_HEAD,
    Panel,
    Trace,
    TraceStyle,
    axis,
    in_words,
    legend_name,
    line_over_steps,
    make_panel,
    over_steps_rows,
)
from peft_dist.report.run_data import RunData
from peft_dist.report.series import Series, quantile, short
from peft_dist.report.text import duration, figure, off_by, share

BARS_OF_RANKS = 16
"""Ranks that get a bar each; of more, each gets a mark."""
WARM_UP_STEPS = 2
"""The first steps of an attempt pay for everything lazy; no rank is judged by them."""

RankTimes = tuple[int, RunData, list[int], list[list[float]]]
"""A run's index, the run, and the steps that have each rank's own time, with those times."""


def speed_panels(runs: Sequence[RunData]) -> list[Panel]:
    """Return the figures of speed, those that the runs have numbers for."""
    ranks = [(index, run, *rank_times(run)) for index, run in enumerate(runs)]
    several = [times for times in ranks if times[3] and len(times[3][0]) > 1]
    found = [_throughput(runs), _utilisation(runs)]
    if several:
        found += [_rank_times(runs, several), _imbalance(runs, several)]
    return [panel for panel in found if panel is not None]


def rank_times(run: RunData) -> tuple[list[int], list[list[float]]]:
    """Return the steps that have each rank's own time, in seconds, and those times.

    Of steps before the number of ranks changed nothing can be compared; they are left out.
    """
    known = [(s.step, s.rank_step_s) for s in _warm_steps(run) if s.rank_step_s]
    ranks = len(known[-1][1]) if known else 0
    fitting = [(step, times) for step, times in known if len(times) == ranks]
    return [step for step, _ in fitting], [times for _, times in fitting]


def _warm_steps(run: RunData) -> list[StepEvent]:
    begun = {start.attempt: start.step for start in run.starts}
    return [step for step in run.steps if step.step > begun.get(step.attempt, 0) + WARM_UP_STEPS]


def _throughput(runs: Sequence[RunData]) -> Panel | None:
    indexed, lines = with_series(runs, "tokens_per_s")
    if not indexed:
        return None
    traces: list[Trace] = []
    for (index, run), series in zip(indexed, lines, strict=True):
        alone = len(runs) == 1
        traces += line_over_steps(series, TraceStyle(index), name=legend_name(run), alone=alone)
    middles = [median(series.y) for series in lines]
    own = [run for _, run in indexed]
    if len(own) == 1:
        text = f"Median {figure(middles[0])} tokens per second."
        planned = own[0].planned_tokens_per_s
        if planned is not None:
            text += f" Planned: {figure(planned)}{off_by(planned, middles[0])}."
    else:
        fastest = max(range(len(own)), key=middles.__getitem__)
        text = f"Fastest: {own[fastest].name}, median {figure(middles[fastest])} tokens/s."
    rows = over_steps_rows(own, lines, figure)
    return make_panel(
        "throughput",
        "Throughput",
        text,
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis("tokens per second", rangemode="tozero")},
        head=(*OVER_STEPS_HEAD, "median"),
        rows=[[*row, figure(middle)] for row, middle in zip(rows, middles, strict=True)],
    )


def _utilisation(runs: Sequence[RunData]) -> Panel | None:
    own, lines, traces = lines_of_steps(runs, "mfu")
    if not own:
        return None
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
    )


def _rank_times(runs: Sequence[RunData], ranks: Sequence[RankTimes]) -> Panel:
    few = max(len(times[0]) for *_, times in ranks) <= BARS_OF_RANKS
    traces: list[Trace] = []
    rows, words = [], []
    for index, run, _, times in ranks:
        by_rank = [list(column) for column in zip(*times, strict=True)]
        middles = [median(column) for column in by_rank]
        highs = [quantile(column, 0.95) for column in by_rank]
        traces.append(_rank_trace(legend_name(run), TraceStyle(index), middles, highs, bars=few))
        slowest = Counter(step.index(max(step)) for step in times)
        rows += [
            [run.name, str(rank), step_time(middle), step_time(high),
             share(slowest[rank] / len(times))]
            for rank, (middle, high) in enumerate(zip(middles, highs, strict=True))
        ]  # fmt: skip
        worst = middles.index(max(middles))
        more = share(middles[worst] / median(middles) - 1)
        of_run = f" of {run.name}" if len(runs) > 1 else ""
        words.append(f"Rank {worst}{of_run} has the longest, {more} above the middle one.")
    return make_panel(
        "rank-times",
        "Time of a step by rank",
        "Medians of each rank's own part of a step, without waiting for others; whiskers end at "
        f"the 95th percentile. {' '.join(words)}",
        traces,
        layout={
            "xaxis": axis("rank", dtick=1 if few else None),
            "yaxis": axis("seconds", rangemode="tozero"),
            "barmode": "group",
            "showlegend": len(runs) > 1,
        },
        head=("run", "rank", "median", "95th percentile", "slowest in"),
        rows=rows,
    )


def _rank_trace(
    name: str, style: TraceStyle, middles: Sequence[float], highs: Sequence[float], *, bars: bool
) -> Trace:
    """Return a bar for every rank or, where they are many, a mark."""
    drawn = {"type": "bar", "marker": style.fill} if bars else {
        "type": "scatter", "mode": "markers", "marker": {**style.marker, "size": 6}
    }  # fmt: skip
    return {
        **drawn, "x": list(range(len(middles))), "y": short(middles), "name": name,
        "error_y": {
            "type": "data", "symmetric": False, "color": "var(--soft)", "thickness": 1.2,
            "array": short(high - middle for high, middle in zip(highs, middles, strict=True)),
            "arrayminus": [0] * len(middles), "width": 3,
        },
        "hovertemplate": "rank %{x}: median %{y:.4g} s",
    }  # fmt: skip


def step_time(seconds: float) -> str:
    """Return a short time, in milliseconds where that reads better."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else duration(seconds)


def _imbalance(runs: Sequence[RunData], ranks: Sequence[RankTimes]) -> Panel:
    lines, own, traces = [], [], list[Trace]()
    for index, run, steps, times in ranks:
        series = Series(steps, [max(step) / max(median(step), 1e-9) for step in times])
        name, alone = legend_name(run), len(runs) == 1
        traces += line_over_steps(series, TraceStyle(index), name=name, alone=alone)
        lines.append(series)
        own.append(run)
    if len(own) == 1:
        text = in_words(own, lines, figure, highest=True)
    else:
        text = "; ".join(
            f"{run.name}: median {figure(median(series.y))}"
            for run, series in zip(own, lines, strict=True)
        )
        text += "."
    return make_panel(
        "imbalance",
        "Slowest rank against the middle one",
        f"1 is balance: whoever is slower lets all others wait. {text}",
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis("slowest / median")},
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, figure),
    )
