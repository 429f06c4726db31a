"""Work that may never end, such as a look at a dead file server or device, for a limited time."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """Return what some work returns, or raise what it raises.

    Work that takes longer goes on in a thread of its own until the process ends; `os._exit` does
    not wait for it.

    Raises:
        TimeoutError: Where it has not ended in time.
    """
    outcome: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # for the caller to raise
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="bounded", daemon=True)
    thread.start()
    thread.join(max(0.0, limit_s))
    if not outcome:
        raise TimeoutError(f"not done within {limit_s:.3g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only where T is
