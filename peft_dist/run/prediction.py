"""What was foreseen of a run before it began: `plan.json` in its directory."""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from peft_dist.run.directory import RunDir, write_text_atomic

Prediction: TypeAlias = Mapping[str, Any]
"""`bytes_per_rank` of tensors, `step_s` and `tokens_per_s` with rows of the longest length, and
what was chosen."""


def read_prediction(run: RunDir) -> Prediction:
    """Return what was foreseen of a run; nothing where that is not known."""
    try:
        found = json.loads(run.plan.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def planned_facts(run: RunDir) -> dict[str, float]:
    """Return what a start notes of it, by the ledger's names; nothing for what is no number."""
    foreseen = read_prediction(run)
    found: dict[str, float] = {}
    size, step_s = foreseen.get("bytes_per_rank"), foreseen.get("step_s")
    if isinstance(size, int):
        found["planned_bytes_per_rank"] = size
    if isinstance(step_s, float) and math.isfinite(step_s):
        found["planned_step_s"] = step_s
    return found


def write_prediction(run: RunDir, prediction: Prediction | None) -> None:
    """Note what is foreseen of a run, or that nothing is."""
    if prediction is None:
        run.plan.unlink(missing_ok=True)
    else:
        write_text_atomic(run.plan, json.dumps(prediction, indent=2) + "\n")
