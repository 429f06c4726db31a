"""What a check says: one line, and how bad it is."""

from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line."""

    level: Level
    """`bad` would end a run; `note` would not."""
    kind: str
    """What it is about: of several nodes, a fault of this kind that all have is no node's."""
    text: str
    remedy: str = ""
    """What to do about it."""

    @property
    def line(self) -> str:
        """All of it."""
        return f"{self.text}; {self.remedy}" if self.remedy else self.text

    def and_also(self, other: "Finding") -> "Finding":
        """Return one finding of two of a kind."""
        remedies = dict.fromkeys(filter(None, (self.remedy, other.remedy)))
        return replace(self, text=f"{self.text}; {other.text}", remedy="; ".join(remedies))
