"""Rows that are tokenised as their steps come: the tokens of cached rows, and no others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from peft_dist.common.errors import DataError
from peft_dist.config.recipe import Recipe
from peft_dist.data import stream
from peft_dist.data.mixture import source_shares
from peft_dist.data.order import RowOrder, StepPlan, assign
from peft_dist.data.stream import StreamedRows, TrainingRows
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.data.tokenized_rows import StepRows
from tests.tiny import completion_rows, tiny_recipe, tiny_tokenizer, write_jsonl

Rows = list[dict[str, Any]]
Micro = list[tuple[list[int], list[bool]]]
TRAIN = {"epochs": 2, "global_batch_size": 5, "micro_batch_size": 2}


def plan_of(recipe: Recipe, rows: TrainingRows) -> StepPlan:
    shares = source_shares(recipe.data, [source.rows for source in rows.sources])
    order = RowOrder(rows.n_examples, recipe.train.seed, shares)
    return StepPlan(order, rows.example_lengths, recipe.train)


def trained(batch: StepRows, world_size: int) -> list[list[Micro]]:
    """Return the tokens and the mask of each row, by rank and micro-batch."""
    rows = batch.rows
    groups = assign(batch.ids, rows.example_lengths, world_size=world_size, micro_batch_size=2)
    parts = [slice(*rows.offsets[row : row + 2]) for row in range(rows.n_rows)]
    return [
        [
            [(rows.tokens[parts[row]].tolist(), rows.trained[parts[row]].tolist()) for row in micro]
            for micro in rank
        ]
        for rank in groups
    ]


def steps(
    recipe: Recipe, rows: TrainingRows, *, step: int = 0, cursor: int = 0
) -> Iterator[StepRows]:
    return rows.batches(plan_of(recipe, rows).steps(step=step, cursor=cursor))


def write_parquet(path: Path, rows: Rows, *, group: int) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_shards(folder: Path, kind: str, rows: Rows) -> str:
    """Write rows into three files; return the pattern of their names."""
    for number, part in enumerate((rows[:7], rows[7:20], rows[20:])):
        if kind == "parquet":
            write_parquet(folder / f"part-{number}.parquet", part, group=3)
        else:
            text = "\n".join(json.dumps(row) + "\n" * (at % 3) for at, row in enumerate(part))
            mark = "\ufeff" if number == 0 else "\n"
            (folder / f"part-{number}.jsonl").write_text(mark + text, encoding="utf-8")
    return str(folder / f"part-*.{kind}")


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenise in this process: another one takes seconds to start."""

    def here(work: Any, tasks: Any, begin: Any, arguments: Any, *, processes: int) -> Any:
        stream._own.clear()
        begin(*arguments)
        yield from map(work, tasks)

    monkeypatch.setattr(stream, "in_processes", here)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_streamed_shards_are_trained_token_for_token_as_cached_ones(
    tmp_path: Path, inline: None, kind: str
) -> None:
    tiny_tokenizer(tmp_path / "model")
    pattern = write_shards(tmp_path, kind, completion_rows(33))
    data = {"train": [{"path": pattern, "weight": 3}, {"path": pattern, "weight": 1}]}
    recipe = tiny_recipe(tmp_path / "model", tmp_path, data=data, train=TRAIN)
    cached = tokenize_rows(recipe, "train", tmp_path / "cache")
    streamed = StreamedRows(recipe, tmp_path / "cache")
    assert streamed.n_examples == cached.n_examples == 66
    count = 0
    pairs = zip(steps(recipe, streamed), steps(recipe, cached), strict=True)
    for ours, theirs in pairs:
        count += 1
        assert (ours.step, ours.cursor) == (theirs.step, theirs.cursor)
        for world_size in (1, 2):
            assert trained(ours, world_size) == trained(theirs, world_size)
        sources = ours.rows.source_of_row[ours.ids].tolist()
        assert sources == theirs.rows.source_of_row[theirs.ids].tolist()
        assert ours.rows.n_rows <= 5
    assert count == 27, "two epochs of 66 rows, five a step"
    counts = [source.stop_tokens for source in streamed.sources]
    assert counts == [99, 32], "three of four; a row that is twice in a step counts once"


def test_a_stream_goes_on_at_any_row_and_survives_its_process(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    path = write_jsonl(tmp_path / "rows.jsonl", completion_rows(12))
    recipe = tiny_recipe(tmp_path / "model", path, data={"streaming": True}, train=TRAIN)
    rows = StreamedRows(recipe, tmp_path / "cache")
    whole = [trained(batch, 2) for batch in steps(recipe, rows)]
    assert len(whole) == 5
    again = StreamedRows(recipe, tmp_path / "cache")
    assert again.fingerprint == rows.fingerprint
    assert [trained(batch, 2) for batch in steps(recipe, again, step=3, cursor=15)] == whole[3:]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_bad_row_ends_the_stream_with_its_file_and_line(
    tmp_path: Path, inline: None, kind: str
) -> None:
    tiny_tokenizer(tmp_path / "model")
    rows: Rows = list(completion_rows(12))
    rows[9] = {"prompt": "the", "completion": None}
    pattern = write_shards(tmp_path, kind, rows)
    recipe = tiny_recipe(tmp_path / "model", Path(pattern), data={"streaming": True}, train=TRAIN)
    done = []
    with pytest.raises(DataError) as caught:
        done += [batch.step for batch in steps(recipe, StreamedRows(recipe, tmp_path / "cache"))]
    line = {"jsonl": 5, "parquet": 3}[kind]
    assert str(caught.value) == (
        f"{tmp_path}/part-1.{kind}:{line}: completion is null; "
        "fix the row, or take the file without data.streaming"
    )
    with pytest.raises(DataError, match=rf"part-1\.{kind}:{line}: completion is null; fix the row"):
        tokenize_rows(recipe, "train", tmp_path / "cache")
