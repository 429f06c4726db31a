"""Weights & Biases as a view of the ledger: whatever happens to it, training goes on."""

import logging
from pathlib import Path
from typing import Any

from peft_dist.config import Recipe
from peft_dist.tracking.base import Record

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 5.0
"""Seconds after which a server that does not answer is done without; training waits meanwhile."""
FINISH_TIMEOUT_S = 10.0
"""Seconds that the end of a run may wait for uploads; by default W&B retries for days."""


class WandbTracker:
    """Logs every record under `train/step`; the first failure ends logging with one warning."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        """Start a run; files lie in `folder`."""
        import wandb

        settings = recipe.tracking.wandb
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                mode=settings.mode,
                dir=str(folder),
                name=folder.name,
                config=recipe.model_dump(mode="json"),
                settings=wandb.Settings(
                    x_disable_meta=True,
                    x_disable_stats=True,
                    console="off",
                    disable_code=True,
                    save_code=False,
                    init_timeout=INIT_TIMEOUT_S,
                    finish_timeout=FINISH_TIMEOUT_S,
                ),
            )
            self._run.define_metric("train/step")
            self._run.define_metric("*", step_metric="train/step")
        except Exception as error:
            self._give_up(error)

    def write(self, record: Record) -> None:
        """Log one record of a step or an evaluation; the others are the ledger's alone."""
        prefix = {"step": "train", "evaluation": "evaluation"}.get(record["event"])
        if self._run is None or prefix is None:
            return
        figures = {f"{prefix}/{k}": v for k, v in record.items() if k not in ("event", "step")}
        try:
            self._run.log({"train/step": record["step"], **figures})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Finish the run, waiting at most `FINISH_TIMEOUT_S` seconds."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        log.warning("W&B is off for the rest of the run: %s", str(error).split("\n")[0])
