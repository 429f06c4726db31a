"""The one logger of this program: what its lines look like, and which stream takes them.

Every line has the time, and that of a training process its rank. Lines of rank 0 go to standard
output, above what is drawn there; those of all processes to standard error, which `peft-dist` keeps
in a file.
"""

import logging
import os
import sys
import time
from contextlib import suppress
from typing import TextIO

from peft_dist.common.console import printable
from peft_dist.common.env import FAILURES, VERBOSITY
from peft_dist.common.screen import screen

NOTICE = 25
"""Level of what people must see, also where they want no progress; it is no warning."""
LEVELS = {"quiet": NOTICE, "normal": logging.INFO, "verbose": logging.DEBUG}


class _Formatter(logging.Formatter):
    """Formats a record as a line that steers no terminal: texts in it come from others."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._by = "" if rank is None else f" [rank {rank}]"

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = record.levelname.lower() + ": " if record.levelno >= logging.WARNING else ""
        text = record.getMessage()
        if record.name == "py.warnings":  # behind the first line stands source text
            text = text.partition("\n")[0]
        if record.exc_info:
            text = f"{text}\n{self.formatException(record.exc_info)}"
        return printable(f"{clock}{self._by} {level}{text}")


class _ScreenHandler(logging.Handler):
    """Shows records above the bars on standard output.

    Without a lock of its own: the screen has one, and who holds that may log.
    """

    def createLock(self) -> None:  # noqa: N802 - logging's name
        """Make none."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        try:
            screen().line(self.format(record))
        except Exception:  # as every handler of the library does: a line is worth no run
            self.handleError(record)


def begin(rank: int | None = None, *, on_screen: bool = True) -> None:
    """Let log lines be seen from now on.

    Args:
        rank: Which of the training processes this is; None for a command.
        on_screen: Whether this process may use standard output, where it is rank 0 or a command.
    """
    level = LEVELS.get(os.environ.get(VERBOSITY, ""), logging.INFO)
    # Of what goes well rank 0 tells for all.
    least = logging.WARNING if rank and not is_verbose() else level
    logging.getLogger("peft_dist").setLevel(least)
    screen().is_quiet = level > logging.INFO or (rank or 0) != 0
    root = logging.getLogger()
    if root.handlers:  # a program that has loggers of its own, such as pytest
        return
    logging.captureWarnings(True)
    talks = on_screen and rank in (0, None)
    handlers: list[logging.Handler] = [_ScreenHandler()] if talks else []
    if not talks or (rank == 0 and not _same_file(sys.stdout, sys.stderr)):
        errors = logging.StreamHandler()
        # A launcher of ours keeps them in a file; else they are what is wrong, and no more.
        errors.setLevel(logging.NOTSET if FAILURES in os.environ else logging.WARNING)
        handlers.append(errors)
    for handler in handlers:
        handler.setFormatter(_Formatter(rank))
        root.addHandler(handler)


def end() -> None:
    """Take back what `begin` did, so that a fork of this process can begin as another rank."""
    screen().close()
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in [one for one in root.handlers if isinstance(one.formatter, _Formatter)]:
        root.removeHandler(handler)


def is_verbose() -> bool:
    """Whether libraries may say all that they have to say."""
    return os.environ.get(VERBOSITY) == "verbose"


def _same_file(one: TextIO, other: TextIO) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        first, second = (os.fstat(stream.fileno()) for stream in (one, other))
        return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
    return False
