"""The progress of a run on standard output: a bar on a terminal, else a plain line now and then."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from peft_dist.tracking.base import Record

PLAIN_LINE_EVERY_S = 10.0
"""Seconds between lines where standard output is a file or a pipe."""


class Terminal:
    """Shows step, loss, tokens per second and time left; an evaluation gets its own line."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        """Start at step 0."""
        self._stream = stream or sys.stdout
        self._total = total_steps
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc} {remaining} left",
            )

    def write(self, record: Record) -> None:
        """Show one record."""
        if record["event"] == "evaluation":
            self._line(_evaluation(record))
            return
        figures = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tok/s "
        if self._bar is not None:
            self._bar.set_description_str(figures, refresh=False)
            self._bar.update(1)
            return
        now, step = time.monotonic(), record["step"]
        if step == 1:
            self._started = now  # The first step pays for everything lazy.
        if step in (1, self._total) or now - self._last_line >= PLAIN_LINE_EVERY_S:
            self._last_line = now
            left = "" if step == 1 else f" {self._left(now, step)} left"
            self._line(f"step {step}/{self._total}  {figures}{left}".rstrip())

    def _left(self, now: float, step: int) -> str:
        seconds = (now - self._started) / (step - 1) * (self._total - step)
        return tqdm.format_interval(seconds)

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _evaluation(record: Record) -> str:
    text = f"step {record['step']}  held-out loss {record['eval_loss']:.4f}"
    if record.get("eval_accuracy") is not None:
        text += f"  accuracy {record['eval_accuracy']:.3f}"
    return text
