"""What all panels of the page share: styles, axes, and the text beside a figure.

Colours are names that the page's style sheet gives a value to, in light and in dark. No run is
identified by its colour alone: dashes, markers, hatching and names do so too.
"""

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from peft_dist.report.run_data import RunData
from peft_dist.report.series import Series, short

SERIES_COLOURS = 8
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "pentagon", "hexagram")
PATTERNS = ("", "/", "x", "-", "\\", "+", "|", ".")
HEIGHT_PX = 300
SHOWN_NAME, SHOWN_BEFORE_BAR = 32, 14
"""Longest name in a legend, and before a bar."""

Trace = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """One figure, what it says in words, and its numbers as a table."""

    key: str
    title: str
    text: str
    figure: Mapping[str, Any]
    """`data` and `layout` for plotly.js."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What is not drawn."""
    wide: bool = False
    """Whether it takes a row of a wide screen for itself."""


@dataclass(frozen=True)
class TraceStyle:
    """How the n-th run, rank or part is drawn, from 0."""

    index: int

    @property
    def colour(self) -> str:
        """Its colour, by name."""
        return f"var(--s{self.index % SERIES_COLOURS + 1})"

    @property
    def line(self) -> dict[str, Any]:
        """Its line."""
        return {"color": self.colour, "dash": DASHES[self.index % len(DASHES)], "width": 2}

    @property
    def marker(self) -> dict[str, Any]:
        """Its marker."""
        return {"color": self.colour, "symbol": SYMBOLS[self.index % len(SYMBOLS)], "size": 8}

    @property
    def fill(self) -> dict[str, Any]:
        """Its area in a bar."""
        pattern = {"shape": PATTERNS[self.index % len(PATTERNS)], "solidity": 0.13, "size": 8}
        return {
            "color": self.colour,
            "pattern": {**pattern, "fillmode": "overlay", "fgcolor": "var(--surface)"},
            "line": {"color": "var(--surface)", "width": 1},
        }


def make_panel(
    key: str,
    title: str,
    text: str,
    traces: Iterable[Trace],
    *,
    layout: Mapping[str, Any],
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    wide: bool = False,
) -> Panel:
    """Return a figure whose every property plotly knows; `layout` is added to what all share."""
    escaped = [_escaped(trace) for trace in traces]
    figure = go.Figure(escaped, _merged(_shared_layout(), layout)).to_plotly_json()
    figure["layout"].pop("template", None)
    return Panel(key, title, text, figure, head, rows, note, wide)


def in_rows(panels: Sequence[Panel]) -> list[Panel]:
    """Return panels that fill rows of two: one that would stand alone is made wide."""
    found: list[Panel] = []
    open_row = False
    for panel in panels:
        if panel.wide and open_row:
            found[-1] = replace(found[-1], wide=True)
        open_row = not panel.wide and not open_row
        found.append(panel)
    if open_row:
        found[-1] = replace(found[-1], wide=True)
    return found


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """Return an axis with its title, which names the unit."""
    return {"title": {"text": title, "standoff": 8, "font": {"size": 13}}, **settings}


def bar_axis(names: Sequence[str]) -> dict[str, Any]:
    """Return an axis of bars, the first on top; names may be alike."""
    indices = list(range(len(names)))
    shown = [_escaped_text(name) for name in names]
    return {
        "autorange": "reversed",
        "tickvals": indices,
        "ticktext": shown,
        "showgrid": False,
        "zeroline": False,
    }


def byte_axis(title: str) -> dict[str, Any]:
    """Return an axis of bytes, in units of powers of 1000."""
    return axis(title, tickformat="~s", ticksuffix="B", rangemode="tozero")


def legend_name(run: RunData) -> str:
    """Return a run's name, short enough for a legend."""
    return _shortened(run.name, SHOWN_NAME)


def bar_name(run: RunData) -> str:
    """Return a run's name, short enough to stand before a bar on a phone."""
    return _shortened(run.name, SHOWN_BEFORE_BAR)


def _shortened(name: str, most: int) -> str:
    half = most // 2
    return name if len(name) <= most else f"{name[: most - half]}…{name[-half + 1 :]}"


def line_over_steps(
    series: Series, style: TraceStyle, *, name: str, alone: bool = True, **settings: Any
) -> list[Trace]:
    """Return a line over steps: its mean and, where it stands alone, faint and whole beneath it."""
    mean = series.mean().thinned()
    main = {
        "type": "scatter", "mode": "lines", "x": short(mean.x), "y": short(mean.y),
        "line": style.line, "name": name, "legendgroup": name, **settings,
    }  # fmt: skip
    if not alone:
        return [main]
    if series.window == 1:
        return [{**main, "name": "each step"}]
    whole = series.thinned()
    faint = {
        **main, "x": short(whole.x), "y": short(whole.y), "name": "each step", "opacity": 0.35,
        "line": {"color": style.colour, "width": 1}, "legendgroup": "each step",
    }  # fmt: skip
    return [faint, {**main, "name": f"mean of {series.window:,} steps"}]


def restart_marks(run: RunData, style: TraceStyle, series: Series, *, shown: bool) -> list[Trace]:
    """Return a mark where each attempt but the first goes on, on the line of a series."""
    mean = series.mean()
    found = [(r.step, r.attempt, mean.at(max(r.step, mean.x[0]))) for r in run.restarts]
    placed = [(step, attempt, y) for step, attempt, y in found if y is not None]
    if not placed:
        return []
    return [
        {
            "type": "scatter", "mode": "markers", "name": "restart", "legendgroup": "restart",
            "x": [step for step, _, _ in placed], "y": short(y for _, _, y in placed),
            "text": [f"attempt {attempt} goes on after step {step}" for step, attempt, _ in placed],
            "hovertemplate": "%{text}<extra></extra>", "showlegend": shown,
            "marker": {
                "symbol": "line-ns-open", "size": 18, "color": style.colour,
                "line": {"width": 3, "color": style.colour},
            },
        }
    ]  # fmt: skip


def over_steps_rows(
    runs: Sequence[RunData], all_series: Sequence[Series], shown: Callable[[float], str]
) -> list[list[str]]:
    """Return a table row per run: first, last, lowest and highest value."""
    return [
        [run.name, *(shown(value) for value in (s.y[0], s.y[-1], min(s.y), max(s.y)))]
        for run, s in zip(runs, all_series, strict=True)
    ]


OVER_STEPS_HEAD = ("run", "first", "last", "lowest", "highest")


def in_words(
    runs: Sequence[RunData],
    all_series: Sequence[Series],
    shown: Callable[[float], str],
    *,
    highest: bool = False,
) -> str:
    """Return where a line begins and ends and where it is lowest; of several, which end where.

    Args:
        runs: Whose lines they are.
        all_series: One for each run.
        shown: Makes a text of a value.
        highest: Whether to report the highest value instead of the lowest.
    """
    if len(runs) > 1:
        ends = [max(s.y) if highest else s.y[-1] for s in all_series]
        least, most = ends.index(min(ends)), ends.index(max(ends))
        what = "Highest value" if highest else "Last value"
        low, high = shown(ends[least]), shown(ends[most])
        if low == high:
            return f"{what}: {low} in all."
        return f"{what}: from {low} in {runs[least].name} to {high} in {runs[most].name}."
    (series,) = all_series
    if len(series) == 1:
        return f"{shown(series.y[0])} at step {series.x[0]:,.0f}."
    extreme = series.y.index(max(series.y) if highest else min(series.y))
    begun, ended = f"step {series.x[0]:,.0f}", f"step {series.x[-1]:,.0f}"
    text = f"From {shown(series.y[0])} at {begun} to {shown(series.y[-1])} at {ended}"
    if extreme not in (0, len(series) - 1):
        word = "highest" if highest else "lowest"
        text += f"; {word} {shown(series.y[extreme])} at step {series.x[extreme]:,.0f}"
    return text + "."


def _shared_layout() -> dict[str, Any]:
    shown_axis = {
        "gridcolor": "var(--line)", "linecolor": "var(--line)", "zerolinecolor": "var(--line)",
        "automargin": True, "fixedrange": False,
    }  # fmt: skip
    return {
        "height": HEIGHT_PX,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "var(--soft)"},
        "hoverlabel": {
            "bgcolor": "var(--surface)", "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"}, "namelength": -1,
        },
        "hovermode": "closest",
        "legend": {
            "orientation": "h", "font": {"size": 12},
            "xref": "container", "x": 0, "yref": "container", "y": 1, "yanchor": "top",
        },
        "xaxis": shown_axis,
        "yaxis": shown_axis,
    }  # fmt: skip


def _escaped(trace: Trace) -> dict[str, Any]:
    """Return a trace whose texts plotly shows as they are: to it, `<b>` and `&` mean something."""
    return {
        key: _escaped_text(value) if key in ("name", "text", "x", "y", "customdata") else value
        for key, value in trace.items()
    }


def _escaped_text(value: Any) -> Any:
    if isinstance(value, str):
        return html.escape(value, quote=False)
    return [_escaped_text(item) for item in value] if isinstance(value, list) else value


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(base)
    for key, value in more.items():
        old = found.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return found
