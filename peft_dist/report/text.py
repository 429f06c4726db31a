"""Numbers as people read them: `1,234`, `12.3 MB`, `3 min 20 s`. Computes nothing."""

import math
from collections.abc import Sequence

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def count(value: float) -> str:
    """Return a whole number with its thousands apart."""
    return f"{round(value):,}"


def figure(value: float) -> str:
    """Return a measured number with about four digits that matter."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def rate(value: float) -> str:
    """Return a learning rate as people write it."""
    return f"{value:.3g}"


def share(value: float) -> str:
    """Return a share as a percentage."""
    return f"{value:.1%}"


def size(value: float) -> str:
    """Return bytes in the unit, of powers of 1000, that leaves one to three digits before it."""
    unit = 0
    while abs(value) >= 999.95 and unit < len(BYTE_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.1f} {BYTE_UNITS[unit]}"


def sizes(values: Sequence[float]) -> str:
    """Return one size where all are shown alike, else the smallest and the largest."""
    least, most = size(min(values)), size(max(values))
    if least == most:
        return least
    number, unit = least.split()
    return f"{number} to {most}" if most.endswith(f" {unit}") else f"{least} to {most}"


def duration(seconds: float) -> str:
    """Return a time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    left = round(seconds)
    for unit, name, smaller, smaller_name in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if left >= unit:
            rest = left % unit // smaller
            return f"{left // unit} {name} {rest} {smaller_name}"
    return f"{left} s"


def some(word: str, number: int) -> str:
    """Return a number with its noun: `1 attempt`, `3 attempts`."""
    return f"{number:,} {word}" if number == 1 else f"{number:,} {word}s"


def off_by(planned: float, measured: float) -> str:
    """Return how far a plan is from what was measured, in brackets; nothing without either."""
    return f" ({planned / measured - 1:+.0%})" if planned and measured else ""
