"""Lengths of time as Slurm writes them, and as seconds."""

import re

from peft_dist.common.errors import ClusterError

CLOCK = re.compile(r"(?P<hours>[0-9]{1,4}):(?P<minutes>[0-5]?[0-9]):(?P<seconds>[0-5]?[0-9])")
WITH_DAYS = re.compile(
    r"(?P<days>[0-9]{1,4})-(?P<hours>[0-9]{1,4})"
    r"(?::(?P<minutes>[0-5]?[0-9])(?::(?P<seconds>[0-5]?[0-9]))?)?"
)


def duration_s(text: str, *, where: str = "") -> int:
    """Return the seconds of `HH:MM:SS`, `D-HH:MM:SS`, `D-HH:MM` or `D-HH`.

    Raises:
        ClusterError: For anything else; a bare number or `MM:SS` would be minutes to Slurm, and
            seconds or hours to many readers.
    """
    found = CLOCK.fullmatch(text) or WITH_DAYS.fullmatch(text)
    remedy = "write HH:MM:SS or D-HH:MM:SS"
    if found is None:
        raise ClusterError(f"{text[:40]!r} is no time", where=where, remedy=remedy)
    parts = {name: int(digits or 0) for name, digits in found.groupdict().items()}
    hours = parts.get("days", 0) * 24 + parts["hours"]
    total = (hours * 60 + parts["minutes"]) * 60 + parts["seconds"]
    if total == 0:
        raise ClusterError(f"{text!r} is no time at all", where=where, remedy=remedy)
    return total


def duration_text(seconds: int) -> str:
    """Return seconds as Slurm reads them: HH:MM:SS, or D-HH:MM:SS."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{days}-{clock}" if days else clock
