"""One record of a source, before anybody knows whether it is a row."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Broken:
    """A record that could not be decoded, and why."""

    why: str


Record = tuple[int, Any]
"""Line (or row, where a format has no lines) counted from 1, and the value or a `Broken`."""
