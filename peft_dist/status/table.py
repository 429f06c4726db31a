"""Runs as a table, as wide as its terminal.

Pure: rows in, lines out. Where a terminal is narrow, the speed is left out, node lists and
reasons share a column as in squeue, and what is too long still is cut.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_dist.common.table import Column, table_lines, table_width
from peft_dist.slurm.job_state import UNKNOWN
from peft_dist.status.run_state import DONE, WAITING, RunView, has_failed, is_at_work

LONGEST_CAUSE = 240
NO_VALUE = "-"

Row = Sequence[str] | str


@dataclass(frozen=True)
class ArrayView:
    """An array: its own line, and one run per element."""

    run: str
    path: str
    job: str
    elements: list[RunView]
    settings: list[list[str]]
    """What each element was given: `train.seed=1`."""
    results: list[dict[str, Any] | None]

    @property
    def counts(self) -> dict[str, int]:
        """Return how many elements are done, running, pending, failed, stopped and unknown."""
        found = dict.fromkeys(("done", "running", "pending", "failed", "stopped", "unknown"), 0)
        for element in self.elements:
            found[_kind(element.state)] += 1
        return found

    @property
    def is_over(self) -> bool:
        """Whether no element will come to anything more by itself."""
        return not any(self.counts[kind] for kind in ("running", "pending", "unknown"))


def _style(state: str) -> str:
    """Return the colour of a state."""
    kind = _kind(state)
    return {"done": "green", "running": "cyan", "pending": "yellow", "failed": "red"}.get(kind, "")


WHO = (Column("run", cut=True), Column("job"), Column("state", style=_style))
PLACE = (Column("reason"), Column("nodes"))
NARROW_PLACE = (Column("nodes/reason", cut=True),)
HOW_FAR = tuple(
    Column(title, right=True)
    for title in ("attempt", "step", "loss", "tok/s", "gpu-h", "left", "seen")
)
NARROW_HOW_FAR = tuple(column for column in HOW_FAR if column.title not in ("tok/s", "gpu-h"))


def render(
    views: Sequence[RunView | ArrayView], width: int | None, *, colour: bool = False
) -> list[str]:
    """Return the lines of the table of runs, and of the results of arrays that are over.

    Args:
        views: What to show, in order.
        width: Columns of the terminal; None for as many as it takes.
        colour: Whether lines may hold escape sequences.
    """
    columns, rows = _without_jobs((*WHO, *PLACE, *HOW_FAR), _rows(views))
    if width is not None and table_width(columns, rows) > width:
        rows = _rows(views, narrow=True)
        columns, rows = _without_jobs((*WHO, *NARROW_PLACE, *NARROW_HOW_FAR), rows)
    lines = table_lines(columns, rows, width=width, colour=colour)
    for entry in views:
        if isinstance(entry, ArrayView) and entry.is_over and any(entry.results):
            lines += ["", f"results of {entry.run}", *_results(entry, width, colour=colour)]
    return lines


def _without_jobs(columns: Sequence[Column], rows: list[Row]) -> tuple[Sequence[Column], list[Row]]:
    """Leave out what only a cluster knows, where no run is or was a job."""
    titles = [column.title for column in columns]
    cells = [row for row in rows if not isinstance(row, str)]

    def is_known(title: str) -> bool:
        return title in titles and any(row[titles.index(title)] != NO_VALUE for row in cells)

    dropped = {"job", "nodes"} if not is_known("job") else set()
    dropped |= set() if is_known("gpu-h") else {"gpu-h"}
    kept = [index for index, title in enumerate(titles) if title not in dropped]
    return [columns[index] for index in kept], [
        row if isinstance(row, str) else [row[index] for index in kept] for row in rows
    ]


def _rows(views: Sequence[RunView | ArrayView], *, narrow: bool = False) -> list[Row]:
    rows: list[Row] = []
    for entry in views:
        if isinstance(entry, RunView):
            rows += _run_rows(entry, narrow=narrow)
        else:
            rows.append(_summary(entry))
            # Elements that wait do so alike.
            waits = [element.waits for element in entry.elements if element.waits]
            rows += [f"  ^ {text}" for text in waits[:1]]
            for element in entry.elements:
                rows += _run_rows(replace(element, waits=""), narrow=narrow, indent="  ")
    return rows


def _run_rows(view: RunView, *, narrow: bool, indent: str = "") -> list[Row]:
    columns = [view.reason or NO_VALUE, view.nodes or NO_VALUE]
    if narrow:
        reason = f"({view.reason})" if view.reason else ""
        columns = [" ".join(filter(None, (view.nodes, reason))) or NO_VALUE]
    speed = NO_VALUE if view.tokens_per_s is None else f"{view.tokens_per_s:,.0f}"
    hours = NO_VALUE if view.gpu_hours is None else f"{view.gpu_hours:,.1f}"
    row = [
        indent + view.run,
        view.job or NO_VALUE,
        view.state,
        *columns,
        str(view.attempt) if view.attempt else NO_VALUE,
        _progress(view),
        NO_VALUE if view.loss is None else f"{view.loss:.4f}",
        *([] if narrow else [speed, hours]),
        NO_VALUE if view.eta_s is None else duration(view.eta_s),
        NO_VALUE if view.heartbeat_s is None else duration(view.heartbeat_s),
    ]
    remarks = [text for text in (view.cause, view.gap, view.waits) if text]
    return [row, *(f"{indent}  ^ {_cut(text)}" for text in remarks)]


def _cut(text: str) -> str:
    """Return as much of a cause as a table should hold; `logs` and --json have all of it."""
    return text if len(text) <= LONGEST_CAUSE else f"{text[: LONGEST_CAUSE - 3]}..."


def _progress(view: RunView) -> str:
    if view.step is None:
        return NO_VALUE
    return f"{view.step}/{'?' if view.steps is None else view.steps}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units: 12s, 4m05s, 1h02m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02}h"


def _summary(entry: ArrayView) -> str:
    always = ("done", "running", "pending", "failed")
    counts = [f"{n} {kind}" for kind, n in entry.counts.items() if n or kind in always]
    job = f"job {entry.job}, " if entry.job else ""
    return f"{entry.run}: {job}{len(entry.elements)} runs: {', '.join(counts)}"


def _kind(state: str) -> str:
    if state == DONE:
        return "done"
    if state in WAITING:
        return "pending"
    if is_at_work(state):
        return "running"
    if state == UNKNOWN:
        return "unknown"
    return "failed" if has_failed(state) else "stopped"


def _results(entry: ArrayView, width: int | None, *, colour: bool) -> list[str]:
    """Return what the elements of an array came to, one line each."""
    names = list(dict.fromkeys(_name(text) for given in entry.settings for text in given))
    titles = ["loss", "eval first", "eval last", "accuracy first", "accuracy last"]
    rows = []
    for element, given, result in zip(entry.elements, entry.settings, entry.results, strict=True):
        values = dict(text.partition("=")[::2] for text in given)
        figures = [NO_VALUE] * len(titles) if result is None else _figures(result)
        rows.append([element.run, *(values.get(name, NO_VALUE) for name in names), *figures])
    columns = [
        Column("run", cut=True),
        *(Column(_short(name, names), cut=True) for name in names),
        *(Column(title, right=True) for title in titles),
    ]
    # Most runs have no accuracy.
    shown = [
        index
        for index, column in enumerate(columns)
        if not column.right or any(row[index] != NO_VALUE for row in rows)
    ]
    kept = [[row[index] for index in shown] for row in rows]
    return table_lines([columns[index] for index in shown], kept, width=width, colour=colour)


def _figures(result: dict[str, Any]) -> list[str]:
    scores = result.get("eval") if isinstance(result.get("eval"), dict) else {}
    first, last = ((scores or {}).get(name) or {} for name in ("first", "last"))
    values = [
        result.get("final_loss"),
        *(score.get("loss") for score in (first, last)),
        *(score.get("accuracy") for score in (first, last)),
    ]
    return [f"{value:.4f}" if isinstance(value, int | float) else NO_VALUE for value in values]


def _name(setting: str) -> str:
    return setting.partition("=")[0]


def _short(name: str, names: Sequence[str]) -> str:
    """Return the last part of a setting's name, where that tells it from the others."""
    last = name.rpartition(".")[2]
    alike = [other for other in names if other.rpartition(".")[2] == last]
    return last if len(alike) == 1 else name
