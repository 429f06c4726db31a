"""A head in slices gives the losses and the gradients of a gathered one, to float32's rounding."""

import json
from typing import Any

import pytest

from tests.distributed.sliced import CASES, WHOLE
from tests.processes import ROOT, environment, forked_world, run
from tests.tiny import completion_rows, preference_rows, tiny_model, write_jsonl

pytestmark = pytest.mark.distributed
PROCESSES = 3
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what three processes found out of every case; 320 tokens do not divide evenly."""
    folder = tmp_path_factory.mktemp("sliced")
    for architecture, tied in (("llama", False), ("gemma2", False), ("qwen2", True)):
        tiny_model(folder / architecture, architecture, tie_word_embeddings=tied)
    write_jsonl(folder / "rows.jsonl", completion_rows(26))
    write_jsonl(folder / "pairs.jsonl", preference_rows(14, "pair"))
    done = run(
        [*forked_world(PROCESSES), str(ROOT / "tests" / "distributed" / "sliced.py"), str(folder)],
        environment=environment(folder / "cache"),
        cwd=folder,
        timeout_s=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    values: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return values


def test_losses_and_gradients_of_slices_are_those_of_the_matrix(found: dict[str, Any]) -> None:
    assert len(found["losses"]) == 8 and max(found["losses"]) < ROUNDING, found["losses"]


@pytest.mark.parametrize("case", CASES)
def test_a_head_in_slices_learns_what_a_gathered_one_does(found: dict[str, Any], case: str) -> None:
    one = found[case]
    assert all(one[name] < ROUNDING for name in ("loss", "gradient", "held")), one
    own = [[count for count, _ in of_rank] for of_rank in one["of step"]]
    most = [[most for _, most in of_rank] for of_rank in one["of step"]]
    assert most == [most[0]] * PROCESSES and most[0] == [max(of) for of in zip(*own, strict=True)]
    assert min(map(min, own)) == 0, "one process has no rows in a pass"
    assert len(most[0]) >= 2 and one["of evaluation"] >= 2


@pytest.mark.parametrize("case", WHOLE)
def test_a_head_that_has_no_slices_of_its_own_is_gathered(found: dict[str, Any], case: str) -> None:
    one = found[case]
    assert one["of step"] == [[]] * PROCESSES and one["of evaluation"] == 0
    assert one["loss"] == one["gradient"] == one["held"] == 0
