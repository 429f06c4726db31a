"""What streams were asked for in a step, and what each of it has to wait for.

Each line of a trace is a kernel, a collective, an event that is recorded or waited for, or a mark
of where the host was; see `stub/runtime.c`. Who waits for an event waits for all that its stream
was asked for before it was recorded.
"""

from dataclasses import dataclass
from pathlib import Path

COMPUTES = "(nil)"
"""The stream that kernels of a model are given to."""


@dataclass(frozen=True)
class Asked:
    """One kernel, collective or mark."""

    place: int
    """In the trace."""
    what: str
    """`kernel`, a collective's name, or `mark`."""
    stream: str
    detail: str
    """Elements of a collective, or the name of a mark."""
    after: dict[str, int]
    """By stream, the place of the last line that has to be done first."""

    def waits_for(self, other: "Asked") -> bool:
        """Whether the other has to be done before this begins."""
        return self.after.get(other.stream, -1) >= other.place


def read_trace(file: Path) -> list[Asked]:
    """Return what was asked, in order."""
    done: dict[str, dict[str, int]] = {}
    recorded: dict[str, dict[str, int]] = {}
    found = []
    for place, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        what, stream, *rest = line.split(" ")
        before = done.setdefault(stream, {})
        if what == "record":
            recorded[rest[0]] = {**before, stream: place}
        elif what == "wait":
            for other, last in recorded.get(rest[0], {}).items():
                before[other] = max(last, before.get(other, -1))
        else:
            found.append(Asked(place, what, stream, "".join(rest), {**before}))
        before[stream] = place
    return found
