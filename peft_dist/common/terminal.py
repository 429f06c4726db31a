"""The terminal that a stream is: whether it can be drawn on, its size and its colours."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Console

USUAL_COLUMNS, USUAL_LINES = 80, 25
"""Of a terminal that does not know its size."""


class Stream(Protocol):
    """What of a text stream is asked here."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""

    def fileno(self) -> int:
        """Return its descriptor."""


def is_terminal(stream: Stream) -> bool:
    """Whether a stream is a terminal that can be drawn on."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def has_colours(stream: Stream) -> bool:
    """Whether a stream is a terminal with colours, of somebody who wants them."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def size(stream: Stream) -> tuple[int, int]:
    """Return columns and lines of a terminal; 0 is no size, and standard input is not asked."""
    columns = lines = 0
    with suppress(OSError, ValueError):
        columns, lines = os.get_terminal_size(stream.fileno())
    return columns or USUAL_COLUMNS, lines or USUAL_LINES


def terminal_console(stream: Stream) -> "Console":
    """Return rich's console on a terminal, which leaves its cursor alone.

    A process that is killed could not show the cursor again.
    """
    from rich.console import Console, ConsoleDimensions

    class Terminal(Console):
        @property  # type: ignore[misc]
        def size(self) -> ConsoleDimensions:
            return ConsoleDimensions(*size(stream))

        def show_cursor(self, show: bool = True) -> bool:
            return False

    # Not by what the environment says (FORCE_COLOR, TTY_COMPATIBLE): a file stays plain text.
    return Terminal(
        file=stream,  # type: ignore[arg-type]
        force_terminal=True,
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )
