"""Work on tokens in processes of their own, in order.

Rust's threads encode plain texts on every core already; a chat template is Python, and one core's
work. Only long data sets of chats come here, and rows that are tokenised while a model trains: each
process takes seconds to start.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from peft_dist.common.errors import DataError
from peft_dist.config.recipe import Recipe
from peft_dist.data.encode import Encoder
from peft_dist.data.encoded_row import EncodedRow
from peft_dist.data.rows import BadRows, Row
from peft_dist.data.sources import Source
from peft_dist.worker.signals import STOP_SIGNALS

Task = TypeVar("Task")
Done = TypeVar("Done")
MOST_PROCESSES = 8
"""Each holds the libraries in memory once more: about half a gigabyte."""
Encoded = tuple[list[EncodedRow], BadRows, Counter[str]]
"""Rows of a batch, those of it that are malformed, and the encoder's tally of it."""


def processes_here() -> int:
    """Return how many processes may encode: one per core that this process may use."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0)))


def encode_in_processes(
    batches: Iterator[list[Row]], recipe: Recipe, source: Source, *, processes: int
) -> Iterator[Encoded]:
    """Yield what an encoder of the recipe makes of each batch, in order.

    Raises:
        DataError: What the encoder raises, or a process was killed.
    """
    try:
        yield from in_processes(_encode, batches, _load, (recipe, source), processes=processes)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that tokenises was killed",
            where=source.name,
            remedy="ask for more memory: each of them takes about half a gigabyte",
        ) from error


def in_processes(
    work: Callable[[Task], Done],
    tasks: Iterator[Task],
    begin: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    processes: int,
) -> Generator[Done]:
    """Yield what `work` makes of each task, in order; twice as many tasks as processes wait.

    Args:
        work: Done in a process.
        tasks: Taken ahead.
        begin: Called with the arguments when a process begins.
        arguments: Of `begin`.
        processes: How many.

    Raises:
        BrokenProcessPool: A process was killed. And what `work` raises.
    """
    # Not fork: this process has threads, whose locks a copy would find taken for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin, (begin, arguments))
    try:
        waiting: deque[Future[Done]] = deque()
        for task in tasks:
            waiting.append(pool.submit(work, task))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_own: list[tuple[Encoder, Source]] = []
"""In a process of the pool: its tokenizer, and the source of what it encodes."""


def _load(recipe: Recipe, source: Source) -> None:
    """Load the tokenizer of a new process."""
    _own.append((Encoder.of(recipe, source.template), source))


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Make a new process end with the one that started it, and not before."""
    for number in STOP_SIGNALS:  # a scheduler sends them to all that a job has started
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are shared out by process
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    begin(*arguments)


def _encode(batch: list[Row]) -> Encoded:
    encoder, source = _own[0]
    bad = BadRows(source, None)
    encoder.tally.clear()
    return encoder.encode(batch, bad), bad, encoder.tally
