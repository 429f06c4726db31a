"""Crash loops: what attempts left behind says whether starting again can help."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.run.lease import Attempt, record_path, records, write_json
from peft_dist.run.restart_policy import (
    LOST_PEER,
    STOPPED,
    crash_notes,
    note_crash,
    verdict,
    was_stopped,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "attempts"


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., Attempt]]:
    """Begin attempts in this process; end them all."""
    begun: list[Attempt] = []

    def start(**options: bool) -> Attempt:
        begun.append(Attempt.begin(folder, **options))
        return begun[-1]

    yield start
    for attempt in begun:
        attempt.end("done")


def crash(folder: Path, number: int, **facts: Any) -> None:
    """Leave what an attempt leaves that crashed: its record, without an outcome."""
    folder.mkdir(exist_ok=True)
    write_json(record_path(folder, number), {"attempt": number, "pid": -1, "host": "h", **facts})


def test_three_attempts_without_progress_are_a_crash_loop(folder: Path) -> None:
    assert verdict(folder, 40) is None
    crash(folder, 1, from_step=40)
    crash(folder, 2)  # crashed before it knew where to go on
    assert verdict(folder, 40) is None
    crash(folder, 3, from_step=40, outcome="failed")
    assert verdict(folder, 40) == (
        "no progress in 3 attempts: each began at step 40 and ended before another checkpoint"
    )
    note_crash(folder, 2, rank=1, kind="error", step=41, error="older")
    note_crash(folder, 3, rank=0, kind="lost peer", step=41, error="connection closed")
    note_crash(folder, 3, rank=1, kind="error", step=41, error="disk\non fire")
    told = verdict(folder, 40)
    assert told is not None
    assert told.endswith("; last: disk on fire (rank 1)")
    assert verdict(folder, 60) is None, "the third attempt has got on"


@pytest.mark.parametrize(
    "facts", [{"outcome": "interrupted"}, {"outcome": "done"}, {"from_step": 20}]
)
def test_an_attempt_that_was_no_fruitless_crash_breaks_the_row(
    folder: Path, facts: dict[str, Any]
) -> None:
    crash(folder, 1, from_step=40)
    crash(folder, 2, from_step=40)
    crash(folder, 3, **{"from_step": 40, **facts})
    assert verdict(folder, 40) is None
    crash(folder, 4, from_step=40)
    crash(folder, 5, from_step=40)
    assert verdict(folder, 40) is None
    crash(folder, 6, from_step=40)
    assert verdict(folder, 40) is not None


def test_a_start_by_hand_after_a_verdict_counts_anew(
    begin: Callable[..., Attempt], folder: Path
) -> None:
    for number in (1, 2, 3):
        crash(folder, number, from_step=40, outcome="failed")
        note_crash(folder, number, rank=0, kind="oom", step=41, error="CUDA out of memory")
    assert verdict(folder, 40) is not None
    by_hand = begin(after_verdict=True)
    assert verdict(folder, 40) is None
    by_hand.note(from_step=40)
    by_hand.end("failed")
    for _ in range(2):
        again = begin()
        assert verdict(folder, 40) is None
        again.note(from_step=40)
        again.end("failed")
    begin()
    assert verdict(folder, 40) is not None


def test_the_attempt_that_asks_does_not_count(begin: Callable[..., Attempt], folder: Path) -> None:
    crash(folder, 1, from_step=40, outcome="failed")
    crash(folder, 2, from_step=40, outcome="failed")
    attempt = begin()
    attempt.note(from_step=40)
    assert verdict(folder, 40) is None
    attempt.end("failed")
    assert verdict(folder, 40) is not None


def test_memory_that_runs_out_twice_at_one_step_is_a_crash_loop(folder: Path) -> None:
    crash(folder, 1, from_step=0)
    note_crash(folder, 1, rank=1, kind="oom", step=43, error="out of memory")
    crash(folder, 2, from_step=40)
    note_crash(folder, 2, rank=0, kind="error", step=43, error="connection reset by peer")
    assert verdict(folder, 40) is None
    note_crash(folder, 2, rank=1, kind="oom", step=42, error="out of memory")
    assert verdict(folder, 40) is None, "at another step"
    note_crash(folder, 2, rank=1, kind="oom", step=43, error="tried to allocate\n2 GiB")
    assert verdict(folder, 40) == (
        "out of memory at step 43 in 2 attempts (rank 1: tried to allocate 2 GiB)"
    )
    crash(folder, 3, from_step=40)
    assert verdict(folder, 40) is None, "the last attempt did not run out"


def test_crash_notes_that_are_half_written_are_passed_over(folder: Path) -> None:
    crash(folder, 3)
    for rank in (10, 2):
        assert note_crash(folder, 3, rank=rank, kind="hang", step=None, error="stuck")
    (folder / "00000003-rank-1.json").write_text('{"rank"', encoding="utf-8")
    assert [note["rank"] for note in crash_notes(folder, 3)] == [2, 10]
    assert [record["attempt"] for record in records(folder)] == [3]


@pytest.mark.parametrize(
    ("words", "stopped"),
    [
        ([(STOPPED, "SIGUSR1"), None], True),
        ([None, (STOPPED, "SIGINT")], True),
        ([(STOPPED, "SIGTERM"), (STOPPED, "SIGTERM")], True),
        ([(LOST_PEER, "reset"), (STOPPED, "SIGTERM")], True),
        ([(STOPPED, "SIGTERM"), None], False),  # the other one was killed
        ([(STOPPED, "SIGTERM"), ("error", "bug")], False),
        ([(LOST_PEER, "reset"), (LOST_PEER, "reset")], False),
        ([None, None], False),
    ],
)
def test_ranks_that_were_told_to_stop_while_they_loaded_have_not_crashed(
    folder: Path, words: list[tuple[str, str] | None], stopped: bool
) -> None:
    for number in (1, 2, 3):
        crash(folder, number, world_size=2)
        for rank, word in enumerate(words):
            if word is not None:
                note_crash(folder, number, rank=rank, kind=word[0], step=None, error=word[1])
    assert was_stopped(folder, records(folder)[-1]) == stopped
    assert (verdict(folder, 0) is None) == stopped
