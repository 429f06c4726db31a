"""Where the time of a run went, for runs that were killed, resumed and rolled back."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_dist.cli.main import main
from peft_dist.config import Recipe
from peft_dist.ledger.events import LedgerEvent, StepEvent, SystemEvent
from peft_dist.ledger.goodput import PHASES, Goodput, GoodputMeter, counting_events, goodput
from peft_dist.ledger.goodput_table import render
from peft_dist.ledger.read_event import from_fields
from peft_dist.run.directory import RunDir

LAUNCH = 1_000_000.0
"""Unix time at which the process of the first attempt starts."""


class Run:
    """Writes events as a run would, on a clock of its own."""

    def __init__(self) -> None:
        self.events: list[LedgerEvent] = []
        self.attempt, self.zero, self.now = 0, LAUNCH, LAUNCH

    def start(self, step: int, *, down_s: float = 0.0, **figures: float) -> None:
        """Begin an attempt: 2 s of startup, 3 s of loading, 1 s of neither."""
        self.attempt += 1
        self.now += down_s
        self.zero = self.now
        self.tell("start", step, 6.0, startup_s=2.0, load_s=3.0, **figures)

    def tell(self, event: str, step: int, seconds: float, **figures: Any) -> None:
        """Write an event after so many seconds."""
        self.now += seconds
        stamp = {"attempt": self.attempt, "time": self.now, "at_s": self.now - self.zero}
        needed = {
            "step": {"loss": 1.0, "tokens_per_s": 1.0}, "evaluation": {"eval_loss": 1.0},
        }.get(event, {})  # fmt: skip
        self.events.append(
            from_fields({"event": event, "step": step, **stamp, **needed, **figures})
        )

    def steps(self, first: int, last: int, seconds: float = 1.0) -> None:
        """Do steps that take so many seconds each."""
        for step in range(first, last + 1):
            self.tell("step", step, seconds)


def killed_twice() -> Run:
    """Return a run of 20 steps, killed after step 8 (goes on from 5) and after step 15."""
    run = Run()
    run.start(0)
    run.tell("evaluation", 0, 4.0)
    run.steps(1, 5)
    run.tell("checkpoint", 5, 0.5)
    run.steps(6, 8)
    run.start(5, down_s=10.0)
    run.steps(6, 10)
    run.tell("checkpoint", 10, 0.5)
    run.steps(11, 12)
    run.tell("saved", 10, 0.25, write_s=2.25, bytes=1000)
    run.steps(13, 15)
    run.tell("checkpoint", 15, 0.5)
    run.start(15, down_s=20.0)
    run.steps(16, 20)
    run.tell("evaluation", 20, 4.0)
    run.tell("end", 20, 1.0, outcome="done")
    return run


def final_steps(events: list[LedgerEvent]) -> list[StepEvent]:
    """Return the steps that made the adapter."""
    return [event for event in counting_events(events) if isinstance(event, StepEvent)]


def seconds(found: Goodput) -> dict[str, float]:
    return {phase: round(value, 6) for phase, value in found.seconds.items()}


def test_every_second_of_a_run_that_was_killed_twice_has_its_phase() -> None:
    run = killed_twice()
    found = goodput(run.events)
    assert seconds(found) == {
        "startup": 6.0, "load": 9.0, "step": 20.25, "evaluation": 8.0, "checkpoint": 1.5,
        "lost_work": 3.0, "down": 30.0, "other": 4.0,
    }  # fmt: skip
    assert found.total_s == pytest.approx(run.now - LAUNCH)
    assert found.fraction == pytest.approx(20.25 / (run.now - LAUNCH))
    spans = [(s.attempt, s.from_step, s.to_step, s.outcome, s.wall_s) for s in found.attempts]
    assert spans == [
        (1, 0, 8, "cut off", 18.5), (2, 5, 15, "cut off", 17.25), (3, 15, 20, "done", 16.0),
    ]  # fmt: skip


def test_samples_of_a_node_between_two_other_events_move_no_time() -> None:
    run = killed_twice()
    expected = seconds(goodput(run.events))
    watched = []
    for event, after in zip(run.events, run.events[1:], strict=False):
        watched.append(event)
        if event.attempt == after.attempt:
            time, at_s = (event.time + after.time) / 2, (event.at_s + after.at_s) / 2
            watched.append(
                SystemEvent(step=event.step, attempt=event.attempt, time=time, at_s=at_s)
            )
    watched.append(run.events[-1])
    assert seconds(goodput(watched)) == expected
    assert final_steps(watched) == final_steps(run.events)


def test_a_jump_of_the_wall_clock_within_an_attempt_changes_nothing() -> None:
    run = killed_twice()
    expected = seconds(goodput(run.events))
    run.events[4:] = [e.model_copy(update={"time": e.time + 3600}) for e in run.events[4:]]
    assert seconds(goodput(run.events)) == expected


def test_a_clock_set_back_between_two_attempts_is_no_negative_time_down() -> None:
    run = Run()
    run.start(0)
    run.steps(1, 2)
    run.start(2, down_s=-50.0)
    found = goodput(run.events)
    assert found.seconds["down"] == 0.0
    assert found.total_s == pytest.approx(14.0)


def test_evaluations_and_checkpoints_past_the_resumed_step_are_lost_with_the_steps() -> None:
    run = Run()
    run.start(0)
    run.steps(1, 2)
    run.tell("evaluation", 2, 4.0)
    run.steps(3, 4)
    run.tell("checkpoint", 4, 0.5)
    run.tell("evaluation", 4, 4.0)
    run.start(2)
    found = seconds(goodput(run.events))
    assert (found["lost_work"], found["step"], found["evaluation"]) == (6.5, 2.0, 4.0)
    assert found["checkpoint"] == 0.0


def test_what_a_later_kill_undoes_of_an_earlier_attempt_is_lost_too() -> None:
    run = Run()
    run.start(0)
    run.steps(1, 8)
    run.start(8)
    run.steps(9, 10)
    run.start(4)
    run.steps(5, 6)
    found = goodput(run.events)
    assert (found.seconds["step"], found.seconds["lost_work"]) == (6.0, 6.0)
    assert [(step.step, step.attempt) for step in final_steps(run.events)] == [
        (1, 1), (2, 1), (3, 1), (4, 1), (5, 3), (6, 3),
    ]  # fmt: skip


def test_a_skipped_step_and_steps_rolled_back_are_lost_within_one_attempt() -> None:
    run = Run()
    run.start(0)
    run.steps(1, 3)
    run.tell("skipped", 4, 1.5, reason="loss nan")
    run.steps(5, 6)
    run.tell("rollback", 7, 2.5, reason="loss inf", back_to=3)
    assert [step.step for step in final_steps(run.events)] == [1, 2, 3]
    run.steps(4, 8)
    found = goodput(run.events)
    assert found.seconds["lost_work"] == pytest.approx(1.5 + 2.0 + 2.5)
    assert found.seconds["step"] == pytest.approx(8.0)
    assert [step.step for step in final_steps(run.events)] == list(range(1, 9))


def test_events_of_an_attempt_that_had_lost_the_run_count_nothing() -> None:
    run = killed_twice()
    expected = seconds(goodput(run.events))
    late = run.events[9].model_copy(update={"step": 19, "time": LAUNCH + 5000, "at_s": 5000.0})
    assert late.attempt == 1
    events = [*run.events[:14], late, *run.events[14:]]
    assert seconds(goodput(events)) == expected
    assert [step.step for step in final_steps(events)] == list(range(1, 21))
    assert late not in final_steps(events)


def test_startup_begins_when_the_launcher_was_started() -> None:
    run = Run()
    run.start(0, launched=LAUNCH - 7.0)
    run.steps(1, 1)
    run.start(1, down_s=30.0, launched=run.now + 20.0)
    found = goodput(run.events)
    assert found.seconds["startup"] == pytest.approx(2.0 + 7.0 + 2.0 + 10.0)
    assert found.seconds["down"] == pytest.approx(20.0)
    assert sum(span.wall_s for span in found.attempts) == pytest.approx(7.0 + 7.0 + 16.0)


def test_a_restart_in_place_does_not_count_from_the_first_launch() -> None:
    run = Run()
    run.start(0, launched=LAUNCH - 7.0)
    run.steps(1, 1)
    run.start(1, down_s=30.0, launched=LAUNCH - 7.0)
    found = goodput(run.events)
    assert found.seconds["startup"] == pytest.approx(2.0 + 7.0 + 2.0)
    assert found.seconds["down"] == pytest.approx(30.0)


def test_an_attempt_without_its_start_event_hides_its_startup_in_other() -> None:
    run = killed_twice()
    del run.events[0]
    found = seconds(goodput(run.events))
    assert found["other"] == 4.0 - 1.0 + 10.0  # start and first evaluation in one interval
    assert sum(found.values()) == pytest.approx(run.now - LAUNCH)


def test_time_up_to_now_is_down() -> None:
    run = killed_twice()
    assert goodput(run.events, now=run.now + 60.0).seconds["down"] == pytest.approx(90.0)
    assert goodput([], now=5.0).total_s == 0.0


@st.composite
def histories(draw: st.DrawFn) -> Run:
    """Return any run: attempts from any earlier step, events of any length, any event last."""
    run, done = Run(), 0
    length = st.floats(0.0, 100.0)
    for _ in range(draw(st.integers(1, 5))):
        step = draw(st.integers(0, done))
        launched = {} if draw(st.booleans()) else {"launched": run.now}
        run.start(step, down_s=draw(length), **launched)
        for event in draw(st.lists(st.sampled_from(
            ["step", "step", "evaluation", "checkpoint", "saved", "skipped", "rollback", "end",
             "system"]
        ), max_size=12)):  # fmt: skip
            if event == "rollback":
                step = draw(st.integers(0, step))
            elif event in ("step", "skipped"):
                step += 1
            run.tell(event, step, draw(length))
            done = max(done, step)
    return run


@settings(max_examples=300, deadline=None)
@given(histories())
def test_the_phases_of_any_history_sum_to_its_wall_time(run: Run) -> None:
    found = goodput(run.events)
    first = run.events[0]
    wall_s = run.now - first.fields().get("launched", first.time - first.at_s)
    assert found.total_s == pytest.approx(wall_s, abs=1e-6)
    assert all(value >= 0.0 for value in found.seconds.values())
    walls = sum(span.wall_s for span in found.attempts)
    assert walls + found.seconds["down"] == pytest.approx(wall_s, abs=1e-6)
    steps = [step.step for step in final_steps(run.events)]
    assert steps == sorted(set(steps))


@settings(max_examples=100, deadline=None)
@given(histories())
def test_goodput_after_each_event_is_that_of_the_events_so_far(run: Run) -> None:
    meter = GoodputMeter()
    for count, event in enumerate(run.events, start=1):
        meter.add(event)
        assert meter.result() == goodput(run.events[:count])


@pytest.mark.slow
def test_the_text_fits_one_screen_however_many_attempts_there_were() -> None:
    run = Run()
    for attempt in range(300):
        run.start(attempt * 1000, down_s=5000.0)
        run.steps(attempt * 1000 + 1, attempt * 1000 + 1000, seconds=37.0)
    lines = render(goodput(run.events))
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("goodput 88.1%: 11,100,000.0 s of 12,596,800.0 s")
    assert "290 earlier" in lines[-11]


def test_the_command_shows_text_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": "d"}})
    run = RunDir.create(tmp_path / "run", recipe)
    assert main(["goodput", str(run.path)]) == 2
    assert "ledger.jsonl: cannot be read" in capsys.readouterr().err
    lines = [json.dumps(event.fields()) + "\n" for event in killed_twice().events]
    run.ledger.write_text("".join(lines), encoding="utf-8")
    assert main(["goodput", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert all(phase.replace("_", " ") in shown for phase in PHASES)
    assert main(["goodput", str(run.path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert sum(figures["phases_s"].values()) == pytest.approx(figures["total_s"])
    assert [span["outcome"] for span in figures["attempts"]] == ["cut off", "cut off", "done"]
