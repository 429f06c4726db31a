"""Panels over the clock: where the time went, and how busy the node of rank 0 was."""

from collections.abc import Iterable, Sequence
from statistics import fmean

from peft_dist.ledger.events import GpuSample, SystemEvent
from peft_dist.ledger.goodput import PHASES
from peft_dist.report.panel import (
    Panel,
    Trace,
    TraceStyle,
    axis,
    bar_axis,
    bar_name,
    legend_name,
    make_panel,
)
from peft_dist.report.run_data import RunData
from peft_dist.report.series import Series, short
from peft_dist.report.text import duration, share

PHASE_ORDER = {
    "step": 0, "evaluation": 2, "checkpoint": 3, "startup": 7, "load": 4, "lost_work": 1,
    "down": 5, "other": 6,
}  # fmt: skip
"""Which look each phase has; what counts comes first."""
TIME_UNITS = ((2 * 86400.0, 3600.0, "hours"), (2 * 3600.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def clock_panels(runs: Sequence[RunData]) -> list[Panel]:
    """Return the figures over the clock, those that the runs have numbers for."""
    found = [_goodput(runs), _machine(runs)]
    return [panel for panel in found if panel is not None]


def _goodput(runs: Sequence[RunData]) -> Panel | None:
    own = [run for run in runs if run.goodput.total_s > 0]
    if not own:
        return None
    indices = list(range(len(own)))
    traces: list[Trace] = []
    for phase, index in PHASE_ORDER.items():
        seconds = [run.goodput.seconds[phase] for run in own]
        shares = [s / run.goodput.total_s for s, run in zip(seconds, own, strict=True)]
        name = phase.replace("_", " ")
        if any(seconds):
            traces.append(
                {
                    "type": "bar", "orientation": "h", "y": indices, "x": short(shares),
                    "name": name, "marker": TraceStyle(index).fill,
                    "customdata": [duration(s) for s in seconds],
                    "hovertemplate": f"{name}: %{{customdata}}, %{{x:.1%}}",
                    "text": [f"{name} {s:.0%}" for s in shares],
                    "textposition": "inside", "insidetextanchor": "middle", "textangle": 0,
                    "insidetextfont": {"color": "var(--on-fill)"},
                    "constraintext": "inside",
                }
            )  # fmt: skip
    text = "; ".join(
        f"{run.name + ': ' if len(runs) > 1 else ''}{share(run.goodput.fraction)} of "
        f"{duration(run.goodput.total_s)} went into steps that count"
        for run in own
    )
    return make_panel(
        "goodput",
        "Where the time went",
        text[0].upper() + text[1:] + "." if len(runs) == 1 else text + ".",
        traces,
        layout={
            "barmode": "stack",
            "uniformtext": {"mode": "hide", "minsize": 12},  # what has no room is left to the table
            "height": 130 + 44 * len(own),
            "xaxis": axis("share of the time", tickformat=".0%", range=[0, 1]),
            "yaxis": {
                **bar_axis([bar_name(run) for run in own]),
                "showticklabels": len(own) > 1,
            },
            "legend": {"traceorder": "normal"},
            "margin": {"l": 16, "r": 20},
        },
        head=("phase", "what it is", *(run.name for run in own)),
        rows=[
            [
                phase.replace("_", " "),
                PHASES[phase],
                *(
                    f"{duration(run.goodput.seconds[phase])} "
                    f"({share(run.goodput.seconds[phase] / run.goodput.total_s)})"
                    for run in own
                ),
            ]
            for phase in PHASE_ORDER
        ],
        wide=True,
    )


def _machine(runs: Sequence[RunData]) -> Panel | None:
    lines: list[tuple[str, int, Series]] = []
    spans = [run.events[-1].time - run.events[0].time for run in runs if run.events]
    longest = max([0.0, *spans])  # a clock may have been set back
    unit_s, unit = next((unit_s, unit) for above, unit_s, unit in TIME_UNITS if longest >= above)
    for index, run in enumerate(runs):
        samples = [sample for sample in run.of(SystemEvent) if sample.node is None]
        if not samples:
            continue
        begun = run.events[0].time
        times = [(sample.time - begun) / unit_s for sample in samples]
        of_run: list[tuple[str, Series]] = []
        for what, values in _percentages(samples).items():
            pairs = [(t, v) for t, v in zip(times, values, strict=True) if v is not None]
            if pairs:
                of_run.append((what, Series([t for t, _ in pairs], [v for _, v in pairs])))
        if len(runs) == 1:
            lines += [(what, index, series) for index, (what, series) in enumerate(of_run)]
        else:  # of several runs, only how busy: more lines could not be distinguished
            busy = dict(of_run)
            what = "GPUs busy" if "GPUs busy" in busy else "processor"
            if what in busy:
                lines.append((f"{legend_name(run)}, {what}", index, busy[what]))
    if not lines:
        return None
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "line": TraceStyle(index).line,
            "x": short(series.thinned().x), "y": short(series.thinned().y),
            "hovertemplate": "%{y:.0f}%",
        }
        for name, index, series in lines
    ]  # fmt: skip
    further = _further_nodes(runs[0]) if len(runs) == 1 else []
    means = "; ".join(f"{name} {fmean(series.y):.0f}%" for name, _, series in lines)
    return make_panel(
        "machine",
        "The machine of rank 0" if len(runs) == 1 else "How busy the machine of rank 0 was",
        f"Means: {means}.",
        traces,
        layout={
            "xaxis": axis(f"{unit} since the start"),
            "yaxis": axis("percent", range=[0, 105]),
        },
        head=("line", "mean", "lowest", "highest"),
        rows=[*(_percent_row(name, series.y) for name, _, series in lines), *further],
        note="How the other nodes fared stands in the table." if further else "",
    )


def _further_nodes(run: RunData) -> list[list[str]]:
    """Return rows of the nodes besides rank 0's, where the ledger has any."""
    by_node: dict[int, list[SystemEvent]] = {}
    for sample in run.of(SystemEvent):
        if sample.node is not None:
            by_node.setdefault(sample.node, []).append(sample)
    return [
        _percent_row(f"node of rank {node}: {what}", known)
        for node, samples in sorted(by_node.items())
        for what, values in _percentages(samples).items()
        if (known := [value for value in values if value is not None])
    ]


def _percent_row(name: str, values: Sequence[float]) -> list[str]:
    return [name, *(f"{value:.0f}%" for value in (fmean(values), min(values), max(values)))]


def _percentages(samples: Sequence[SystemEvent]) -> dict[str, list[float | None]]:
    """Return how busy and how full the node was, in percent; of several GPUs the mean."""
    return {
        "processor": [sample.cpu_percent for sample in samples],
        "memory": [_used(sample) for sample in samples],
        "GPUs busy": [_mean(g.utilisation_percent for g in s.gpus or []) for s in samples],
        "GPU memory": [_mean(_used(gpu) for gpu in sample.gpus or []) for sample in samples],
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _used(memory: SystemEvent | GpuSample) -> float | None:
    used, total = memory.memory_used_bytes, memory.memory_total_bytes
    return None if used is None or not total else 100 * used / total
