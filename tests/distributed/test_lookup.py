"""An embedding whose rows are looked up trains as one that is gathered, to the bit."""

import json
from typing import Any

import pytest

from tests.distributed.lookup import CASES
from tests.processes import ROOT, environment, forked_world, run
from tests.tiny import completion_rows, tiny_model, write_jsonl

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what two processes found out of every case, both ways."""
    folder = tmp_path_factory.mktemp("lookup")
    for architecture in ("llama", "gemma3_text"):
        tiny_model(folder / architecture, architecture, tie_word_embeddings=False)
    write_jsonl(folder / "rows.jsonl", completion_rows(24))
    done = run(
        [*forked_world(2), str(ROOT / "tests" / "distributed" / "lookup.py"), str(folder)],
        environment=environment(folder / "cache"),
        cwd=folder,
        timeout_s=400,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    out: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return out


@pytest.mark.parametrize("case", CASES)
def test_looking_rows_up_changes_no_bit(found: dict[str, Any], case: str) -> None:
    looked_up, gathered = found[case]["looked up"], found[case]["gathered"]
    assert looked_up.pop("exchanges") >= 2 * 3 and gathered.pop("exchanges") == 0
    assert looked_up == gathered
    losses = [loss for loss, _ in looked_up["steps"]]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize("case", CASES)
def test_columns_are_filled_hashed_and_gathered_as_rows_are(
    found: dict[str, Any], case: str
) -> None:
    one = found[case]["looked up"]
    assert one["columns"] and one["as stored"] and one["turned"]
    assert one["hash"] and one["hash turned"] and one["bytes"] == 0.5
