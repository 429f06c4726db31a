"""Lines for people, on standard streams that may be full or gone: no reason for a run to end.

Whatever a person reads passes `printable`: names, rows, hosts and logs come from others, and a
terminal obeys what stands in them.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from peft_dist.common.env import RANK_LOGS
from peft_dist.common.sharing import file_mode


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, on standard output by default, as far as the stream takes it."""
    with suppress(OSError):
        show(text, stream)


def show(text: str, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """Print what a command was asked for, on standard output by default.

    Raises:
        OSError: Where the stream is full or gone.
    """
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    known = printable(text).encode(encoding, errors="replace").decode(encoding)
    print(known, file=stream, end=end, flush=True)


def printable(text: str) -> str:
    """Return a text with `?` for every character that steers a terminal or that nobody sees.

    Those are control characters, what reverses the direction of writing, and half characters. Line
    ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in _HARMLESS else "?" for one in text)


_HARMLESS = "\n\t\u00a0\u200c\u200d\u202f\u3000"
"""Not printable by Unicode, but part of texts: line ends, wide and narrow spaces, and the joiners
of emoji and of Indic and Persian words."""


def clear_bar() -> None:
    """Clear the line that a bar of another process may have left on our terminal."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream.isatty():
                stream.write("\r\x1b[K")
                stream.flush()
                return


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


def to_rank_log() -> None:
    """Let this process write to the log of its rank, where there is one.

    Rank 0 talks to people and stays with the log of its node; a link has its rank's name.
    """
    prefix, rank = os.environ.get(RANK_LOGS, ""), os.environ.get("RANK", "0")
    if not prefix or not rank.isdecimal():
        return
    path = Path(f"{prefix}.rank-{rank}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.log")
    with suppress(OSError):  # without it the lines stand in the node's log
        if rank == "0":
            path.symlink_to(f"{Path(prefix).name}.log")
            return
        log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, file_mode())
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
