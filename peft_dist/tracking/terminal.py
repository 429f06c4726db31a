"""Show the progress of a run on standard output: a bar on a terminal, else a line at intervals.

Whatever happens to its stream, training goes on.
"""

import logging
import sys
import time
from typing import TextIO

from tqdm import tqdm

from peft_dist.common.console import printable, show, to_nowhere
from peft_dist.ledger import events
from peft_dist.ledger.goodput import LedgerGap

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 10.0
"""Seconds between lines where standard output is a file or a pipe."""


class Terminal:
    """Shows step, loss, tokens per second and time left; an evaluation gets its own line."""

    def __init__(
        self, total_steps: int, stream: TextIO | None = None, *, first_step: int = 0
    ) -> None:
        """Start after the first `first_step` steps, which earlier attempts did."""
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._begun_at_step: int | None = None
        self._begun = self._last_line = time.monotonic()
        self._bar = None
        self._off = False
        try:
            if self._stream.isatty():
                self._bar = tqdm(
                    total=total_steps,
                    initial=first_step,
                    file=self._stream,
                    unit="step",
                    dynamic_ncols=True,
                    bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc} {remaining} left",
                )
        except OSError as error:
            self._give_up(error)

    def write(self, event: events.LedgerEvent) -> None:
        """Show one event, if it is of a kind that people follow."""
        if self._off:
            return
        try:
            match event:
                case events.StepEvent():
                    self._step(event)
                case events.EvaluationEvent():
                    self._line(_evaluation(event))
                case events.RollbackEvent():
                    self._line(f"step {event.step}  rolled back: {event.reason}")
                case events.SkippedEvent():
                    self._line(f"step {event.step}  skipped: {event.reason}")
                case events.GapEvent():
                    self._line(f"step {event.step}  {LedgerGap(event.from_step, event.to_step)}")
                case events.SaveFailedEvent():
                    self._line(f"step {event.step}  save failed: {event.reason}")
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is None or self._off:
            return
        try:
            self._bar.close()
        except OSError as error:
            self._give_up(error)

    def _step(self, event: events.StepEvent) -> None:
        metrics = f"loss {event.loss:.4f}  "
        if event.reward_margin is not None:
            metrics += f"margin {event.reward_margin:.3f}  "
        if event.reward_accuracy is not None:
            metrics += f"accuracy {event.reward_accuracy:.2f}  "
        metrics += f"{event.tokens_per_s:,.0f} tok/s "
        step = event.step
        if self._bar is not None:
            self._bar.set_description_str(metrics, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        first = self._begun_at_step is None
        if self._begun_at_step is None:  # the first step pays for all lazy initialisation
            self._begun_at_step, self._begun = step, now
        if first or step == self._total or now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            done = step - self._begun_at_step
            left = ""
            if done > 0:
                seconds = (now - self._begun) / done * (self._total - step)
                left = f" {tqdm.format_interval(seconds)} left"
            self._line(f"step {step}/{self._total}  {metrics}{left}".rstrip())

    def _line(self, text: str) -> None:
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            show(text, self._stream)

    def _give_up(self, error: OSError) -> None:
        self._off = True
        if self._bar is not None:
            self._bar.disable = True
        log.warning(
            "progress is no longer shown: %s; training goes on", error.strerror or str(error)
        )
        to_nowhere(self._stream)


def _evaluation(event: events.EvaluationEvent) -> str:
    text = f"step {event.step}  held-out loss {event.eval_loss:.4f}"
    if event.eval_accuracy is not None:
        text += f"  accuracy {event.eval_accuracy:.3f}"
    if event.eval_reward_margin is not None:
        text += f"  margin {event.eval_reward_margin:.3f}"
    return text
