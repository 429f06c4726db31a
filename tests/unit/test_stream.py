"""Rows that are tokenised as their steps come: the tokens of cached rows, and no others."""

import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from peft_dist.common.errors import DataError, RecipeError
from peft_dist.config import load_recipe
from peft_dist.config.recipe import Recipe
from peft_dist.data import stream
from peft_dist.data.mixture import source_shares
from peft_dist.data.order import RowOrder, StepPlan, assign
from peft_dist.data.stream import StreamedRows, TrainingRows
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.data.tokenized_rows import StepRows
from tests.tiny import completion_rows, preference_rows, tiny_recipe, tiny_tokenizer, write_jsonl

Rows = list[dict[str, Any]]
Micro = list[tuple[list[int], list[bool]]]
REWRITES = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' }}{% if loop.last %}{{ '!' }}{% endif %}"
    "{{ message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""Renders the last turn otherwise than the same one in the middle."""
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
            [
                (rows.tokens[parts[row]].tolist(), rows.trained[parts[row]].tolist())
                for row in rows.rows_of(np.array(micro))
            ]
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
    cached = tokenize_rows(recipe, "train", tmp_path / "cache")
    whole = [trained(batch, 2) for batch in steps(recipe, cached)]
    assert [trained(batch, 2) for batch in steps(recipe, rows)] == whole
    assert len(whole) == 5
    again = StreamedRows(recipe, tmp_path / "cache")
    assert again.fingerprint == rows.fingerprint
    rest = steps(recipe, again, step=3, cursor=15)
    found = [trained(next(rest), 2)]
    for child in multiprocessing.active_children():
        child.kill()
    assert found + [trained(batch, 2) for batch in rest] == whole[3:]


@pytest.mark.parametrize("objective", ["orpo", "simpo", "reward"])
def test_pairs_without_a_reference_are_streamed_as_they_are_cached(
    tmp_path: Path, inline: None, objective: str
) -> None:
    tiny_tokenizer(tmp_path / "model")
    path = write_jsonl(tmp_path / "rows.jsonl", preference_rows(12, "pair"))
    sections: dict[str, Any] = {"objective": {"kind": objective}, "train": TRAIN}
    recipe = tiny_recipe(tmp_path / "model", path, data={"streaming": True}, **sections)
    cached = tokenize_rows(recipe, "train", tmp_path / "cache")
    streamed = StreamedRows(recipe, tmp_path / "cache")
    assert streamed.n_examples == cached.n_examples == 12
    for ours, theirs in zip(steps(recipe, streamed), steps(recipe, cached), strict=True):
        assert ours.rows.n_rows == 2 * len(set(ours.ids.tolist())), "an epoch ends within a step"
        assert trained(ours, 2) == trained(theirs, 2)


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
        "fix the row; to leave such out, set data.streaming: false and data.max_bad_rows"
    )
    with pytest.raises(DataError, match=rf"part-1\.{kind}:{line}: completion is null; fix"):
        tokenize_rows(recipe, "train", tmp_path / "cache")


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.eval=5%", "data.eval 5%"),
        ("data.max_bad_rows=1", "data.max_bad_rows"),
        ("train.global_batch_tokens=99", "train.global_batch_tokens"),
        ("objective=dpo", "objective dpo"),
        ("model.task=sequence-classification", "model.task sequence-classification"),
    ],
)
def test_what_takes_a_look_at_all_rows_is_refused_beside_a_stream(
    recipe_file: Path, override: str, what: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, ["data.streaming=true", override])
    assert f"{what} takes a look at all rows before training" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_without_an_index_are_not_streamed_and_none_is_a_line(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    (tmp_path / "rows.csv").write_text("text\na\n")
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "rows.csv", data={"streaming": True})
    with pytest.raises(DataError, match="only JSONL and Parquet files can; write one of these"):
        StreamedRows(recipe, tmp_path / "cache")
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "part-*.jsonl")
    with pytest.raises(DataError, match=r"part-\*\.jsonl: data\.train: no file is named like this"):
        tokenize_rows(recipe, "train", tmp_path / "cache")


def test_a_stream_writes_an_index_alone_and_holds_the_rows_of_a_step(
    tmp_path: Path, inline: None
) -> None:
    tiny_tokenizer(tmp_path / "model")
    rows = completion_rows(500)
    for name, group in (("rows.jsonl", 0), ("rows.parquet", 50)):
        path = tmp_path / name
        if group:
            write_parquet(path, list(rows), group=group)
        else:
            write_jsonl(path, rows)
        cache = tmp_path / f"cache-{name}"
        recipe = tiny_recipe(tmp_path / "model", path, data={"streaming": True}, train=TRAIN)
        streamed = StreamedRows(recipe, cache)
        assert max(batch.rows.n_rows for batch in steps(recipe, streamed)) == 5
        sizes = {file.name: file.stat().st_size for file in cache.rglob("*") if file.is_file()}
        assert sizes.pop("starts") == (8 * 11 if group else 8 * 500)
        assert sizes.pop("index.json") < 200
        assert not any(sizes.values()), f"locks alone: {sizes}"
        content = path.read_bytes()
        path.write_bytes(content)
        assert StreamedRows(recipe, cache).fingerprint == streamed.fingerprint
        with pytest.raises(DataError, match=f"{path}: has changed since its rows were indexed"):
            streamed.at(np.arange(1))


def test_a_line_may_become_no_row_or_several(tmp_path: Path, inline: None) -> None:
    """Each step has so many lines, whatever they become."""
    tiny_tokenizer(tmp_path / "model", chat_template=REWRITES)
    turns = ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = [{"prompt": "the cat " * 60, "completion": "x"}, chat, chat, chat]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"streaming": True, "max_length": 100}
    train = {"epochs": 1, "global_batch_size": 2}
    recipe = tiny_recipe(tmp_path / "model", path, data=data, train=train)
    streamed = StreamedRows(recipe, tmp_path / "cache")
    batches = list(steps(recipe, streamed))
    assert sorted(len(batch.ids) for batch in batches) == [2, 4]
    assert [batch.cursor for batch in batches] == [2, 4]
    (source,) = streamed.sources
    assert (source.dropped, source.trained_turns) == (1, 6)
    recipe = tiny_recipe(tmp_path / "model", path, data=data, train={"global_batch_size": 1})
    with pytest.raises(DataError, match="none of 1 rows has anything to train"):
        list(steps(recipe, StreamedRows(recipe, tmp_path / "cache")))
