"""The screen of `peft-dist goodput`."""

from peft_dist.common.table import Column, table_lines
from peft_dist.ledger.goodput import PHASES, Goodput

BAR_WIDTH = 20
SHOWN_ATTEMPTS = 10
"""Attempts that fit one screen; JSON has them all."""
_PHASE_COLUMNS = (
    Column("phase", style=lambda phase: "green" if phase == "step" else ""),
    Column("seconds", right=True),
    Column("share", right=True),
    Column("", style=lambda _bar: "cyan"),
    Column("", cut=True),
)
_ATTEMPT_COLUMNS = (
    Column("attempt", right=True),
    Column("from step", right=True),
    Column("to step", right=True),
    Column("wall s", right=True),
    Column("outcome"),
)


def render(found: Goodput, *, width: int | None = None, colour: bool = False) -> list[str]:
    """Return one screen of lines: the share that counts, the phases, the attempts.

    Args:
        found: What to show.
        width: Columns of the terminal; None for as many as it takes.
        colour: Whether lines may hold escape sequences.
    """
    total = found.total_s
    phases = [_phase(phase, seconds, total) for phase, seconds in found.seconds.items()]
    phases.append(["total", f"{total:,.1f}", f"{1:.1%}", "", ""])
    attempts: list[list[str] | str] = [
        [str(span.attempt), str(span.from_step), str(span.to_step), f"{span.wall_s:,.1f}",
         span.outcome]
        for span in found.attempts[-SHOWN_ATTEMPTS:]
    ]  # fmt: skip
    left_out = len(found.attempts) - SHOWN_ATTEMPTS
    if left_out > 0:
        attempts.insert(0, f"... {left_out} earlier; see --json")
    lines = [
        f"goodput {found.fraction:.1%}: {found.seconds['step']:,.1f} s of {total:,.1f} s "
        "went into steps that count",
        "",
        *table_lines(_PHASE_COLUMNS, phases, width=width, colour=colour),
        "",
        *table_lines(_ATTEMPT_COLUMNS, attempts, width=width, colour=colour),
    ]
    if found.gaps:
        lines += ["", *(f"{gap}; their time counts as down" for gap in found.gaps)]
    return lines


def _phase(phase: str, seconds: float, total: float) -> list[str]:
    share = seconds / total if total else 0.0
    bar = "#" * round(BAR_WIDTH * share)
    return [phase.replace("_", " "), f"{seconds:,.1f}", f"{share:.1%}", bar, PHASES[phase]]
