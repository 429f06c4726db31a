"""What `peft-dist doctor` says: one line, and how bad it is."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line."""

    level: Level
    text: str
