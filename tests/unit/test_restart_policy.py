"""Every ending that a run's start can have, and what comes of it: again, without nodes, or not."""

from dataclasses import replace

import pytest

from peft_dist.run.restart_policy import (
    Decision,
    Ending,
    History,
    Kind,
    RestartLimits,
    decide,
    decide_by_attempts,
)

OF_JOB = RestartLimits.of_job(starts=100, without_progress=5)
IN_PLACE = RestartLimits(after_signal=False)
STEP = 40
"""Where the newest checkpoint is."""


def job(kind: Kind, error: str = "", **known: object) -> Ending:
    """Return how a start of a job ended, as its supervisor knows it."""
    return replace(Ending(kind, error, checkpoint=STEP), **known)  # type: ignore[arg-type]


def attempt(kind: Kind, error: str = "", **known: object) -> Ending:
    """Return how an attempt ended that went on from the newest checkpoint."""
    return replace(Ending(kind, error, began_at=STEP), **known)  # type: ignore[arg-type]


GOES_ON = f"; goes on after step {STEP}"
NO_MORE = f"none saved a checkpoint after step {STEP}"

FAULT = {"place": "template.py:7", "step": 0}

ENDINGS: dict[str, tuple[RestartLimits, Ending, str, int | None, str]] = {
    # name: limits; ending; what follows the first; how many in a row are the last; and then why
    "done": (OF_JOB, job(Kind.DONE), "done", None, ""),
    "interrupted, in a job": (
        OF_JOB, job(Kind.INTERRUPTED, "stopped by SIGTERM", signal="SIGTERM"),
        f"again stopped by SIGTERM{GOES_ON}", 5,
        f"no progress in 5 starts: {NO_MORE} (is the time limit too short?)",
    ),
    "interrupted, under torchrun": (
        IN_PLACE, attempt(Kind.INTERRUPTED, "stopped by SIGINT"), "stop stopped by SIGINT", 1,
        "stopped by SIGINT",
    ),
    "interrupted, started by a person": (
        RestartLimits(), attempt(Kind.INTERRUPTED, "stopped by SIGINT"),
        f"again stopped by SIGINT{GOES_ON}", None, "",
    ),
    "time limit": (
        OF_JOB, job(Kind.INTERRUPTED, "stopped by SIGUSR1", signal="SIGUSR1"),
        f"again stopped by SIGUSR1{GOES_ON}", 5, "(is the time limit too short?)",
    ),
    "preempted": (
        OF_JOB, job(Kind.INTERRUPTED, "stopped by SIGTERM", signal="SIGTERM"),
        f"again stopped by SIGTERM{GOES_ON}", 5, "no progress in 5 starts",
    ),
    "preempted during its set-up": (
        OF_JOB, job(Kind.NOT_BEGUN, "stopped by SIGTERM before it trained"),
        f"again stopped by SIGTERM before it trained{GOES_ON}", None, "",
    ),
    "nodes that are late": (
        OF_JOB, job(Kind.NODES_LATE, "node2 was not ready"),
        f"again node2 was not ready{GOES_ON}", 5, "no progress in 5 starts",
    ),
    "crash of a rank": (
        RestartLimits(), attempt(Kind.CRASHED, "ValueError: bug", rank=1),
        f"again ValueError: bug (rank 1){GOES_ON}", 3,
        f"no progress in 3 attempts: {NO_MORE}; last: ValueError: bug (rank 1)",
    ),
    "the same bug before any step": (
        RestartLimits(), attempt(Kind.CRASHED, "TypeError: bug", rank=1, **FAULT),
        f"again TypeError: bug (rank 1){GOES_ON}", 2,
        "the same fault ended 2 attempts in a row before any step: TypeError: bug (rank 1), "
        "at template.py:7",
    ),
    "the same bug in a step": (
        RestartLimits(), attempt(Kind.CRASHED, "TypeError: bug", place="loss.py:7", step=41),
        f"again TypeError: bug{GOES_ON}", 3, "no progress in 3 attempts",
    ),
    "crash of a node's launcher": (
        OF_JOB, job(Kind.CRASHED, "node1 crashed"), f"again node1 crashed{GOES_ON}", 5,
        f"no progress in 5 starts: {NO_MORE}; last: node1 crashed",
    ),
    "launcher killed": (
        OF_JOB, job(Kind.CRASHED, "node1 crashed"), f"again node1 crashed{GOES_ON}", 5,
        "no progress in 5 starts",
    ),
    "hang": (
        RestartLimits(), attempt(Kind.HUNG, "rank 0 has been in step 41", rank=0),
        f"again rank 0 has been in step 41 (rank 0){GOES_ON}", 3, "no progress in 3 attempts",
    ),
    "lost peer": (
        RestartLimits(), attempt(Kind.LOST_PEER, "Connection reset", rank=1),
        f"again Connection reset (rank 1){GOES_ON}", 3, "no progress in 3 attempts",
    ),
    "out of memory, a rank": (
        RestartLimits(), attempt(Kind.OUT_OF_MEMORY, "2 GiB", rank=1, step=43),
        f"again 2 GiB (rank 1){GOES_ON}", 2,
        "out of memory at step 43 in 2 attempts (rank 1: 2 GiB)",
    ),
    "out of memory, killed by the kernel": (
        OF_JOB, job(Kind.OUT_OF_MEMORY, "node1 ran out"), f"again node1 ran out{GOES_ON}", 2,
        f"out of memory after step {STEP} in 2 starts (node1 ran out)",
    ),
    "ended before it knew where to go on": (
        RestartLimits(), Ending(Kind.CRASHED), f"again error{GOES_ON}", 3,
        f"no progress in 3 attempts: {NO_MORE}",
    ),
    "node lost": (
        OF_JOB, job(Kind.NODE_FAILED, "node2 crashed"), f"again node2 crashed{GOES_ON}", 5,
        "no progress in 5 starts",
    ),
    "set-up failed, or no decision left": (
        OF_JOB, job(Kind.NO_DECISION, "srun ended with code 1"),
        f"again srun ended with code 1{GOES_ON}", 3,
        "3 starts in a row ended without a decision; last: srun ended with code 1",
    ),
    "pre-flight without a report": (
        OF_JOB, job(Kind.PREFLIGHT_INCOMPLETE, "no report"), f"again no report{GOES_ON}", 5,
        "no progress in 5 starts",
    ),
    "pre-flight: some nodes": (
        OF_JOB, job(Kind.NODES_UNFIT, "pre-flight: node2: no GPU", nodes=("node2", "node3")),
        f"again-without node2,node3 pre-flight: node2: no GPU{GOES_ON}", 5,
        "no progress in 5 starts",
    ),
    "pre-flight: all nodes": (
        OF_JOB, job(Kind.ALL_NODES_UNFIT, "pre-flight: no space"), "stop pre-flight: no space", 1,
        "pre-flight: no space",
    ),
    "port taken": (
        OF_JOB, job(Kind.PORT_TAKEN, "20120 on node1"), "port-taken 20120 on node1", None, "",
    ),
    "no port": (
        OF_JOB, job(Kind.PORT_TAKEN, "20128 on node1", tries=5),
        "stop no free port in 5 tries; last: 20128 on node1", 1, "no free port in 5 tries",
    ),
    "user error": (
        OF_JOB, job(Kind.USER_ERROR, "data.train: no rows"), "stop data.train: no rows", 1,
        "data.train: no rows",
    ),
    "training cannot go on": (
        OF_JOB, job(Kind.TRAINING_FAILED, "loss nan"), "stop loss nan", 1, "loss nan",
    ),
    "cancelled": (
        OF_JOB, job(Kind.CANCELLED), "cancelled cancelled by its user", None, "",
    ),
    "superseded": (
        OF_JOB, job(Kind.SUPERSEDED), "superseded the run is another start's", None, "",
    ),
}  # fmt: skip
each_ending = pytest.mark.parametrize("name", ENDINGS)


def after(limits: RestartLimits, *earlier: Ending) -> History:
    """Return a history of such endings, of the kind that the limits count."""
    of_job = limits.unit == "starts"
    return History(
        STEP,
        attempts=() if of_job else earlier,
        starts=earlier if of_job else (),
        job_starts=len(earlier) + 1 if of_job else 0,
    )


def test_the_table_has_every_ending_there_is() -> None:
    assert {ending.kind for _, ending, *_ in ENDINGS.values()} == set(Kind)


@each_ending
def test_what_comes_of_an_ending_the_first_time(name: str) -> None:
    limits, ending, first, *_ = ENDINGS[name]
    assert str(decide(after(limits), ending, limits)) == first


@each_ending
def test_what_comes_of_an_ending_again_and_again(name: str) -> None:
    limits, ending, first, last, why = ENDINGS[name]
    for earlier in range(8):
        decision = decide(after(limits, *[ending] * earlier), ending, limits)
        if last is None or earlier + 1 < last:
            assert str(decision) == first
        else:
            assert decision.word == "stop"
            assert why in decision.reason


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (_, ending, *_) in ENDINGS.items()
        # These two make no progress.
        if ending.kind is not Kind.NO_DECISION and ending != Ending(Kind.CRASHED)
    ],
)
def test_progress_in_between_begins_the_count_anew(name: str) -> None:
    """Before it the same ending came at an earlier checkpoint, as often as one likes."""
    limits, ending, first, last, _ = ENDINGS[name]
    old = replace(
        ending,
        began_at=None if ending.began_at is None and ending.checkpoint is not None else 20,
        checkpoint=None if ending.checkpoint is None else 20,
        step=None if ending.step is None else 23,
    )
    decision = decide(after(limits, *[old] * 8), ending, limits)
    assert str(decision) == first
    if last is not None and last > 2:
        row = [ending] * (last - 2)
        assert decide(after(limits, *[old] * 8, *row), ending, limits).again
        assert decide(after(limits, *[old] * 8, ending, *row), ending, limits).word == "stop"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Kind.DONE, 0), (Kind.CRASHED, 1), (Kind.OUT_OF_MEMORY, 1), (Kind.USER_ERROR, 2),
        (Kind.ALL_NODES_UNFIT, 2), (Kind.TRAINING_FAILED, 3), (Kind.SUPERSEDED, 3),
        (Kind.INTERRUPTED, 75), (Kind.CANCELLED, 75),
    ],
)  # fmt: skip
def test_exit_codes_are_those_that_the_readme_promises(kind: Kind, code: int) -> None:
    assert decide(after(OF_JOB), job(kind), OF_JOB).exit_code == code


def test_a_limit_ends_with_the_code_that_asks_for_a_person() -> None:
    crash = attempt(Kind.CRASHED)
    assert decide(after(RestartLimits(), crash, crash), crash, RestartLimits()).exit_code == 3


def test_starts_that_get_on_are_only_counted() -> None:
    few = RestartLimits.of_job(starts=6, without_progress=3)
    starts = tuple(Ending(Kind.CRASHED, checkpoint=step) for step in (0, 10, 20, 30, 35))
    history = History(STEP, starts=starts, job_starts=5)
    assert decide(history, job(Kind.CRASHED, "node1 crashed"), few).again
    decision = decide(replace(history, job_starts=6), job(Kind.CRASHED, "node1 crashed"), few)
    assert decision.reason == (
        "6 starts are all that the cluster file's requeue.max_starts allows; last: node1 crashed"
    )


@pytest.mark.parametrize("kind", [Kind.INTERRUPTED, Kind.DONE])
def test_an_attempt_that_was_no_failure_breaks_the_row_of_those_that_were(kind: Kind) -> None:
    crash = attempt(Kind.CRASHED)
    assert decide(after(RestartLimits(), crash, crash, attempt(kind)), crash, RestartLimits()).again
    assert (
        decide(after(RestartLimits(), attempt(kind), crash, crash), crash, RestartLimits()).word
        == "stop"
    )


def test_memory_that_runs_out_elsewhere_is_no_loop() -> None:
    out = attempt(Kind.OUT_OF_MEMORY, "2 GiB", rank=1, step=43)
    assert decide(after(RestartLimits(), replace(out, step=42)), out, RestartLimits()).again
    assert decide(after(RestartLimits(), attempt(Kind.CRASHED)), out, RestartLimits()).again


def test_the_cause_that_is_told_is_not_a_lost_peer_where_there_is_another() -> None:
    history = after(
        RestartLimits(),
        attempt(Kind.CRASHED, "disk on fire", rank=1),
        attempt(Kind.LOST_PEER, "reset"),
    )
    decision = decide(history, attempt(Kind.LOST_PEER, "reset"), RestartLimits())
    assert decision.reason.endswith("; last: disk on fire (rank 1)")


def test_attempts_alone_decide_by_the_newest_of_them() -> None:
    assert decide_by_attempts(History(STEP)) is None
    crash = attempt(Kind.CRASHED)
    assert (decide_by_attempts(after(RestartLimits(), crash, crash)) or Decision("none")).again
    last = decide_by_attempts(after(RestartLimits(), crash, crash, crash))
    assert last is not None and last.word == "stop"


def test_a_decision_is_one_line_whatever_the_error_was() -> None:
    told = str(decide(after(OF_JOB), job(Kind.USER_ERROR, "a\n  b\tc"), OF_JOB))
    assert told == "stop a b c"


def test_faults_that_differ_or_may_pass_are_tried_again() -> None:
    limits, one = RestartLimits(), Ending(Kind.CRASHED, "TypeError: a", place="x.py:1")
    for other in (
        replace(one, place="x.py:2"),
        replace(one, error="TypeError: b"),
        replace(one, place=""),
        replace(one, step=1),
    ):
        assert decide(History(attempts=(other,)), one, limits).word == "again"
    for kind in (Kind.CRASHED, Kind.LOST_PEER):  # without a place nothing is certain
        unknown = Ending(kind, "RuntimeError: network")
        assert decide(History(attempts=(unknown,)), unknown, limits).word == "again"
    assert decide(History(attempts=(one,)), one, limits).word == "stop"
