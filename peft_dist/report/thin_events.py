"""Keep so many events of a long ledger as a report can hold: of its steps a sample and extremes."""

from collections.abc import Sequence
from operator import attrgetter

from peft_dist.ledger.events import LedgerEvent, StepEvent

MOST_STEPS = 20_000
"""Steps that are kept at most; each takes about 2 kB, and a report needs a thousand points."""
FIRST_GROUP = 16
"""Steps of a group once there are too many; a group keeps its first step and its extremes."""
_EXTREMES = tuple(map(attrgetter, ("loss", "grad_norm", "tokens_per_s")))
"""Fields whose lowest and highest step of each group is kept."""


class ThinnedEvents:
    """The events of a ledger in order, with at most `MOST_STEPS` of its steps."""

    def __init__(self) -> None:
        """Hold none."""
        self.kept: list[LedgerEvent] = []
        self.steps = 0
        """Steps that came."""
        self._group: list[LedgerEvent] = []
        self._group_size = 1
        self._kept_steps = 0

    def add(self, event: LedgerEvent) -> None:
        """Take the next event."""
        self._group.append(event)
        if len(self._group) >= self._group_size:
            self._close_group()

    def finish(self) -> list[LedgerEvent]:
        """Return what is kept of all events."""
        self._close_group()
        return self.kept

    def _close_group(self) -> None:
        self.steps += sum(isinstance(event, StepEvent) for event in self._group)
        kept = list(_thinned(self._group))
        self._kept_steps += sum(isinstance(event, StepEvent) for event in kept)
        self.kept += kept
        self._group = []
        if self._kept_steps > MOST_STEPS:
            self._group_size = max(FIRST_GROUP, 2 * self._group_size)
            self.kept = [
                event
                for begin in range(0, len(self.kept), FIRST_GROUP)
                for event in _thinned(self.kept[begin : begin + FIRST_GROUP])
            ]
            self._kept_steps = sum(isinstance(event, StepEvent) for event in self.kept)


def _thinned(group: Sequence[LedgerEvent]) -> Sequence[LedgerEvent]:
    """Return what a group keeps: its first and extreme steps, and all that is no step."""
    steps = [event for event in group if isinstance(event, StepEvent)]
    if len(steps) < FIRST_GROUP // 2:
        return group
    wanted = {0}
    for values_of in _EXTREMES:
        values = list(map(values_of, steps))
        known = [value for value in values if value is not None] if None in values else values
        if known:
            wanted |= {values.index(min(known)), values.index(max(known))}
    if len(steps) == len(group):
        return [steps[index] for index in sorted(wanted)]
    numbers = {steps[index].step for index in wanted}
    return [e for e in group if not isinstance(e, StepEvent) or e.step in numbers]
