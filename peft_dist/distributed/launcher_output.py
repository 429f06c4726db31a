"""What torchrun says in a log that `peft-dist` keeps: the ranks' own words, and little besides.

Its banner and traceback would stand after the cause and hide it, for every mistake of a user and
every Ctrl-C. A launcher that somebody started by hand says what it always says.
"""

import logging
import os
import signal
import sys
import traceback
from types import TracebackType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from peft_dist.common.console import say
from peft_dist.common.env import LAUNCH_MARK
from peft_dist.common.errors import (
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
)

EXPLAINED = (EXIT_DONE, EXIT_USER_ERROR, EXIT_DO_NOT_RETRY, EXIT_INTERRUPTED, -signal.SIGTERM)
"""Exit codes of ranks that have said themselves why they end, or were told to."""
LOGGERS = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
)


def shorten() -> None:
    """Let the launcher in this process say in a line how it ends, where `peft-dist` started it."""
    if LAUNCH_MARK not in os.environ or sys.excepthook is _explain:
        return
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
    sys.excepthook = _explain


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record of torchrun's says more than the ranks have said."""
    text = str(record.msg)
    if text.startswith("failed (exitcode:") and isinstance(record.args, tuple):
        return record.args[0] not in EXPLAINED
    return not ("death signal" in text or text.startswith("Sending process"))


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, SignalException):
        text = f"was ended by {signal.Signals(error.sigval).name}"
    elif isinstance(error, ChildFailedError):
        ranks = [
            f"rank {rank} with exit code {failure.exitcode}"
            for rank, failure in sorted(error.failures.items())
        ]
        text = f"ends, as its processes have: {', '.join(ranks)}"
    else:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip(), sys.stderr)
        return
    say(f"peft-dist: the launcher {text}", sys.stderr)
