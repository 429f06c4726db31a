"""What a training step leaves on the device, brought to the host without waiting for it.

Flags and metrics of each process are carried by the gradient all-reduce.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from peft_dist.distributed.world import World
from peft_dist.objective.passes import with_margin
from peft_dist.sharding.engine import RANK_EXTRAS, SHARED_EXTRAS


class StepInputs(NamedTuple):
    """What is known of a step before the device has computed it."""

    step: int
    lr: float
    rows: int
    cursor: int
    tokens: int
    source_predictions: tuple[int, ...] = ()
    """Predictions of each source, where there are several; no field of the event."""

    def fields(self) -> dict[str, Any]:
        """Return the fields of the step's event."""
        found = self._asdict()
        del found["source_predictions"]
        return found


class StepMetrics(NamedTuple):
    """What is read from the device after a step; the same on every process."""

    loss: float
    norm: float
    loss_scale: float
    """What the loss was multiplied with for backward; 1 but in float16."""
    stop: float
    """Processes that were asked to stop."""
    save: float
    """Above 0: rank 0 wants a checkpoint."""
    give_up: float
    """Above 0: rank 0 could not write too many of them."""
    rank_step_s: tuple[float, ...]
    """Each process's own part of the step; 0: not known yet."""
    rank_memory_bytes: tuple[float, ...]
    """Peak memory of each process: its GPU's, or the host's where it has none."""
    objective: dict[str, float]
    """What the objective reports besides its loss, by name."""
    source_nll: tuple[float, ...] = ()
    """Sum of the losses of each source, where there are several."""

    def fields(self, source_predictions: Sequence[int] = ()) -> dict[str, Any]:
        """Return the fields of the step's event; times that are not known yet are left out.

        Args:
            source_predictions: Predictions of each source, by which its loss is divided.
        """
        found: dict[str, Any] = {"loss": self.loss, "grad_norm": self.norm}
        found |= with_margin(self.objective)
        if source_predictions:
            found["source_loss"] = [
                nll / count if count else None
                for nll, count in zip(self.source_nll, source_predictions, strict=True)
            ]
        if all(self.rank_step_s):
            found["rank_step_s"] = [round(value, 6) for value in self.rank_step_s]
        return found | {"rank_memory_bytes": [int(value) for value in self.rank_memory_bytes]}


def make_extras(
    world: World,
    loss: torch.Tensor,
    objective: torch.Tensor,
    *,
    flags: Sequence[bool],
    step_s: float | None,
    memory_bytes: int,
    source_nll: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the flags and metrics that this process adds to the all-reduce, float32 [extras].

    Each process has slots of its own for its own metrics, and 0 in those of the others: the sum is
    the list of all. float32 holds bytes and seconds alike to seven digits.

    Args:
        world: This process's rank and device.
        loss: Its share of the loss.
        objective: Its share of what the objective reports, float32 [metrics].
        flags: Its flags for all processes: stop, save, give up.
        step_s: The time of its own part of a step, if it is known.
        memory_bytes: Its peak memory.
        source_nll: float32 [sources], its sums of the losses by source, where there are several.
    """
    per_rank = SHARED_EXTRAS + RANK_EXTRAS * world.size
    extras = torch.zeros(per_rank + len(objective), device=world.device)
    extras[per_rank:] = objective
    extras[0] = loss
    # Fills on the device: `extras[i] = 1.0` would copy a number to it, and wait for it.
    for index, flag in enumerate(flags, start=1):
        if flag:
            extras[index].fill_(1.0)
    if step_s is not None:
        extras[SHARED_EXTRAS + world.rank].fill_(step_s)
    extras[SHARED_EXTRAS + world.size + world.rank].fill_(float(memory_bytes))
    return extras if source_nll is None else torch.cat([extras, source_nll])


class StepMetricsReader:
    """Reads the metrics of steps in order; those of a GPU one step late.

    The host then prepares a step while the device computes the one before it.
    """

    def __init__(
        self, device: torch.device, *, objective: Sequence[str] = (), sources: int = 0
    ) -> None:
        """Start with nothing to read.

        Args:
            device: Where steps are computed.
            objective: Names the figures that stand after those of the processes.
            sources: How many sources have a loss of their own, which stand last.
        """
        self._objective, self._sources = tuple(objective), sources
        self.is_late = device.type == "cuda"
        self._unread: deque[tuple[StepInputs, torch.Tensor, torch.cuda.Event | None]] = deque()

    def put(self, inputs: StepInputs, metrics: torch.Tensor) -> None:
        """Take a step's metrics: loss, norm, scale, and the reduced extras after their first."""
        if not self.is_late:
            self._unread.append((inputs, metrics, None))
            return
        host = torch.empty(metrics.shape, pin_memory=True)
        host.copy_(metrics, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((inputs, host, event))

    def take(self, *, keep: int) -> Iterator[tuple[StepInputs, StepMetrics]]:
        """Yield inputs and metrics of all but the last `keep` steps."""
        while len(self._unread) > keep:
            inputs, host, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, scale, stop, save, give_up, *own = host.tolist()
            ranks = len(own) - len(self._objective) - self._sources
            size, figures = ranks // RANK_EXTRAS, own[ranks : len(own) - self._sources]
            yield (
                inputs,
                StepMetrics(
                    *(loss, norm, scale, stop, save, give_up),
                    rank_step_s=tuple(own[:size]),
                    rank_memory_bytes=tuple(own[size:ranks]),
                    objective=dict(zip(self._objective, figures, strict=True)),
                    source_nll=tuple(own[len(own) - self._sources :]),
                ),
            )
