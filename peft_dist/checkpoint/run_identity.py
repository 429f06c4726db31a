"""Which run a checkpoint belongs to: its settings, rows and base; another run's is refused."""

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from peft_dist.checkpoint import directory
from peft_dist.checkpoint.state import read_state
from peft_dist.common.errors import RunDirError
from peft_dist.config import Recipe
from peft_dist.config.resume_rules import differences, learning_settings, refuse_changes
from peft_dist.data.mixture import source_shares
from peft_dist.data.stream import TrainingRows
from peft_dist.data.token_cache import FORMAT
from peft_dist.evaluation.scoring import EvalSet
from peft_dist.model.precision import name_of
from peft_dist.model_setup import ModelSetup
from peft_dist.optim.lr_schedule import peak_learning_rate

RNG_RULE = "dropout is seeded by (train.seed, step, global micro-batch); rows by (seed, epoch)"


EARLIER = {
    "method.init_rows": 256,
    "model.dropout": "as-configured",
    "objective.kind": "sft",
    "train.optimizer": "adamw",
}
"""What versions did that had no field for it."""


def describe_run(setup: ModelSetup, rows: TrainingRows, eval_set: EvalSet | None) -> dict[str, Any]:
    """Return what every checkpoint of a run says besides its progress."""
    recipe = setup.recipe
    settings = learning_settings(recipe)
    base = json.dumps(setup.released_fingerprint, sort_keys=True).encode()
    start = {} if setup.start_sha256 is None else {"method.start_from": setup.start_sha256[:16]}
    return {
        "recipe": settings,
        "recipe_sha256": _sha256(json.dumps(settings, sort_keys=True).encode()),
        "content": {
            "data.train": _describe_rows(recipe, rows),
            "data.eval": None
            if eval_set is None
            else f"rows with fingerprint {eval_set.rows.fingerprint[:16]}",  # scored or not
            "model.name": f"weights with fingerprint {_sha256(base)[:16]}",
            **start,
        },
        "rows_format": FORMAT,
        "compute_dtype": name_of(setup.compute_dtype),
        "rng": {"seed": recipe.train.seed, "rule": RNG_RULE},
        "schedule": {
            "kind": recipe.train.schedule,
            "peak_learning_rate": peak_learning_rate(recipe),
            "warmup_fraction": recipe.train.warmup_fraction,
        },
        "world_size": setup.world.size,
        "strategy": setup.strategy,
    }


def dtype_of_run(checkpoints: Path, device: torch.device) -> str:
    """Return the name of the dtype that a run was begun in, or "" where nothing tells.

    Versions that did not note it computed in float32 on every CPU, unless the recipe said another.
    """
    with suppress(OSError, ValueError, RunDirError):  # told where it is gone on from
        if found := directory.folders(checkpoints):
            earlier = "float32" if device.type == "cpu" else ""
            return str(read_state(found[-1]).get("compute_dtype", earlier))
    return ""


def _describe_rows(recipe: Recipe, rows: TrainingRows) -> str:
    """Describe the training rows, and their mixture where not each is in every epoch once."""
    text = f"{rows.n_rows} rows, fingerprint {rows.fingerprint[:16]}"
    shares = source_shares(recipe.data, [source.rows for source in rows.sources])
    if all(share.n_rows == share.epoch_rows for share in shares):
        return text
    parts = [f"{share.epoch_rows} of {share.n_rows}" for share in shares]
    return f"{text}, in every epoch {' + '.join(parts)}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refuse_another_run(
    saved: dict[str, Any], now: dict[str, Any], allowed: Collection[str], *, where: str
) -> None:
    """Refuse to go on from a checkpoint of other rows, another model or other settings.

    Raises:
        RunDirError: With the difference.
    """
    changes = differences(saved["content"], now["content"])
    if saved.get("rows_format") != now.get("rows_format"):
        for field in changes.keys() & {"data.train", "data.eval"}:
            changes[field] += (
                " (of an earlier version, which may have read the same rows otherwise)"
            )
    # Checkpoints of earlier versions lack fields: what is off now was off before there was one.
    before = {
        field: EARLIER.get(field, value)
        for field, value in now["recipe"].items()
        if not value or field in EARLIER
    }
    changes |= differences({**before, **saved["recipe"]}, now["recipe"])
    refuse_changes(changes, allowed, where=where)
