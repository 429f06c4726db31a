"""Ranks that read other rows, another model or other settings than rank 0: none of them trains."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.faults.harness import Harness, Project, fault
from tests.faults.oracles import records
from tests.tiny import completion_rows, write_jsonl

pytestmark = pytest.mark.distributed


def other_rows(folder: Path, project: Project) -> Path:
    return write_jsonl(folder / "other.jsonl", completion_rows(300, seed=7))


def other_weights(folder: Path, project: Project) -> Path:
    """Return a copy of the model with the same files, names and shapes, but other values."""
    model = shutil.copytree(project.folder / "model", folder / "model")
    file = model / "model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    ("field", "make", "strategy"),
    [
        ("data.train", other_rows, "ddp"),
        ("model.name", other_weights, "fsdp"),
        ("train.learning_rate", None, "fsdp"),
    ],
)
def test_ranks_that_read_otherwise_train_nothing_and_say_what_differs(
    harness: Harness, project: Project, tmp_path: Path, field: str, make: object, strategy: str
) -> None:
    value = str(make(tmp_path, project)) if callable(make) else "0.001"
    planted = [fault("other_recipe", rank=1, changes={field: value})]
    group = harness.start(
        project, harness.run_dir(), strategy=strategy, overrides=["train.steps=1"], faults=planted
    )
    assert group.wait() == [2, 2], group.told()
    (line,) = [x for x in group.errors(0).splitlines() if x.startswith("peft-dist: error: ")]
    assert "rank 1 on host " in line and f"has another {field} than rank 0 on host " in line
    assert not records(group.run_dir)
    failure = json.loads((group.run_dir / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == 2


def test_a_replica_that_has_loaded_another_base_is_named(
    harness: Harness, project: Project
) -> None:
    group = harness.start(
        project,
        harness.run_dir(),
        strategy="ddp",
        overrides=["train.steps=1", "quantization=none"],
        faults=[fault("other_base", rank=1)],
    )
    assert group.wait() == [2, 2], group.told()
    assert "model.name: rank 1 on host " in group.errors(0)
    assert "has loaded another base than rank 0" in group.errors(0)
    assert not records(group.run_dir)
