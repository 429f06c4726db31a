"""Lines for people, on standard streams that may be full or gone: no reason for a run to end."""

import os
import sys
from contextlib import suppress
from typing import TextIO


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output by default, as far as the stream takes it."""
    with suppress(OSError):
        print(text, file=stream or sys.stdout, flush=True)


def to_nowhere(stream: TextIO) -> None:
    """Let a stream take anything from now on, and show nothing."""
    # What the stream still holds would fail again when Python ends, with exit code 120.
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def flush() -> None:
    """Write what the standard streams still hold, or give it up."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            to_nowhere(stream)
