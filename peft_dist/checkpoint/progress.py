"""Where a training stands, and what it asks of the process it runs in."""

from dataclasses import dataclass
from typing import Any, Protocol, Self

from peft_dist.evaluation.scoring import Score


@dataclass
class Progress:
    """Where a training stands: all of it that is not a tensor, and what a result needs."""

    step: int = 0
    """Optimizer steps done, skipped ones among them."""
    cursor: int = 0
    """Rows of the global order that are consumed."""
    evaluated: int = -1
    """Step of the last evaluation."""
    first: Score | None = None
    """The evaluation before the first step."""
    last: Score | None = None
    final_loss: float | None = None
    tokens: int = 0
    step_seconds: float = 0.0
    """Time spent in the steps that count, evaluations and checkpoints left out."""
    skipped_in_a_row: int = 0
    """Steps left out, for loss or gradient were not finite, since the last one that was not."""

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """Return the progress that a checkpoint holds, among other facts."""
        found = {name: state[name] for name in cls.__dataclass_fields__}
        for name in ("first", "last"):
            if found[name] is not None:
                found[name] = Score(**found[name])
        return cls(**found)


class TrainerHooks(Protocol):
    """What a loop asks of, and reports to, the process it runs in."""

    def stop_requested(self) -> bool:
        """Whether this process was asked to stop."""

    def phase(self, name: str, step: int) -> None:
        """Note that a `step`, an `evaluation` or a `save` begins, or goes on."""


class NoHooks:
    """TrainerHooks in which nobody asks and nobody listens."""

    def stop_requested(self) -> bool:
        """Say no."""
        return False

    def phase(self, name: str, step: int) -> None:
        """Nothing is noted."""
