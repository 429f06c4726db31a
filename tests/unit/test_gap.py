"""Steps whose lines a ledger has lost: found once, and told wherever the run is looked at."""

import json
from pathlib import Path
from typing import Any

import pytest

from peft_dist.ledger.events import GapEvent, LedgerEvent
from peft_dist.ledger.gap import TAIL_STEPS, find_gap, read_gap
from peft_dist.ledger.goodput import LedgerGap, goodput
from peft_dist.ledger.goodput_table import render
from peft_dist.ledger.read_event import from_fields
from peft_dist.report.page import context
from peft_dist.report.run_data import read_runs
from peft_dist.report.timeline import timeline_of
from peft_dist.status.run_state import RunView, read_run, view
from peft_dist.status.table import render as table
from peft_dist.tracking.wandb.rows import STEP, LedgerRows
from tests.unit.run_folders import lease, ledger, make_run
from tests.unit.whole_runs import Story, write_run

TOLD = "steps 4 to 6 are not in the ledger: lost lines"


def event(name: str, step: int, attempt: int = 1, **figures: Any) -> LedgerEvent:
    needed = {"loss": 1.0, "tokens_per_s": 1.0} if name == "step" else {}
    stamp = {"attempt": attempt, "time": 0.0, "at_s": 0.0}
    return from_fields({"event": name, "step": step, **stamp, **needed, **figures})


def steps(first: int, last: int, attempt: int = 1) -> list[LedgerEvent]:
    return [event("step", step, attempt) for step in range(first, last + 1)]


def gap(first: int, last: int, attempt: int = 2) -> LedgerEvent:
    return event("gap", last, attempt, from_step=first, to_step=last)


@pytest.mark.parametrize(
    ("events", "checkpoint_step", "missing"),
    [
        ([], 0, None),
        ([], 6, (1, 6)),
        ([event("start", 0), *steps(1, 3)], 6, (4, 6)),
        ([event("start", 0), *steps(1, 5)], 6, (6, 6)),
        ([event("start", 0), *steps(1, 6)], 6, None),
        ([event("start", 0), *steps(1, 9)], 6, None),
        ([*steps(1, 5), event("skipped", 6)], 6, None),
        ([*steps(1, 5), event("rollback", 6, back_to=4)], 6, None),
        ([*steps(1, 3), event("evaluation", 3, eval_loss=1.0), event("system", 3)], 6, (4, 6)),
        # An attempt that was killed before it could write what it had found, and one that was not.
        ([*steps(1, 3), event("start", 6, 2)], 6, (4, 6)),
        ([*steps(1, 3), event("start", 6, 2), gap(4, 6)], 6, None),
        ([*steps(1, 3), event("start", 6, 2), gap(4, 6), *steps(7, 7, 2)], 9, (8, 9)),
        # What was done again from an earlier checkpoint, and lost then.
        ([*steps(1, 9), event("start", 4, 2), *steps(5, 5, 2)], 8, (6, 8)),
        # A later line of an attempt that had lost the run.
        ([*steps(1, 3), event("start", 3, 2), *steps(4, 4)], 6, (4, 6)),
    ],
)
def test_what_is_missing_is_what_no_line_tells_of(
    events: list[LedgerEvent], checkpoint_step: int, missing: tuple[int, int] | None
) -> None:
    found = find_gap(events, checkpoint_step)
    assert (None if found is None else (found.from_step, found.to_step)) == missing
    assert found is None or found.step == checkpoint_step


def test_a_long_ledger_is_read_from_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    ledger(run, 3 * TAIL_STEPS)
    path = run / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("no event\n" + "".join(lines[1:]), encoding="utf-8")
    assert read_gap(path, 3 * TAIL_STEPS) is None
    found = read_gap(path, 3 * TAIL_STEPS + 2)
    assert found is not None and found.missing_steps == 2
    path.unlink()
    found = read_gap(path, 7)
    assert found is not None and (found.from_step, found.to_step) == (1, 7)


def run_with_a_gap(folder: Path) -> Path:
    """Return a run of 400 steps whose ledger lacks 103 to 120."""
    run = write_run(folder, Story(interrupted_at=(120,), evaluate_every=1000))
    path = run / "ledger.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["attempt"] == 2 or line["step"] < 103]
    second = next(index for index, line in enumerate(kept) if line["attempt"] == 2)
    lost = {**kept[second], "event": "gap", "step": 120, "from_step": 103, "to_step": 120}
    stamp = ("attempt", "time", "at_s", "event", "step", "from_step", "to_step")
    kept.insert(second + 1, {name: lost[name] for name in stamp})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")
    return run


def test_the_report_tells_of_a_gap_in_its_timeline_and_its_notes(tmp_path: Path) -> None:
    (run,) = read_runs([run_with_a_gap(tmp_path / "run")])
    told = "steps 103 to 120 are not in the ledger: lost lines"
    assert [(entry.what, entry.detail) for entry in timeline_of(run) if entry.what == "gap"] == [
        ("gap", told)
    ]
    assert f"Of run, {told}, which no figure has." in context([run], [])["reading"]
    (whole,) = read_runs([write_run(tmp_path / "whole", Story(interrupted_at=(120,)))])
    assert "not in the ledger" not in context([whole], [])["reading"]


def test_goodput_tells_of_a_gap_and_counts_its_time_as_down() -> None:
    events = [event("start", 0), *steps(1, 3), event("start", 6, 2), gap(4, 6), *steps(7, 8, 2)]
    found = goodput(events)
    assert found.gaps == [LedgerGap(4, 6)]
    assert json.loads(found.to_json())["gaps"] == [{"from_step": 4, "to_step": 6}]
    assert render(found)[-1] == f"{TOLD}; their time counts as down"
    assert "not in the ledger" not in "".join(render(goodput([event("start", 0), *steps(1, 3)])))


@pytest.mark.parametrize(("from_checkpoint", "left"), [(5, [LedgerGap(4, 5)]), (2, [])])
def test_steps_that_are_done_again_are_no_gap(from_checkpoint: int, left: list[LedgerGap]) -> None:
    events = [*steps(1, 3), event("start", 6, 2), gap(4, 6), event("start", from_checkpoint, 3)]
    assert goodput(events).gaps == left


def test_status_tells_of_a_gap_however_long_ago_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    lease(run, 1, from_step=0, steps=900, outcome="interrupted")
    lease(run, 2, from_step=6, steps=900, ledger_gap=[4, 6], outcome="interrupted")
    lease(run, 3, from_step=500, steps=900, outcome="interrupted")
    found = seen(run)
    assert found.gap == TOLD
    assert table([found], None)[-1].strip() == f"^ {TOLD}"
    lease(run, 4, from_step=4, steps=900)
    assert seen(run).gap == "step 4 is not in the ledger: lost lines"
    lease(run, 5, from_step=2, steps=900)
    assert seen(run).gap == ""


def seen(run: Path) -> RunView:
    return view(read_run(run), {}, name="run", now=0.0)


def test_rows_after_a_gap_have_the_numbers_that_they_would_have_had(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lost = [event("start", 6, 2), gap(4, 6), *steps(7, 8, 2)]
    written = [event("start", 0), *steps(1, 3), *lost]
    path.write_text("".join(f"{json.dumps(one.fields())}\n" for one in written), encoding="utf-8")
    rows = LedgerRows(path)
    found = list(rows.new())
    assert [one.number for one in found] == list(range(rows.count))
    gaps = [one for one in found if isinstance(one.event, GapEvent)]
    assert [one.number for one in gaps] == [5, 6, 7]
    assert all(one.row["gap/from_step"] == 4 and one.row["gap/to_step"] == 6 for one in gaps)
    # The server may have the rows of steps 4 to 6, numbers 4 to 6: it lacks all from 7 on.
    assert [one.row[STEP] for one in found if one.number >= 7] == [6, 7, 8]
