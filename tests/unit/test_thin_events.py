"""A report of a ledger of any length keeps a bounded number of steps, and every spike."""

import random

import pytest

from peft_dist.ledger.events import EvaluationEvent, LedgerEvent, StepEvent
from peft_dist.report import thin_events
from peft_dist.report.thin_events import ThinnedEvents


def ledger(steps: int) -> list[LedgerEvent]:
    """Return steps with one lowest and one highest loss, and an evaluation after each 100."""
    draw = random.Random(0)
    events: list[LedgerEvent] = []
    for step in range(1, steps + 1):
        loss = {steps // 3: 99.0, steps // 2: -1.0}.get(step, draw.random())
        speed = 5000.0 if step == steps // 5 else 100 + draw.random()
        events.append(StepEvent(step=step, loss=loss, tokens_per_s=speed))
        if step % 100 == 0:
            events.append(EvaluationEvent(step=step, eval_loss=1.0))
    return events


def thinned(events: list[LedgerEvent]) -> ThinnedEvents:
    found = ThinnedEvents()
    for event in events:
        found.add(event)
    found.finish()
    return found


def test_a_short_ledger_is_kept_as_it_is() -> None:
    events = ledger(1_000)
    assert thinned(events).kept == events


@pytest.mark.parametrize("steps", [3_000, 20_000])
def test_of_a_long_one_few_steps_are_kept_in_order_and_no_spike_is_lost(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr(thin_events, "MOST_STEPS", 1_000)
    events = ledger(steps)
    found = thinned(events)
    kept = [event for event in found.kept if isinstance(event, StepEvent)]
    assert found.steps == steps
    assert 200 < len(kept) <= 1_000 + thin_events.FIRST_GROUP
    numbers = [event.step for event in kept]
    assert numbers == sorted(numbers) and numbers[0] == 1
    assert max(event.loss for event in kept) == 99.0 and min(event.loss for event in kept) == -1.0
    assert max(event.tokens_per_s for event in kept) == 5000.0
    gaps = [after - before for before, after in zip(numbers, numbers[1:], strict=False)]
    assert max(gaps) < steps / 50  # spread over the whole run
    others = [event for event in events if not isinstance(event, StepEvent)]
    assert [event for event in found.kept if not isinstance(event, StepEvent)] == others
