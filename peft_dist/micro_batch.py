"""Measure how many rows fit into a pass, before the first step of a run that leaves it open.

The plan's number is a guess about a GPU that it has not seen. Trials are forward and backward
passes over the longest rows; nothing of them stays. A trial is made only where the ones before say
that it fits: a process that ran out of memory alone would leave the others waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from peft_dist.config.batch_shape import longest_rows_of_step, micro_batch_rows
from peft_dist.distributed.collectives import gather_objects
from peft_dist.ledger.events import MicroBatchEvent
from peft_dist.trainer import Trainer

USABLE = 0.95
"""Share of the memory that is there for a run; the rest is for what trials do not show."""
MOMENT_BYTES = 8
"""Per trained parameter: AdamW's two, which come with the first update."""


class MemoryMeter(Protocol):
    """Looks at the memory of the device that computes."""

    def begin(self) -> int:
        """Forget the peak; return the bytes that are held now."""

    def peak_bytes(self) -> int:
        """Return the most bytes held since then."""

    def limit_bytes(self) -> int:
        """Return the bytes that this process may hold."""


class CudaMemory:
    """The memory that torch's allocator takes from a GPU, gaps between tensors included."""

    def __init__(self, device: torch.device) -> None:
        """Look at one GPU."""
        self._device = device

    def begin(self) -> int:
        """Give back what is free, and count from here."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return torch.cuda.memory_reserved(self._device)

    def peak_bytes(self) -> int:
        """Return the most that was reserved."""
        return torch.cuda.max_memory_reserved(self._device)

    def limit_bytes(self) -> int:
        """Return what is reserved, and what nobody has."""
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free + torch.cuda.memory_reserved(self._device))


@dataclass(frozen=True)
class TrialResult:
    """What the trials have shown."""

    rows: int
    """The most that fit."""
    peaks: dict[int, int]
    """Bytes by number of rows."""


def most_that_fit(
    trial: Callable[[int], int], *, held_bytes: int, limit_bytes: int, guess: int, most: int
) -> TrialResult:
    """Try 1 row, 2, 4 and so on, as long as the next number is known to fit.

    What a pass takes besides what is held before it grows at most in proportion to its rows. Up to
    the guess, which has formulas behind it, a straight line through the last two trials is enough.

    Args:
        trial: Runs so many rows, and returns the peak in bytes.
        held_bytes: What is there before a pass.
        limit_bytes: What may be there.
        guess: Rows that the plan has chosen.
        most: Rows of a process in a step.
    """
    peaks = {1: trial(1)}
    rows = 1
    while 2 * rows <= most:
        peak = peaks[rows]
        expected = held_bytes + 2 * (peak - held_bytes)
        if 1 < rows < guess:
            expected = peak + 2 * (peak - peaks[rows // 2])
        if expected > limit_bytes:
            break
        peaks[2 * rows] = trial(2 * rows)
        if peaks[2 * rows] > limit_bytes:
            break
        rows *= 2
    return TrialResult(rows, peaks)


def fit_micro_batch(trainer: Trainer, meter: MemoryMeter) -> MicroBatchEvent:
    """Set a trainer's micro-batch to the most rows that fit on every process. Collective.

    Args:
        trainer: Before its first step.
        meter: Of this process.
    """
    setup, recipe, rows = trainer.setup, trainer.recipe, trainer.rows
    assert rows.example_lengths is not None, "rows that are streamed have no longest one"
    by_length = np.argsort(-rows.example_lengths, kind="stable")
    trained = sum(parameter.numel() for parameter in setup.adapter.values())
    moments = MOMENT_BYTES * trained
    setup.model.train()

    def trial(count: int) -> int:
        longest = by_length[:count]
        meter.begin()
        trainer.passes.try_out(longest)
        return int(max(gather_objects(meter.peak_bytes() + moments)))

    planned = micro_batch_rows(recipe)
    held = max(gather_objects(meter.begin() + moments))
    limit = min(gather_objects(int(USABLE * meter.limit_bytes())))
    of_process = -(-longest_rows_of_step(recipe) // trainer.world.size)
    found = most_that_fit(
        trial,
        held_bytes=held,
        limit_bytes=limit,
        guess=planned,
        most=min(of_process, rows.n_examples),
    )
    meter.begin()  # what the largest trial took is no peak of the run
    trainer.passes.micro_batch_rows = found.rows
    return MicroBatchEvent(
        step=0,
        planned=planned,
        chosen=found.rows,
        tried=[*found.peaks],
        peak_memory_bytes=[*found.peaks.values()],
        limit_bytes=limit,
    )
