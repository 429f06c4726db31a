"""Show the progress of a run on standard output: a bar on a terminal, else a line at intervals."""

import logging
import time

from peft_dist.common.screen import PLAIN_LINE_EVERY_S, Bar, Screen, screen
from peft_dist.ledger import events
from peft_dist.ledger.goodput import LedgerGap

log = logging.getLogger(__name__)

STEPS_AVERAGED = 20
"""The time left is told by about so many of the last steps."""


class Terminal:
    """Shows step, loss, tokens per second and time left; an evaluation gets its own line."""

    def __init__(self, total_steps: int, on: Screen | None = None, *, first_step: int = 0) -> None:
        """Start after the first `first_step` steps, which earlier attempts did."""
        self._screen = on or screen()
        self._total = total_steps
        self._first = True
        self._last_line = time.monotonic()
        self._step_s: float | None = None
        self._bar: Bar | None = None
        if first_step < total_steps:
            self._bar = self._screen.bar(
                f"step {first_step}/{total_steps}", total=total_steps, done=first_step
            )
            self._bar.is_wait = False
            self._bar.update(first_step, text=self._bar.text, detail="")

    def write(self, event: events.LedgerEvent) -> None:
        """Show one event, if it is of a kind that people follow."""
        match event:
            case events.StepEvent():
                self._step(event)
            case events.MicroBatchEvent():
                log.info("%d rows per pass fit; planned were %s", event.chosen, event.planned)
            case events.EvaluationEvent():
                log.info("%s", _evaluation(event))
            case events.RollbackEvent():
                log.warning("step %d  rolled back: %s", event.step, event.reason)
            case events.SkippedEvent():
                log.warning("step %d  skipped: %s", event.step, event.reason)
            case events.GapEvent():
                gap = LedgerGap(event.from_step, event.to_step)
                log.warning("step %d  %s", event.step, gap)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.end()

    def _step(self, event: events.StepEvent) -> None:
        where = f"step {event.step}/{self._total}"
        metrics = f"loss {event.loss:.4f}  "
        if event.reward_margin is not None:
            metrics += f"margin {event.reward_margin:.3f}  "
        if event.reward_accuracy is not None:
            metrics += f"accuracy {event.reward_accuracy:.2f}  "
        metrics += f"{event.tokens_per_s:,.0f} tok/s"
        left = self._left(event)
        is_last = event.step == self._total
        if self._bar is not None:
            detail = f"{metrics}  {left}".rstrip()
            self._bar.update(event.step, text=where, detail=detail)
            if is_last:  # what follows is no part of a step, and says itself what it is
                self._bar.end()
        now = time.monotonic()
        is_due = self._first or now - self._last_line >= PLAIN_LINE_EVERY_S
        if is_last or (is_due and not self._screen.is_live):
            self._last_line = now
            log.info("%s", f"{where}  {metrics}  {left}".rstrip())
        self._first = False

    def _left(self, event: events.StepEvent) -> str:
        """Return how long the steps that are left take; nothing where that is not known.

        Evaluations and saves are not in the time of a step.
        """
        # The first step pays for all lazy initialisation.
        if self._first or event.tokens is None or event.tokens_per_s <= 0:
            return ""
        step_s = event.tokens / event.tokens_per_s
        if self._step_s is None:
            self._step_s = step_s
        self._step_s += (step_s - self._step_s) / STEPS_AVERAGED
        left_s = (self._total - event.step) * self._step_s
        return f"{_interval(left_s)} left" if event.step < self._total else ""


def _interval(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _evaluation(event: events.EvaluationEvent) -> str:
    text = f"step {event.step}  held-out loss {event.eval_loss:.4f}"
    if event.eval_source_loss is not None:
        parts = ("-" if loss is None else f"{loss:.4f}" for loss in event.eval_source_loss)
        text += f" ({', '.join(parts)})"
    if event.eval_accuracy is not None:
        text += f"  accuracy {event.eval_accuracy:.3f}"
    if event.eval_reward_margin is not None:
        text += f"  margin {event.eval_reward_margin:.3f}"
    return f"{text}  {event.eval_seconds:.1f} s"
