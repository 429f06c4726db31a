"""How long a process takes for its own part of a step, up to the exchange of the gradients.

Not among it: the exchange, and gathering the base from others before it, in which whoever is slow
lets all the others wait. So the slow one is seen, and not those who wait for it. Never waits for
the device.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Span = tuple[torch.cuda.Event, torch.cuda.Event]


class ComputeTimer:
    """A stop watch for one process's own work, on the clock of the device that does it."""

    def __init__(self, device: torch.device) -> None:
        """Stand still."""
        self._on_gpu = device.type == "cuda"
        self._runs = False
        self._begun_s = self._away_s = 0.0
        self._latest_s: float | None = None
        self._begun: torch.cuda.Event | None = None
        self._gathers: list[Span] = []
        self._unread: deque[tuple[Span, list[Span]]] = deque()
        """Steps that the device may not have done yet: the whole, and the gathers in it."""

    def begin(self) -> None:
        """Start anew: what comes is this process's own work."""
        self._runs = True
        if self._on_gpu:
            self._begun, self._gathers = _now(), []
        else:
            self._begun_s, self._away_s = time.monotonic(), 0.0

    def end(self) -> None:
        """Stop: the exchange comes."""
        if not self._runs:
            return
        self._runs = False
        if self._begun is not None:
            self._unread.append(((self._begun, _now()), self._gathers))
        else:
            self._latest_s = time.monotonic() - self._begun_s - self._away_s

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Leave out what is done inside: it may be waiting for others."""
        if not self._runs:
            yield
        elif self._on_gpu:
            begun = _now()
            yield
            self._gathers.append((begun, _now()))
        else:
            begun_s = time.monotonic()
            yield
            self._away_s += time.monotonic() - begun_s

    def latest_s(self) -> float | None:
        """Return the time of the last step that is known; None: not of any yet.

        That is the one that has just ended, but on a GPU the last one that the device has done: two
        steps back, for the host is a step ahead. A gather beside which a GPU computes is left out
        as well.
        """
        while self._unread and _are_done(self._unread[0]):
            (begun, ended), gathers = self._unread.popleft()
            away_ms = sum(first.elapsed_time(last) for first, last in gathers)
            self._latest_s = max(0.0, begun.elapsed_time(ended) - away_ms) / 1e3
        return self._latest_s


def _now() -> torch.cuda.Event:
    """Return a mark in the current stream, which knows when the device came to it."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _are_done(step: tuple[Span, list[Span]]) -> bool:
    (_, ended), gathers = step
    # The gathers of a step stand one after another in their stream.
    return ended.query() and (not gathers or gathers[-1][1].query())
