"""What a checkpoint says of a training besides its tensors: one JSON file."""

import json
import logging
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RunDirError

log = logging.getLogger(__name__)

Facts = dict[str, Any]
ANEW = "begin anew with `peft-dist train RECIPE --fresh`"
FORMAT = 1
"""Of what a checkpoint holds, and how."""
STATE_FILE = "state.json"


def read_state(folder: Path) -> Facts:
    """Return all that a checkpoint says besides its tensors.

    Raises:
        RunDirError: Where another version has written it, in another form.
    """
    state: Facts = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise RunDirError(
            f"is of format {state.get('format')}, and this version reads format {FORMAT}",
            where=str(folder / STATE_FILE),
            remedy=f"go on with the version that made it, or {ANEW}",
        )
    return state


def held_out_loss(folder: Path) -> float | None:
    """Return the held-out loss of a checkpoint made right after an evaluation, else None."""
    try:
        state = read_state(folder)
        if state["evaluated"] == state["step"] and state["last"] is not None:
            return float(state["last"]["loss"])
    except (OSError, ValueError, KeyError, TypeError, RunDirError):
        log.warning("%s cannot be read; its checkpoint is not among the best", folder / STATE_FILE)
    return None
