"""Panels of what was learned: loss, held-out loss and accuracy, learning rate, gradient norm."""

from collections.abc import Callable, Sequence

from peft_dist.ledger.events import RollbackEvent, SkippedEvent
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
    restart_marks,
)
from peft_dist.report.run_data import RunData
from peft_dist.report.series import Series, number, short
from peft_dist.report.text import figure, rate, share, some

STEP_AXIS = axis("step", rangemode="tozero")


def learning_panels(runs: Sequence[RunData]) -> list[Panel]:
    """Return the figures of what was learned, those that the runs have numbers for."""
    found = [
        _training_loss(runs),
        _held_out(runs, "eval_loss", "Held-out loss", _unit_of_loss(runs), figure),
        _held_out(runs, "eval_accuracy", "Held-out accuracy", "share of rows right", share),
        _over_steps(runs, "reward_margin", "Reward margin", "chosen minus rejected", figure),
        _over_steps(runs, "reward_accuracy", "Pairs in the right order", "share of pairs", share),
        _learning_rate(runs),
        _gradient_norm(runs),
    ]
    return [panel for panel in found if panel is not None]


def with_series(
    runs: Sequence[RunData], name: str, event: str = "step"
) -> tuple[list[tuple[int, RunData]], list[Series]]:
    """Return the runs whose events have a field, each with its index, and their series."""
    pairs = []
    for index, run in enumerate(runs):
        series = Series.of(run.steps if event == "step" else run.evaluations, name)
        if len(series):
            pairs.append(((index, run), series))
    return [indexed for indexed, _ in pairs], [series for _, series in pairs]


def lines_of_steps(
    runs: Sequence[RunData], name: str
) -> tuple[list[RunData], list[Series], list[Trace]]:
    """Return the runs whose steps have a field, its series, and their lines in a figure."""
    indexed, lines = with_series(runs, name)
    traces: list[Trace] = []
    for (index, run), series in zip(indexed, lines, strict=True):
        alone = len(runs) == 1
        traces += line_over_steps(series, TraceStyle(index), name=legend_name(run), alone=alone)
    return [run for _, run in indexed], lines, traces


def _unit_of_loss(runs: Sequence[RunData]) -> str:
    supervised = all(run.recipe.get("objective.kind", "sft") == "sft" for run in runs)
    return "loss, nats per token" if supervised else "loss"


def _over_steps(
    runs: Sequence[RunData], name: str, title: str, unit: str, shown: Callable[[float], str]
) -> Panel | None:
    """Return a figure of every step, such as an objective reports besides its loss."""
    own, lines, traces = lines_of_steps(runs, name)
    if not own:
        return None
    return make_panel(
        name.replace("_", "-"),
        title,
        in_words(own, lines, shown, highest=True),
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis(unit)},
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, shown),
    )


def _training_loss(runs: Sequence[RunData]) -> Panel | None:
    indexed, lines = with_series(runs, "loss")
    if not indexed:
        return None
    traces: list[Trace] = []
    restarts: list[Trace] = []
    left_out: list[Trace] = []
    for (index, run), series in zip(indexed, lines, strict=True):
        style, alone = TraceStyle(index), len(runs) == 1
        traces += line_over_steps(series, style, name=legend_name(run), alone=alone)
        restarts += restart_marks(run, style, series, shown=not restarts)
        left_out += _left_out(run, style, series, shown=not left_out)
    own = [run for _, run in indexed]
    return make_panel(
        "loss",
        "Training loss",
        _words_of_loss(own, lines),
        [*traces, *restarts, *left_out],
        layout={"xaxis": STEP_AXIS, "yaxis": axis(_unit_of_loss(runs))},
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, figure),
        wide=True,
    )


def _words_of_loss(runs: Sequence[RunData], lines: Sequence[Series]) -> str:
    text, restarts = in_words(runs, lines, figure), sum(len(run.restarts) for run in runs)
    return f"{text} {some('restart', restarts)}." if restarts else text


def _left_out(run: RunData, style: TraceStyle, series: Series, *, shown: bool) -> list[Trace]:
    """Return a mark for each step whose loss or gradient was not finite."""
    events = [e for e in run.events if isinstance(e, SkippedEvent | RollbackEvent)]
    if not events:
        return []
    words = {SkippedEvent: "skipped", RollbackEvent: "rolled back"}
    return [
        {
            "type": "scatter", "mode": "markers", "name": "skipped or rolled back",
            "x": [event.step for event in events],
            "y": short(series.at(event.step) or series.y[0] for event in events),
            "text": [f"step {event.step} {words[type(event)]}" for event in events],
            "hovertemplate": "%{text}<extra></extra>", "showlegend": shown,
            "marker": {"symbol": "x-open", "size": 11, "color": style.colour,
                       "line": {"width": 2, "color": style.colour}},
        }
    ]  # fmt: skip


def _held_out(
    runs: Sequence[RunData], name: str, title: str, unit: str, shown: Callable[[float], str]
) -> Panel | None:
    indexed, lines = with_series(runs, name, "evaluation")
    if not indexed:
        return None
    traces: list[Trace] = []
    for (index, run), whole in zip(indexed, lines, strict=True):
        series = whole.thinned()
        # A mark for every evaluation of a long run would be a smear.
        mode = "lines+markers" if len(series) <= 60 else "lines"
        ends = [shown(y) if i in (0, len(series) - 1) else "" for i, y in enumerate(series.y)]
        style, rises = TraceStyle(index), len(series) > 1 and series.y[1] > series.y[0]
        first = "bottom right" if rises else "top right"
        traces.append(
            {
                "type": "scatter", "mode": mode + ("+text" if len(runs) == 1 else ""),
                "x": short(series.x), "y": short(series.y), "name": legend_name(run),
                "line": style.line, "marker": style.marker, "text": ends, "cliponaxis": False,
                "textposition": [first, *["top left"] * (len(series) - 1)],
                "hovertemplate": "step %{x}: %{y:.4g}",
            }
        )  # fmt: skip
    accuracy = name == "eval_accuracy"
    scale = {"tickformat": ".0%", "range": [0, 1.05]} if accuracy else {}
    own = [run for _, run in indexed]
    return make_panel(
        name.replace("_", "-"),
        title,
        in_words(own, lines, shown),
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis(unit, **scale), "showlegend": len(runs) > 1},
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, shown),
    )


def _learning_rate(runs: Sequence[RunData]) -> Panel | None:
    indexed, lines = with_series(runs, "lr")
    if not indexed:
        return None
    traces: list[Trace] = []
    for (index, run), whole in zip(indexed, lines, strict=True):
        series = whole.thinned()
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": short(series.x), "y": short(series.y),
                "name": legend_name(run), "line": TraceStyle(index).line,
            }
        )  # fmt: skip
    own = [run for _, run in indexed]
    return make_panel(
        "lr",
        "Learning rate",
        in_words(own, lines, rate, highest=True),
        traces,
        layout={
            "xaxis": STEP_AXIS,
            "yaxis": axis("learning rate", rangemode="tozero", exponentformat="e"),
            "showlegend": len(runs) > 1,
        },
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, rate),
    )


def _gradient_norm(runs: Sequence[RunData]) -> Panel | None:
    own, lines, traces = lines_of_steps(runs, "grad_norm")
    if not own:
        return None
    text = in_words(own, lines, figure, highest=True)
    limits = {number(run.recipe.get("train.max_grad_norm")) for run in own}
    limit = limits.pop() if len(limits) == 1 else None
    if limit:
        steps = [min(series.x[0] for series in lines), max(series.x[-1] for series in lines)]
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": steps, "y": [limit, limit],
                "name": f"clipped to {limit:g}",
                "line": {"color": "var(--soft)", "dash": "dot", "width": 1.5},
            }
        )  # fmt: skip
        above = sum(y > limit for series in lines for y in series.y)
        text += f" Clipped to {limit:g} in {share(above / sum(map(len, lines)))} of the steps."
    return make_panel(
        "grad-norm",
        "Gradient norm before clipping",
        text,
        traces,
        layout={"xaxis": STEP_AXIS, "yaxis": axis("norm", rangemode="tozero")},
        head=OVER_STEPS_HEAD,
        rows=over_steps_rows(own, lines, figure),
    )
