"""What the trainings of the harness train: a model of one layer, rows and a recipe."""

from pathlib import Path
from typing import Any, NamedTuple

from tests.tiny import completion_rows, tiny_model, write_jsonl


class Project(NamedTuple):
    """A folder with everything a training needs, to be read only."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The recipe file."""
        return self.folder / "recipe.yaml"

    @property
    def cache(self) -> Path:
        """The folder for PEFT_DIST_CACHE."""
        return self.folder / "cache"


def make_project(folder: Path) -> Project:
    """Make a model of one layer, rows and a recipe whose 200 steps take seconds."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    tiny_model(folder / "model", "llama", **sizes)
    write_jsonl(folder / "rows.jsonl", completion_rows(300))
    write_jsonl(folder / "held.jsonl", completion_rows(11, seed=1))
    (folder / "recipe.yaml").write_text(
        "model: {name: model, dtype: float32}\n"
        "quantization: nf4\n"
        "method: {kind: lora, rank: 4, alpha: 8, dropout: 0.1}\n"
        "data: {train: rows.jsonl, eval: held.jsonl}\n"
        "train: {steps: 200, global_batch_size: 4, micro_batch_size: 2, learning_rate: 5e-3}\n"
        "evaluate: {every_steps: 100}\n"
        "checkpoint: {every_steps: 20}\n"
        "tracking: {system_every_s: 0.2}\n",
        encoding="utf-8",
    )
    return Project(folder)
