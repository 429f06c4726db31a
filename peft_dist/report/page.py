"""Render the page of a report from the data of its runs and a template.

Every value passes the template's escaping; plotly.js and the numbers of the figures are part of
the page, which may load nothing.
"""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from peft_dist import __version__
from peft_dist.ledger.events import StepEvent
from peft_dist.report.differences import UNKNOWN, differing_settings, outcomes, versions
from peft_dist.report.learning import learning_panels
from peft_dist.report.memory import memory_panels
from peft_dist.report.panel import Panel, TraceStyle, in_rows
from peft_dist.report.run_data import RunData, SampleAnswers
from peft_dist.report.series import MOST_POINTS, PARTS
from peft_dist.report.speed import speed_panels
from peft_dist.report.text import duration
from peft_dist.report.time_use import clock_panels
from peft_dist.report.timeline import timeline

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that no text shows: a model that has not learned yet writes them."""
MOST_ATTEMPTS = 50
"""Attempts of a run in its table; the first and the last of more."""


@dataclass(frozen=True)
class SampleRow:
    """One example of the eval set, and what each run answered to it."""

    row: int
    prompt: str
    expected: str
    answers: Sequence[tuple[str, str | None, str | None]]
    """Of each run that was asked: its name, and its answers before and after training."""


def render_page(runs: Sequence[RunData], folder: Path | None = None) -> str:
    """Return the page about some runs as HTML.

    Args:
        runs: The runs.
        folder: Where the page will stand, for its links to traces. Default: in the first run's.
    """
    environment = Environment(
        loader=PackageLoader("peft_dist", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plain"] = lambda text: CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(text))
    environment.filters["duration"] = duration
    environment.filters["moment"] = _moment
    sections = [
        ("learning", "Learning", in_rows(learning_panels(runs))),
        ("speed", "Speed", in_rows(speed_panels(runs))),
        ("memory", "Memory", in_rows(memory_panels(runs))),
        ("time", "Time", in_rows(clock_panels(runs))),
    ]
    text = environment.get_template("page.html.j2").render(
        context(runs, sections) | {"traces": _traces(runs, folder or runs[0].path)}
    )
    return text.encode("utf-8", "replace").decode("utf-8")  # folders may have any bytes for a name


def _traces(runs: Sequence[RunData], folder: Path) -> list[tuple[str, str, str]]:
    """Return each trace of some steps: its run, its file, and a link to it from a folder."""
    return [
        (run.name, trace.name, quote(os.path.relpath(trace.absolute(), folder.absolute())))
        for run in runs
        for trace in run.traces
    ]


def _moment(text: Any) -> str:
    """Return a time in ISO 8601 as a person reads it; anything else as it is."""
    with suppress(ValueError):
        return f"{datetime.fromisoformat(str(text)).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    return str(text)


def context(
    runs: Sequence[RunData], sections: Sequence[tuple[str, str, Sequence[Panel]]]
) -> dict[str, Any]:
    """Return what the template is filled with."""
    entries, entries_left_out = timeline(runs)
    panels = [panel for _, _, some in sections for panel in some]
    return {
        "title": ", ".join(run.name for run in runs),
        "runs": runs,
        "alone": len(runs) == 1,
        "looks": [TraceStyle(index) for index in range(len(runs))],
        "outcomes": outcomes_table(runs),
        "settings": differing_settings(runs) if len(runs) > 1 else [],
        "sections": [part for part in sections if part[2]],
        "figures": {panel.key: panel.figure for panel in panels},
        "attempts": [(run.name, *_shown_attempts(run)) for run in runs],
        "timeline": entries,
        "timeline_left_out": entries_left_out,
        "samples": sample_rows(runs),
        "versions": {run.name: versions(run) for run in runs},
        # Our own script, and plotly's as it is: neither holds a value of a run.
        "plotly": Markup(get_plotlyjs()),
        "reading": _how_to_read(runs),
        "made": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "version": __version__,
        "unknown": UNKNOWN,
    }


def outcomes_table(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Return the results, a row for each that any run has, with a text for each run."""
    of_runs = [outcomes(run) for run in runs]
    rows = [(name, [found[name] for found in of_runs]) for name in of_runs[0]]
    return [(name, [text or UNKNOWN for text in texts]) for name, texts in rows if any(texts)]


def sample_rows(runs: Sequence[RunData]) -> list[SampleRow]:
    """Return the examples that any run was asked, each with all answers to it."""
    found: dict[tuple[int, str, str], list[tuple[str, SampleAnswers]]] = {}
    for run in runs:
        for sample in run.samples:
            key = (sample.row, sample.prompt, sample.expected)
            found.setdefault(key, []).append((run.name, sample))
    return [
        SampleRow(*key, [(name, sample.before, sample.after) for name, sample in answers])
        for key, answers in sorted(found.items())
    ]


def _how_to_read(runs: Sequence[RunData]) -> str:
    """Return where a line is not every number of the ledger; empty where it is."""
    notes = []
    if len(runs) > 1:
        notes.append(
            f"Of several runs, noisy lines are means over a {PARTS}th of each run's steps."
        )
    longest = max(len(run.counting) for run in runs)
    if longest > MOST_POINTS:
        notes.append(
            f"Lines have {MOST_POINTS:,} points at most, of up to {longest:,}: the lowest and the "
            "highest of every part, so that no spike is lost."
        )
    if notes and not any(run.is_thinned for run in runs):
        notes.append("Means, texts and tables count every step.")
    for run in runs:
        if run.is_thinned:
            notes.append(
                f"Of the {run.ledger_steps:,} steps of {run.name}, {len(run.of(StepEvent)):,} are "
                "used: evenly spread ones and, between them, those of the lowest and highest loss, "
                "gradient and speed. Times of phases count every step."
            )
        notes += [f"Of {run.name}, {gap}, which no figure has." for gap in run.goodput.gaps]
    return " ".join(notes)


def _shown_attempts(run: RunData) -> tuple[list[Any], int]:
    spans = run.goodput.attempts
    left_out = len(spans) - MOST_ATTEMPTS
    if left_out <= 0:
        return spans, 0
    half = MOST_ATTEMPTS // 2
    return [*spans[:half], *spans[-half:]], left_out
