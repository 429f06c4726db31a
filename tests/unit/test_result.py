"""What a finished run says of its held-out rows: figures are compared only where they can be."""

from pathlib import Path
from typing import Any

import pytest

from peft_dist.metrics.result import summary
from peft_dist.run.directory import RunDir

RESULT: dict[str, Any] = {
    "steps": 3, "final_loss": 1.0, "base_bytes_per_rank": [1], "base_bytes_total": 1,
    "strategy": "ddp", "quantization": "nf4", "peak_rss_bytes_per_rank": [1], "method": "lora",
    "trainable_parameters": 1, "tokens_per_second": 1.0, "load_seconds": 1.0,
    "train_seconds": 1.0, "device": "cpu", "serving": "LoRA of rank 8",
}  # fmt: skip
AFTER = {"loss": 2.0, "accuracy": 0.75, "rows": 32}


@pytest.mark.parametrize(
    ("first", "told"),
    [
        ({"loss": 3.0, "accuracy": 0.5, "rows": 32}, "3.0000 before, 2.0000 after (32 held-out"),
        ({"loss": 3.0, "accuracy": 0.5, "rows": 150},
         "3.0000 before (150 rows), 2.0000 after (32 held-out rows): not the same rows"),
        (None, "held-out loss  2.0000 after (32 held-out rows)"),
    ],
)  # fmt: skip
def test_losses_before_and_after_are_of_rows_that_are_named(
    tmp_path: Path, first: dict[str, Any] | None, told: str
) -> None:
    result = RESULT | {"eval": {"first": first, "last": AFTER}}
    text = "\n".join(summary(result, RunDir(tmp_path), base="m"))
    assert told in text
    assert "0.750 after (32 held-out rows)" in text


def test_a_run_without_held_out_rows_says_nothing_of_them(tmp_path: Path) -> None:
    result = RESULT | {"eval": {"first": None, "last": None}}
    assert "held-out" not in "".join(summary(result, RunDir(tmp_path), base="m"))
