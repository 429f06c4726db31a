"""Decide whether a run starts again: a pure function of how its starts have ended.

Ranks, the local launcher, the supervisor of a node and the batch script ask `decide` and obey.
`history` reads what it needs to know from the run directory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from peft_dist.common.errors import (
    EXIT_CRASHED,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
)


class Kind(StrEnum):
    """How a start ended; the values of the first are the kinds of crash notes."""

    DONE = "done"
    INTERRUPTED = "stopped"
    """A signal ended it: of a person, a time limit or a preemption."""
    NOT_BEGUN = "stopped before it began"
    """A signal ended a job's set-up or staging, which says nothing of the run."""
    CRASHED = "error"
    HUNG = "hang"
    OUT_OF_MEMORY = "oom"
    LOST_PEER = "lost peer"
    """A process that it worked with was lost, which only follows from another crash."""
    NODE_FAILED = "node failed"
    """The launcher of another node failed, or was lost."""
    NO_DECISION = "no decision"
    """The supervisors ended, or never began, and left no decision: the set-up failed, say."""
    PREFLIGHT_INCOMPLETE = "pre-flight incomplete"
    NODES_LATE = "nodes late"
    """Some nodes took too long for their set-up, or for copying the model."""
    NODES_UNFIT = "nodes unfit"
    """Some nodes failed the pre-flight."""
    ALL_NODES_UNFIT = "all nodes unfit"
    """All nodes have one fault, which a person must fix."""
    PORT_TAKEN = "port taken"
    USER_ERROR = "user error"
    TRAINING_FAILED = "training failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"
    """Another start has taken the run over."""


STOPS = {
    Kind.USER_ERROR: EXIT_USER_ERROR,
    Kind.ALL_NODES_UNFIT: EXIT_USER_ERROR,
    Kind.TRAINING_FAILED: EXIT_DO_NOT_RETRY,
}
"""Exit code of what no further start can change."""


@dataclass(frozen=True)
class Ending:
    """What is known of how a start ended."""

    kind: Kind
    error: str = ""
    """The cause, in one line."""
    signal: str | None = None
    """Name of the signal that ended it, where that is known."""
    rank: int | None = None
    """Which rank noted the error."""
    step: int | None = None
    """The step that a rank was at, where one noted it."""
    place: str = ""
    """Line of code that raised what will be raised again; empty where that is not certain."""
    began_at: int | None = None
    """The step that it went on from; None where it is not known, or it did not come so far."""
    checkpoint: int | None = None
    """The step of the newest checkpoint when it ended; None where that was not noted."""
    nodes: tuple[str, ...] = ()
    """The nodes that failed the pre-flight."""
    tries: int = 1
    """Of a port that is taken: how many ports have been tried."""

    @property
    def described_error(self) -> str:
        """The error with the rank that noted it."""
        return self.error if self.rank is None else f"{self.error} (rank {self.rank})"


@dataclass(frozen=True)
class History:
    """How earlier starts of a run ended, the oldest first, since a person last started it."""

    checkpoint: int = 0
    """The step of the newest checkpoint."""
    attempts: tuple[Ending, ...] = ()
    """Of the processes that train, which a launcher can start again in place."""
    starts: tuple[Ending, ...] = ()
    """Of the Slurm jobs, each of which can hold several attempts."""
    job_starts: int = 0
    """How often a job has started, the present start included."""


@dataclass(frozen=True)
class RestartLimits:
    """How often a run may start again."""

    unit: str = "attempts"
    """What is counted: `attempts` of processes, or `starts` of a job."""
    without_progress: int = 3
    """So many in a row that reach no new checkpoint are the last."""
    same_fault: int = 2
    """So many in a row that a bug or a wrong input ends at one line, before any step, are the
    last."""
    out_of_memory: int = 2
    """So many in a row that run out of memory at one step are the last."""
    job_starts: int | None = None
    """Starts of a job in all; None for no limit."""
    without_decision: int = 3
    """So many in a row that left no decision are the last."""
    ports: int = 5
    """So many ports are tried."""
    after_signal: bool = True
    """Whether a start that a signal ended is followed by another one: by torchrun it is not."""

    @classmethod
    def of_job(cls, *, starts: int, without_progress: int) -> "RestartLimits":
        """Return the limits of a Slurm job, as its cluster file has them."""
        return cls("starts", without_progress=without_progress, job_starts=starts)


@dataclass(frozen=True)
class Decision:
    """What comes of the run."""

    word: str
    """`done`, `stop`, `again`, `again-without`, `port-taken`, `cancelled` or `superseded`."""
    reason: str = ""
    exit_code: int = EXIT_CRASHED
    nodes: tuple[str, ...] = ()
    """With `again-without`: the nodes to do without."""

    def __str__(self) -> str:
        """Return it as one line, which the batch script reads."""
        return " ".join([self.word, *filter(None, [",".join(self.nodes)]), *self.reason.split()])

    @property
    def again(self) -> bool:
        """Whether the run is to start again."""
        return self.word in ("again", "again-without")


def decide(history: History, ending: Ending, limits: RestartLimits) -> Decision:
    """Decide whether a run starts again.

    Args:
        history: How its earlier starts ended; the present one is not among them.
        ending: How the present start ended.
        limits: How often it may start again.
    """
    kind = ending.kind
    if kind in STOPS:
        return Decision("stop", ending.error, STOPS[kind])
    if kind is Kind.DONE:
        return Decision("done", exit_code=EXIT_DONE)
    if kind is Kind.SUPERSEDED:
        return Decision("superseded", "the run is another start's", EXIT_DO_NOT_RETRY)
    if kind is Kind.CANCELLED:
        return Decision("cancelled", "cancelled by its user", EXIT_INTERRUPTED)
    if kind is Kind.PORT_TAKEN:
        if ending.tries < limits.ports:
            return Decision("port-taken", ending.error)
        why = f"no free port in {limits.ports} tries; last: {ending.error}"
        return Decision("stop", why, EXIT_DO_NOT_RETRY)
    if kind is Kind.INTERRUPTED and not limits.after_signal:
        return Decision("stop", ending.error, EXIT_INTERRUPTED)
    problem = _limit_reached(history, ending, limits)
    if problem is not None:
        return Decision("stop", problem, EXIT_DO_NOT_RETRY)
    reason = f"{ending.described_error or ending.kind}; goes on after step {history.checkpoint}"
    if kind is Kind.NODES_UNFIT:
        return Decision("again-without", reason, nodes=ending.nodes)
    signalled = kind in (Kind.INTERRUPTED, Kind.NOT_BEGUN)
    return Decision("again", reason, EXIT_INTERRUPTED if signalled else EXIT_CRASHED)


def decide_by_attempts(history: History) -> Decision | None:
    """Decide by how the newest attempt ended; None where there was none that counts."""
    if not history.attempts:
        return None
    *earlier, newest = history.attempts
    return decide(replace(history, attempts=tuple(earlier)), newest, RestartLimits())


def _limit_reached(history: History, ending: Ending, limits: RestartLimits) -> str | None:
    """Return in one line which limit forbids another start, or None where none does."""
    of_job = limits.unit == "starts"
    row = [*(history.starts if of_job else history.attempts), ending]
    row = [one for one in row if one.kind is not Kind.NOT_BEGUN]
    if not of_job:  # those that a signal ended, or that a person has ended, were no failures
        harmless = [n for n, one in enumerate(row) if one.kind in (Kind.DONE, Kind.INTERRUPTED)]
        row = row[harmless[-1] + 1 :] if harmless else row
    last = f"; last: {ending.described_error}" if of_job and ending.error else ""
    if limits.job_starts is not None and history.job_starts >= limits.job_starts:
        allowed = f"{limits.job_starts} starts are all that the cluster file's"
        return f"{allowed} requeue.max_starts allows{last}"
    undecided = [one.kind is Kind.NO_DECISION for one in row[-limits.without_decision :]]
    if len(undecided) == limits.without_decision and all(undecided):
        return f"{len(undecided)} {limits.unit} in a row ended without a decision{last}"
    return (
        _same_fault(row, limits)
        or _out_of_memory(row, history.checkpoint, limits)
        or _no_progress(row, history.checkpoint, limits)
    )


def _same_fault(row: Sequence[Ending], limits: RestartLimits) -> str | None:
    """Return why the last starts of a row were the last, where each met one fault at one line."""
    last = row[-limits.same_fault :]
    faults = {(one.kind, one.place, one.error) for one in last}
    trained = any(one.step not in (None, 0) for one in last)
    if len(last) < limits.same_fault or len(faults) > 1 or not last[-1].place or trained:
        return None
    return (
        f"the same fault ended {len(last)} {limits.unit} in a row before any step: "
        f"{last[-1].described_error}, at {last[-1].place}"
    )


def _out_of_memory(row: Sequence[Ending], checkpoint: int, limits: RestartLimits) -> str | None:
    """Return why the last starts of a row were the last, where each ran out of memory."""
    last = row[-limits.out_of_memory :]
    # Where the kernel ended a rank nobody knows its step, but that of the checkpoint before it.
    places = {(one.step, one.checkpoint if one.step is None else None) for one in last}
    out = all(one.kind is Kind.OUT_OF_MEMORY for one in last)
    if len(last) < limits.out_of_memory or not out or len(places) > 1:
        return None
    ending = last[-1]
    where = f"after step {checkpoint}" if ending.step is None else f"at step {ending.step}"
    by = "" if ending.rank is None else f"rank {ending.rank}: "
    return f"out of memory {where} in {len(last)} {limits.unit} ({by}{ending.error})"


def _no_progress(row: Sequence[Ending], checkpoint: int, limits: RestartLimits) -> str | None:
    """Return why the last starts of a row were the last, where none reached a new checkpoint."""
    last = row[-limits.without_progress :]
    # One that ended before it knew where to go on from has got no further either.
    if len(last) < limits.without_progress or any(
        one.began_at not in (None, checkpoint) or one.checkpoint not in (None, checkpoint)
        for one in last
    ):
        return None
    line = f"no progress in {len(last)} {limits.unit}: none saved a checkpoint after step"
    hint = " (is the time limit too short?)" if last[-1].kind is Kind.INTERRUPTED else ""
    # Who lost a peer says nothing of why that one ended.
    known = [one for one in reversed(last) if one.error]
    known.sort(key=lambda one: one.kind is Kind.LOST_PEER)
    cause = f"; last: {known[0].described_error}" if known else ""
    return f"{line} {checkpoint}{hint}{cause}"
