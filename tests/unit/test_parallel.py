"""Rows that are encoded in processes of their own: the same, in order, and no process is left."""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from peft_dist.data import row_job
from peft_dist.data.token_cache import tokenize_rows
from tests.tiny import CHAT_TEMPLATE, tiny_recipe, tiny_tokenizer, write_jsonl

REFUSES_X = (
    "{% if messages[0]['content'] == 'x' %}{{ raise_exception('no x') }}{% endif %}" + CHAT_TEMPLATE
)


def chat(text: str) -> dict[str, Any]:
    roles = ("user", text), ("assistant", text * 2)
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


@pytest.mark.slow
def test_processes_give_the_rows_that_one_gives_and_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "own.jinja").write_text(REFUSES_X, encoding="utf-8")
    rows = [chat(f"row {at}") for at in range(30)]
    rows[25] = chat("x")
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"max_bad_rows": 1, "template": str(tmp_path / "own.jinja")}
    recipe = tiny_recipe(tmp_path / "model", path, data=data)
    alone = tokenize_rows(recipe, "train", tmp_path / "alone")
    monkeypatch.setattr(row_job, "ROWS_PER_BATCH", 4)
    monkeypatch.setattr(row_job, "ROWS_BEFORE_PROCESSES", 4)
    monkeypatch.setattr(row_job, "processes_here", lambda: 2)
    together = tokenize_rows(recipe, "train", tmp_path / "together")
    assert together.fingerprint == alone.fingerprint
    assert together.sources == alone.sources
    ((line, why),) = alone.sources[0].bad
    assert line == 26
    assert "no x" in why
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()
