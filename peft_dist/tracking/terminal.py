"""The progress of a run on standard output: a bar on a terminal, else a plain line now and then.

Whatever happens to its stream, training goes on.
"""

import logging
import sys
import time
from typing import TextIO

from tqdm import tqdm

from peft_dist.common.console import to_nowhere
from peft_dist.ledger.writer import Record

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 10.0
"""Seconds between lines where standard output is a file or a pipe."""
MISHAPS = {"skipped": "skipped", "rollback": "rolled back", "save_failed": "save failed"}
"""Events that get a line with their reason."""


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

    def write(self, record: Record) -> None:
        """Show one record, where it is of a kind that people follow."""
        if self._off:
            return
        event = record["event"]
        try:
            if event == "step":
                self._step(record)
            elif event == "evaluation":
                self._line(_evaluation(record))
            elif event in MISHAPS:
                self._line(f"step {record['step']}  {MISHAPS[event]}: {record['reason']}")
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

    def _step(self, record: Record) -> None:
        figures = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tok/s "
        step = record["step"]
        if self._bar is not None:
            self._bar.set_description_str(figures, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        first = self._begun_at_step is None
        if self._begun_at_step is None:  # The first step pays for everything lazy.
            self._begun_at_step, self._begun = step, now
        if first or step == self._total or now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            done = step - self._begun_at_step
            left = ""
            if done > 0:
                seconds = (now - self._begun) / done * (self._total - step)
                left = f" {tqdm.format_interval(seconds)} left"
            self._line(f"step {step}/{self._total}  {figures}{left}".rstrip())

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _give_up(self, error: OSError) -> None:
        self._off = True
        if self._bar is not None:
            self._bar.disable = True
        log.warning(
            "progress is no longer shown: %s; training goes on", error.strerror or str(error)
        )
        to_nowhere(self._stream)


def _evaluation(record: Record) -> str:
    text = f"step {record['step']}  held-out loss {record['eval_loss']:.4f}"
    if record.get("eval_accuracy") is not None:
        text += f"  accuracy {record['eval_accuracy']:.3f}"
    return text
