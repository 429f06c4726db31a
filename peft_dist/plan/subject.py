"""What is planned: a recipe, and the shapes of its model and of its adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dist.common import paths
from peft_dist.common.errors import ModelError, PeftDistError
from peft_dist.config import Recipe
from peft_dist.config.batch_shape import longest_rows_of_step
from peft_dist.config.models import read_model_config
from peft_dist.plan.adapter import AdapterShape, adapter_shape
from peft_dist.plan.candidate import Candidate
from peft_dist.plan.estimate import Estimate, estimate
from peft_dist.plan.hardware import Hardware
from peft_dist.plan.read_shape import read_shape
from peft_dist.plan.shapes import ModelShape

COUNTED_ROW_BYTES = 256 << 20
"""Largest file whose rows are counted to know how long a run takes."""


@dataclass(frozen=True)
class Subject:
    """What is planned: a recipe, and what its model and adapter are made of."""

    recipe: Recipe
    shape: ModelShape
    adapter: AdapterShape
    steps: int | None
    """Optimizer steps of the run; None where nobody knows."""

    def estimate(self, candidate: Candidate, hardware: Hardware) -> Estimate:
        """Return what a candidate takes."""
        return estimate(
            self.recipe, self.shape, self.adapter, candidate, hardware, steps=self.steps
        )


def read_config(name: str, revision: str | None, *, network: bool = True) -> dict[str, Any]:
    """Return a model's config.json: of a folder, this machine's hub cache, or the hub.

    Raises:
        ModelError: Where there is none, or no JSON object in it.
    """
    folder = paths.staged(name) or Path(name).expanduser()
    file = folder / "config.json"
    if not folder.is_dir():
        file = _from_hub(name, revision, network=network)
    return read_model_config(file)


def _from_hub(name: str, revision: str | None, *, network: bool) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        faults = (HFValidationError, HfHubHTTPError, OSError)
    except ImportError:
        raise ModelError(
            f"{name!r} is no folder, and huggingface_hub is not installed",
            where="model.name",
            remedy="give a folder with the model's config.json",
        ) from None
    try:
        return Path(
            hf_hub_download(name, "config.json", revision=revision, local_files_only=not network)
        )
    except faults as error:
        raise ModelError(
            f"{name!r} is neither a folder nor a hub model that can be reached "
            f"({type(error).__name__})",
            where="model.name",
            remedy="give a folder with the model's config.json",
        ) from None


def subject_of(recipe: Recipe, config: dict[str, Any]) -> Subject:
    """Return what a recipe trains.

    Raises:
        PeftDistError: For a model or method that there are no formulas for.
    """
    shape = read_shape(config, where="model.name")
    adapter = adapter_shape(recipe.method, shape)
    if adapter is None:
        raise PeftDistError(
            f"no formula for the sizes of method {recipe.method.kind} as it is set",
            where="method",
            remedy="plan it with --simulate",
        )
    return Subject(recipe, shape, adapter, _steps(recipe))


def _steps(recipe: Recipe) -> int | None:
    if recipe.train.steps is not None:
        return recipe.train.steps
    sources = recipe.data.sources("train")
    rows = _count_rows(Path(sources[0].path)) if len(sources) == 1 else None
    if rows is None:
        return None
    return max(1, int(rows * (recipe.train.epochs or 1)) // longest_rows_of_step(recipe))


def _count_rows(file: Path) -> int | None:
    """Count the lines of a JSONL file; None for any other, or a large one."""
    try:
        if file.suffix != ".jsonl" or file.stat().st_size > COUNTED_ROW_BYTES:
            return None
        with file.open("rb") as stream:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))
    except OSError:
        return None
