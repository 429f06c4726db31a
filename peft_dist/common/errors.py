"""The faults that belong to the user, and the exit codes the program promises for a training.

What keeps no state (scoring, merging, quantizing) ends with 128 + N where signal N stopped it, so
with 130 for Ctrl-C, as a shell has it.

A `PeftDistError` is one line a person can act on. Our own broken invariants are `assert`s and
keep their traceback, because those are bugs to report.
"""

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
"""The run finished."""
EXIT_CRASHED = 1
"""A process ended in a way that nobody foresaw, or hung; the same command goes on from the last
checkpoint."""
EXIT_USER_ERROR = 2
"""The recipe, the data or the machine must change first; starting again cannot help."""
EXIT_DO_NOT_RETRY = 3
"""Training itself cannot go on, and would not after a restart: a person has to look."""
EXIT_INTERRUPTED = 75
"""A signal stopped the run; it has saved, or says what it could not save. The same command goes on.
(EX_TEMPFAIL of sysexits.h)"""

ERROR_PREFIX = "peft-dist: error: "
"""Begins the line on standard error that reports a fault."""


class PeftDistError(Exception):
    """A fault the user can fix: what is wrong, where, the value, and the remedy, in one line.

    Args:
        problem: What is wrong, with the offending value in it.
        where: Dotted field path, file, or file:line the problem belongs to.
        remedy: What to do about it.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, problem: str, *, where: str = "", remedy: str = "") -> None:
        """Join the parts into one line; embedded newlines are folded."""
        self.where = where
        parts = [f"{where}: {problem}" if where else problem]
        if remedy:
            parts.append(remedy)
        super().__init__(" ".join("; ".join(parts).split()))


class RecipeError(PeftDistError):
    """A recipe, or an override of it, that cannot be used as written."""


class DataError(PeftDistError):
    """Rows that cannot be read or used."""


class ModelError(PeftDistError):
    """A model folder that is missing, broken or of an architecture that is not supported."""


class RunDirError(PeftDistError):
    """A run directory that is taken, incomplete or cannot be written."""


class CacheError(PeftDistError):
    """A cache folder that cannot be used, or must not be trusted."""


class LaunchError(PeftDistError):
    """A launcher whose settings contradict the recipe or the machine."""


class ClusterError(PeftDistError):
    """A cluster file that cannot be used as written."""


class SlurmError(PeftDistError):
    """A command of Slurm that is missing, fails or does not answer."""


class TrainingError(PeftDistError):
    """Training that cannot go on: non-finite losses, a broken shard, crashes without progress."""

    exit_code = EXIT_DO_NOT_RETRY


class Superseded(TrainingError):
    """A later attempt has taken the run over; this process may write nothing any more."""


class RunDirGone(Superseded):
    """A run directory was moved or removed while its run trains; nothing may be written there."""

    exit_code = EXIT_USER_ERROR

    def __init__(self, run_dir: object) -> None:
        """Say where it was, and what follows."""
        super().__init__(
            "is gone",
            where=str(run_dir),
            remedy="if it was moved, go on with `peft-dist resume NEW_PLACE`",
        )


class Interrupted(PeftDistError):
    """A signal asked the run to stop, and it has."""

    exit_code = EXIT_INTERRUPTED


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the list of valid names where none is near."""
    choices = sorted(valid)
    close = difflib.get_close_matches(name, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(choices)}"


def line_of(error: Exception) -> str:
    """Return the kind of an error and the first line of what it says."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
