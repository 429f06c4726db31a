"""Figures over the clock: where the time went, and how the machine of rank 0 fared."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from peft_dist.ledger.goodput import PHASES
from peft_dist.report.panel import (
    Look,
    Panel,
    Trace,
    axis,
    bar_axis,
    bar_name,
    legend_name,
    make_panel,
)
from peft_dist.report.run_data import Run
from peft_dist.report.series import Series, number, short
from peft_dist.report.text import duration, share

PHASE_PLACES = {
    "step": 0, "evaluation": 2, "checkpoint": 3, "startup": 7, "load": 4, "lost_work": 1,
    "down": 5, "other": 6,
}  # fmt: skip
"""Which look each phase has; what counts comes first."""
TIME_UNITS = ((2 * 86400.0, 3600.0, "hours"), (2 * 3600.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def clock_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the figures over the clock, those that the runs have numbers for."""
    found = [_goodput(runs), _machine(runs)]
    return [panel for panel in found if panel is not None]


def _goodput(runs: Sequence[Run]) -> Panel | None:
    own = [run for run in runs if run.goodput.total_s > 0]
    if not own:
        return None
    places = list(range(len(own)))
    traces: list[Trace] = []
    for phase, place in PHASE_PLACES.items():
        seconds = [run.goodput.seconds[phase] for run in own]
        shares = [s / run.goodput.total_s for s, run in zip(seconds, own, strict=True)]
        name = phase.replace("_", " ")
        if any(seconds):
            traces.append(
                {
                    "type": "bar", "orientation": "h", "y": places, "x": short(shares),
                    "name": name, "marker": Look(place).fill,
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
            for phase in PHASE_PLACES
        ],
        wide=True,
    )


def _machine(runs: Sequence[Run]) -> Panel | None:
    lines: list[tuple[str, int, Series]] = []
    spans = [run.records[-1]["time"] - run.records[0]["time"] for run in runs if run.records]
    longest = max([0.0, *spans])  # a clock may have been set back
    unit_s, unit = next((unit_s, unit) for above, unit_s, unit in TIME_UNITS if longest >= above)
    for place, run in enumerate(runs):
        records = [record for record in run.events("system") if "node" not in record]
        if not records:
            continue
        begun = run.records[0]["time"]
        times = [(record["time"] - begun) / unit_s for record in records]
        of_run: list[tuple[str, Series]] = []
        for what, values in _percentages(records).items():
            pairs = [(t, v) for t, v in zip(times, values, strict=True) if v is not None]
            if pairs:
                of_run.append((what, Series([t for t, _ in pairs], [v for _, v in pairs])))
        if len(runs) == 1:
            lines += [(what, index, series) for index, (what, series) in enumerate(of_run)]
        else:  # of several runs, only how busy: more lines would not be told apart
            busy = dict(of_run)
            what = "GPUs busy" if "GPUs busy" in busy else "processor"
            if what in busy:
                lines.append((f"{legend_name(run)}, {what}", place, busy[what]))
    if not lines:
        return None
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "line": Look(place).line,
            "x": short(series.thinned().x), "y": short(series.thinned().y),
            "hovertemplate": "%{y:.0f}%",
        }
        for name, place, series in lines
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


def _further_nodes(run: Run) -> list[list[str]]:
    """Return rows of the nodes besides rank 0's, where the ledger has any."""
    by_node: dict[int, list[Mapping[str, Any]]] = {}
    for record in run.events("system"):
        if type(record.get("node")) is int:
            by_node.setdefault(record["node"], []).append(record)
    return [
        _percent_row(f"node of rank {node}: {what}", known)
        for node, records in sorted(by_node.items())
        for what, values in _percentages(records).items()
        if (known := [value for value in values if value is not None])
    ]


def _percent_row(name: str, values: Sequence[float]) -> list[str]:
    return [name, *(f"{value:.0f}%" for value in (fmean(values), min(values), max(values)))]


def _percentages(records: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return how busy and how full the machine was, in percent; of several GPUs the mean."""
    return {
        "processor": [number(record.get("cpu_percent")) for record in records],
        "memory": [_used(record) for record in records],
        "GPUs busy": [_of_gpus(record, "utilisation_percent") for record in records],
        "GPU memory": [_of_gpus(record, None) for record in records],
    }


def _of_gpus(record: Mapping[str, Any], name: str | None) -> float | None:
    gpus = [gpu for gpu in record.get("gpus") or [] if isinstance(gpu, Mapping)]
    values = [_used(gpu) if name is None else number(gpu.get(name)) for gpu in gpus]
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _used(figures: Mapping[str, Any]) -> float | None:
    used, total = (
        number(figures.get("memory_used_bytes")),
        number(figures.get("memory_total_bytes")),
    )
    return None if used is None or not total else 100 * used / total
