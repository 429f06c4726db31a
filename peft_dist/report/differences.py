"""Compare runs: their settings, versions and results."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from peft_dist.ledger.events import LedgerEvent, RollbackEvent, SkippedEvent
from peft_dist.report.run_data import RunData
from peft_dist.report.series import Series, number
from peft_dist.report.text import count, duration, figure, share, sizes, some

UNKNOWN = "–"  # noqa: RUF001


def differing_settings(runs: Sequence[RunData]) -> list[list[str]]:
    """Return a row per setting that is not the same in all runs: its field, and each run's value.

    Versions of packages count as settings too.
    """
    of_runs = [{**run.recipe, **versions(run)} for run in runs]
    fields = list(dict.fromkeys(field for settings in of_runs for field in settings))
    rows = []
    for field in fields:
        values = [shown(settings[field]) if field in settings else UNKNOWN for settings in of_runs]
        if len(set(values)) > 1:
            rows.append([field, *values])
    return rows


def versions(run: RunData) -> dict[str, str]:
    """Return what the run was made with: packages, Python, revision of the checkout."""
    found = run.start.versions or run.made.get("versions")
    packages = found if isinstance(found, Mapping) else {}
    known = {str(name): str(version) for name, version in packages.items()}
    if run.made.get("python"):
        known["python"] = str(run.made["python"])
    git = run.made.get("git")
    if isinstance(git, Mapping):
        modified = ", modified" if git.get("modified") else ""
        known["git revision"] = f"{str(git.get('revision'))[:12]}{modified}"
    return known


def shown(value: Any) -> str:
    """Return a setting as a recipe has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(shown(item) for item in value) or "none"
    return str(value)


def outcomes(run: RunData) -> dict[str, str]:
    """Return the results of a run, the most wanted first; unknown ones are empty."""
    return {
        "state": run.state,
        "steps": _steps(run),
        "held-out accuracy": _change(run, "eval_accuracy", share),
        "held-out loss": _change(run, "eval_loss", figure),
        "training loss": _last(run.steps, "loss", figure),
        "time": duration(run.goodput.total_s) if run.goodput.total_s else "",
        "goodput": share(run.goodput.fraction) if run.goodput.total_s else "",
        "speed": _speed(run),
        "attempts": count(len(run.goodput.attempts)),
        "steps left out": _left_out(run),
        "processes": _processes(run),
        "device": str(run.start.device or run.result.get("device") or ""),
        "base per rank": sizes(run.base_bytes) if run.base_bytes else "",
        "peak memory per rank": sizes(run.peak_bytes) if run.peak_bytes else "",
        "training rows": _rows(run, "train"),
        "held-out rows": _rows(run, "eval"),
        "trained parameters": _known(run.result.get("trainable_parameters"), count),
    }


def _steps(run: RunData) -> str:
    done = run.steps[-1].step if run.steps else 0
    total = run.total_steps
    return count(done) if total in (None, done) else f"{count(done)} of {count(total or 0)}"


def _last(events: Sequence[LedgerEvent], name: str, shown_as: Callable[[float], str]) -> str:
    series = Series.of(events, name)
    return shown_as(series.y[-1]) if len(series) else ""


def _change(run: RunData, name: str, shown_as: Callable[[float], str]) -> str:
    series = Series.of(run.evaluations, name)
    if len(series) < 2:
        return _last(run.evaluations, name, shown_as)
    return f"{shown_as(series.y[0])} → {shown_as(series.y[-1])}"


def _rows(run: RunData, which: str) -> str:
    """Return how many rows were kept and what happened to the others; all sources together."""
    rows = run.result.get("rows")
    sources = rows.get(which) if isinstance(rows, Mapping) else None
    if not isinstance(sources, list) or not sources:
        return ""
    words = {"rows": "", "cut": " cut", "lost_end": " without their end token"}
    words |= {"dropped": " dropped", "bad": " malformed"}
    totals = {
        name: sum(number(one.get(name)) or 0 for one in sources if isinstance(one, Mapping))
        for name in words
    }
    return ", ".join(
        f"{count(int(total))}{words[name]}"
        for name, total in totals.items()
        if total or name == "rows"
    )


def _speed(run: RunData) -> str:
    # The mean of the whole run, where it has one; the number of a single step means little.
    whole = number(run.result.get("tokens_per_second"))
    series = Series.of(run.steps, "tokens_per_s")
    if whole is None and not len(series):
        return ""
    return f"{figure(whole if whole is not None else median(series.y))} tokens/s"


def _known(value: Any, shown_as: Callable[[float], str]) -> str:
    known = number(value)
    return "" if known is None else shown_as(known)


def _processes(run: RunData) -> str:
    ranks = run.start.world_size or number(run.result.get("world_size"))
    strategy = run.start.strategy or run.result.get("strategy")
    parts = [count(ranks)] if ranks else []
    return ", ".join([*parts, str(strategy)] if strategy else parts)


def _left_out(run: RunData) -> str:
    skipped, back = len(run.of(SkippedEvent)), len(run.of(RollbackEvent))
    parts = [f"{some('step', skipped)} skipped"] if skipped else []
    return ", ".join([*parts, *([some("rollback", back)] if back else [])])
