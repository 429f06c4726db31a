"""Standard output as people watch it: lines and live bars on a terminal, else plain lines.

A bar never shares its line with other text. Whatever happens to the stream, the work goes on.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TextIO

from peft_dist.common.console import printable, to_nowhere
from peft_dist.common.terminal import is_terminal, terminal_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)

PLAIN_LINE_EVERY_S = 10.0
"""Seconds between two lines about one wait where standard output is a file or a pipe."""
SHORT_WAIT_S = 3.0
"""A wait that takes no longer gets no such line."""
REFRESH_PER_S = 2.0
LEAST_COLUMNS = 14
"""What stands before a bar keeps this much on a narrow terminal."""
BAR_COLUMNS = 30
"""How wide a bar is; rich makes it narrower where a terminal has no room."""


class Screen:
    """Lines and bars on one stream.

    Args:
        stream: Where. Default: whatever standard output is when something is shown.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.is_quiet = False
        """Whether bars and waits are left out."""
        self._stream = _Stream(stream)
        self._lock = threading.RLock()
        self._bars: list[Bar] = []
        self._progress: Progress | None = None
        self._ticker: threading.Thread | None = None
        self._all_ended = threading.Event()

    @property
    def is_live(self) -> bool:
        """Whether a bar can be drawn over itself."""
        return is_terminal(self._stream)

    def line(self, text: str) -> None:
        """Show a line, above all bars."""
        if self._stream.is_off:  # else a thread of rich's that says so would wait for our lock
            return
        text = printable(text)
        with self._lock:
            if self._progress is not None:
                from rich.text import Text

                self._progress.console.print(Text(text), soft_wrap=True)
            else:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    def bar(self, text: str, *, total: int | None = None, done: int = 0, unit: str = "") -> "Bar":
        """Show that something is going on, until `Bar.end`.

        Args:
            text: What.
            total: How much there is to do; None where that is not known.
            done: How much of it is done already.
            unit: What is counted.
        """
        bar = Bar(self, text, total, done, unit)
        with self._lock:
            if self.is_quiet:
                return bar
            self._bars.append(bar)
            if self.is_live:
                bar.task = self._live().add_task(
                    printable(text), total=total, completed=done, detail=bar.detail
                )
            elif self._ticker is None:
                self._all_ended.clear()
                self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
                self._ticker.start()
        return bar

    def close(self) -> None:
        """Take all bars away, and end the thread that tells of them."""
        for bar in list(self._bars):
            bar.end()
        ticker = self._ticker
        if ticker is not None:
            self._all_ended.set()
            ticker.join()

    def _refresh(self, bar: "Bar") -> None:
        with self._lock:
            if bar.task is not None and self._progress is not None:
                self._progress.update(
                    bar.task,
                    description=printable(bar.text),
                    completed=bar.done,
                    detail=printable(bar.detail),
                )

    def _remove(self, bar: "Bar") -> None:
        with self._lock:
            if bar not in self._bars:
                return
            self._bars.remove(bar)
            if bar.task is not None and self._progress is not None:
                self._progress.remove_task(bar.task)
            if not self._bars and self._progress is not None:
                self._progress.stop()
                self._progress = None

    def _live(self) -> "Progress":
        if self._progress is None:
            self._progress = _make_progress(self._stream)
            self._progress.start()
        return self._progress

    def _tick(self) -> None:
        """Tell of a wait now and then, where no bar can be drawn."""
        while True:
            self._all_ended.wait(1.0)
            with self._lock:
                if not self._bars:
                    self._ticker = None
                    return
                bar, now = self._bars[-1], time.monotonic()
                is_due = bar.is_wait and now >= bar.next_line_s
            if is_due:
                bar.next_line_s = now + PLAIN_LINE_EVERY_S
                log.info("%s", bar)


class Bar:
    """Something that goes on; see `Screen.bar`."""

    def __init__(self, screen: Screen, text: str, total: int | None, done: int, unit: str) -> None:
        """Begin; it is shown by `Screen.bar` alone."""
        self.text, self.total, self.done = text, total, done
        self.detail = ""
        """What stands behind the bar."""
        self.is_wait = True
        """Whether it is told of in plain lines."""
        self.task: TaskID | None = None
        self.began_s = time.monotonic()
        self.next_line_s = self.began_s + SHORT_WAIT_S
        self._screen, self._unit = screen, unit
        self.detail = self._count()

    def advance(self, count: int = 1) -> None:
        """Note that so much more is done."""
        self.done = self.done + count if self.total is None else min(self.done + count, self.total)
        self.detail = self._count()
        self._screen._refresh(self)

    def update(self, done: int, *, text: str, detail: str) -> None:
        """Note how much is done, and what stands around the bar."""
        self.done, self.text, self.detail = done, text, detail
        self._screen._refresh(self)

    def end(self) -> None:
        """Take it away."""
        self._screen._remove(self)

    def __str__(self) -> str:
        """Return it as a plain line."""
        seconds = time.monotonic() - self.began_s
        return "  ".join(filter(None, (self.text, self.detail, f"{seconds:.0f} s so far")))

    def _count(self) -> str:
        return "" if self.total is None else f"{self.done:,}/{self.total:,} {self._unit}".strip()


@cache
def screen() -> Screen:
    """Return this process's own screen."""
    return Screen()


@contextmanager
def wait(text: str, *, total: int | None = None, unit: str = "") -> Iterator[Bar]:
    """Show what a block waits for, where this process talks to people.

    Args:
        text: What it does.
        total: How much there is to do, of which `Bar.advance` tells.
        unit: What is counted.
    """
    bar = screen().bar(text, total=total, unit=unit)
    try:
        yield bar
    finally:
        bar.end()


@contextmanager
def stage(text: str, logger: logging.Logger) -> Iterator[list[str]]:
    """Show what a block waits for, and log what came of it with its seconds.

    Yields:
        An empty list: what is put into it is the line.
    """
    result: list[str] = []
    with wait(text) as bar:
        yield result
    if result:
        logger.info("%s  %.1f s", "  ".join(result), time.monotonic() - bar.began_s)


class _Stream:
    """A text stream that takes everything; once it is full or gone, it says so and shows nothing.

    rich, and its thread, would end at the first error.
    """

    def __init__(self, target: TextIO | None) -> None:
        self._target = target
        self._off: TextIO | None = None

    @property
    def _now(self) -> TextIO:
        return self._target or sys.stdout

    @property
    def is_off(self) -> bool:
        """Whether nothing is shown any more."""
        return self._now is self._off

    @property
    def encoding(self) -> str:
        """Return what texts are encoded in."""
        return self._now.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        try:
            return self._now.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return its descriptor."""
        return self._now.fileno()

    def write(self, text: str) -> int:
        """Write what the stream can take of a text."""
        stream = self._now
        if not self.is_off:
            try:
                stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except OSError as error:
                self._give_up(stream, error)
        return len(text)

    def flush(self) -> None:
        """Write what the stream still holds."""
        stream = self._now
        if not self.is_off:
            try:
                stream.flush()
            except OSError as error:
                self._give_up(stream, error)

    def _give_up(self, stream: TextIO, error: OSError) -> None:
        self._off = stream
        to_nowhere(stream)
        log.warning("progress is no longer shown: %s; the work goes on", error.strerror or error)


def _make_progress(stream: _Stream) -> "Progress":
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Growing(ProgressColumn):
        """A bar where it is known how much there is to do, else the seconds so far."""

        max_refresh = None

        def __init__(self) -> None:
            super().__init__(Column(max_width=BAR_COLUMNS))
            self._bar = BarColumn(bar_width=None, complete_style="cyan")

        def render(self, task: Task) -> object:  # type: ignore[override]
            """Draw it."""
            if task.total is None:
                return Text(f"{task.elapsed or 0:.0f} s")
            return self._bar.render(task)

    return Progress(
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(no_wrap=True, min_width=LEAST_COLUMNS),
        ),
        Growing(),
        TextColumn("{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True)),
        console=terminal_console(stream),
        refresh_per_second=REFRESH_PER_S,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
