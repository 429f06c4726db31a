"""Score the held-out rows between two steps, and note what the model says."""

import math
import time
from collections.abc import Callable
from typing import Any

from peft_dist.common.errors import TrainingError
from peft_dist.evaluation.generation import Sampler
from peft_dist.evaluation.scoring import EvalSet, Score, score_rows
from peft_dist.ledger.events import EvaluationEvent, LedgerEvent
from peft_dist.model_setup import ModelSetup


def evaluate(
    setup: ModelSetup,
    eval_set: EvalSet,
    step: int,
    *,
    with_samples: bool,
    wants_stop: Callable[[], bool],
) -> tuple[Score, list[LedgerEvent]]:
    """Return the score after a step, and what the ledger says of it. Collective.

    Args:
        setup: The loaded model.
        eval_set: The held-out rows.
        step: Optimizer steps done.
        with_samples: Whether to note predictions of single rows too.
        wants_stop: Asked between batches whether this process is to stop.

    Raises:
        ScoringStopped: Where a process was asked to stop.
        TrainingError: For a loss that is not finite.
    """
    started = time.monotonic()
    result, predicted = score_rows(setup, eval_set, wants_stop=wants_stop)
    seconds = time.monotonic() - started
    events: list[LedgerEvent] = []
    if with_samples:
        events += Sampler(setup, eval_set).events(step, predicted, wants_stop=wants_stop)
    if not math.isfinite(result.loss):
        raise TrainingError(
            f"held-out loss {result.loss} after step {step}",
            where="evaluate",
            remedy="look at the model's weights and the held-out rows",
        )
    figures: dict[str, Any] = {f"eval_{k}": v for k, v in result.figures().items()}
    scored = EvaluationEvent(
        step=step,
        eval_loss=result.loss,
        eval_accuracy=result.accuracy,
        eval_source_loss=list(result.source_losses) or None,
        eval_seconds=seconds,
        **figures,
    )
    return result, [scored, *events]
