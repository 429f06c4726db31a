"""Several sources in one training: shares, order, what is held out, and what became of the rows."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_dist.common.errors import DataError
from peft_dist.config.data import Data
from peft_dist.config.recipe import Recipe, Train
from peft_dist.data.mixture import source_shares
from peft_dist.data.order import RowOrder, SourceShare, StepPlan
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from tests.tiny import tiny_encoder_tokenizer, tiny_recipe, tiny_tokenizer, write_jsonl

some_shares = st.lists(
    st.builds(SourceShare, st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=4
)


def order_of(shares: list[SourceShare], seed: int = 0) -> RowOrder:
    return RowOrder(sum(share.n_rows for share in shares), seed, shares)


@given(shares=some_shares, seed=st.integers(0, 9), epochs=st.integers(1, 4))
def test_every_epoch_holds_each_source_by_its_share_and_its_rows_evenly(
    shares: list[SourceShare], seed: int, epochs: int
) -> None:
    order = order_of(shares, seed)
    firsts = np.cumsum([0, *(share.n_rows for share in shares)])
    used: Counter[int] = Counter()
    for epoch in range(epochs):
        rows = order.rows(epoch * order.epoch_rows, (epoch + 1) * order.epoch_rows)
        sources = np.searchsorted(firsts, rows, side="right") - 1
        counts = np.bincount(sources, minlength=len(shares)).tolist()
        assert counts == [share.epoch_rows for share in shares]
        used.update(rows.tolist())
        for first, share in zip(firsts, shares, strict=False):
            times = [used[row] for row in range(first, first + share.n_rows)]
            assert max(times) - min(times) <= 1


@given(shares=some_shares, cuts=st.lists(st.integers(0, 200), min_size=2, max_size=6))
def test_a_mixed_order_is_the_same_from_any_cursor(
    shares: list[SourceShare], cuts: list[int]
) -> None:
    cuts = sorted(cuts)
    parts = [order_of(shares).rows(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    whole = order_of(shares).rows(cuts[0], cuts[-1])
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_sources_are_mixed_within_an_epoch_and_another_seed_mixes_otherwise() -> None:
    shares = [SourceShare(60, 40), SourceShare(60, 40)]
    first = order_of(shares).rows(0, 80)
    assert 10 < int((first[:40] < 60).sum()) < 30
    assert first.tolist() != order_of(shares, seed=1).rows(0, 80).tolist()
    assert sorted(first) != sorted(order_of(shares).rows(80, 160))


def shares_of(n_rows: list[int], *amounts: dict[str, float]) -> list[int]:
    train = [{"path": f"s{at}.jsonl", **amount} for at, amount in enumerate(amounts)]
    recipe = Recipe.model_validate({"model": {"name": "m"}, "data": {"train": train}})
    return [share.epoch_rows for share in source_shares(recipe.data, n_rows)]


def test_weights_are_shares_of_as_many_rows_as_there_are() -> None:
    assert shares_of([10, 90], {"weight": 3}, {"weight": 1}) == [75, 25]
    assert shares_of([10, 10, 10], *[{"weight": 0.1}] * 3) == [10, 10, 10]
    assert sum(shares_of([7, 9, 12], {"weight": 1}, {"weight": 2}, {"weight": 4})) == 28


def test_rows_and_epochs_are_counted_in_every_epoch() -> None:
    assert shares_of([10, 90, 40], {"rows": 25}, {"epochs": 0.5}, {}) == [25, 45, 40]


def test_a_source_without_a_row_in_an_epoch_is_one_line() -> None:
    with pytest.raises(DataError, match=r"data\.train\[1\]: none of s1\.jsonl is in an epoch of"):
        shares_of([10, 1], {"weight": 100}, {"weight": 1})
    with pytest.raises(DataError, match="raise its weight or epochs"):
        shares_of([10, 10], {}, {"epochs": 0.01})


def mixed(folder: Path, **data: Any) -> tuple[Recipe, TokenizedRows]:
    """Tokenise 12 rows that hold an `a` and 36 that hold a `b`."""
    tiny_tokenizer(folder / "model")
    write_jsonl(folder / "a.jsonl", [{"text": f"a {at}"} for at in range(12)])
    write_jsonl(folder / "b.jsonl", [{"q": "b", "a": f"{at}"} for at in range(36)])
    columns = {"prompt": "q", "completion": "a"}
    sources = [
        {"path": str(folder / "a.jsonl"), "weight": 1},
        {"path": str(folder / "b.jsonl"), "weight": 1, "columns": columns},
    ]
    recipe = tiny_recipe(folder / "model", folder / "a.jsonl", data={"train": sources, **data})
    return recipe, tokenize_rows(recipe, "train", folder / "cache")


def test_the_steps_of_a_training_hold_the_sources_by_weight(tmp_path: Path) -> None:
    recipe, rows = mixed(tmp_path)
    assert [source.rows for source in rows.sources] == [12, 36]
    assert [Path(source.name).name for source in rows.sources] == ["a.jsonl", "b.jsonl"]
    shares = source_shares(recipe.data, [source.rows for source in rows.sources])
    plan = StepPlan.of(Train(epochs=3, global_batch_size=5), rows.lengths, shares)
    trained = np.concatenate([ids for _, _, ids in plan.steps()])
    assert len(trained) == 3 * 48
    assert np.bincount(rows.source_of_row[trained]).tolist() == [72, 72]
    assert not rows.trained[rows.offsets[12]], "the first row of b begins with its prompt"


def texts(folder: Path, rows: TokenizedRows) -> list[str]:
    tokenizer = tiny_tokenizer(folder / "model")
    found = zip(rows.offsets, rows.offsets[1:], strict=False)
    return [str(tokenizer.decode(rows.tokens[begin:end])) for begin, end in found]


@pytest.mark.parametrize(("size", "count"), [("25%", 12), (7, 7)])
def test_held_out_rows_are_never_trained_and_no_row_is_lost(
    tmp_path: Path, size: str | int, count: int
) -> None:
    recipe, train = mixed(tmp_path, eval=size)
    held = tokenize_rows(recipe, "eval", tmp_path / "cache")
    assert held.n_rows == count
    assert train.n_rows + held.n_rows == 48
    trained, kept_back = texts(tmp_path, train), texts(tmp_path, held)
    assert not set(trained) & set(kept_back)
    _, everything = mixed(tmp_path / "all")
    assert sorted(trained + kept_back) == sorted(texts(tmp_path, everything))


def one_file(folder: Path, rows: list[Any], **sections: Any) -> tuple[TokenizedRows, TokenizedRows]:
    folder.mkdir(exist_ok=True)
    tiny_tokenizer(folder / "model")
    path = write_jsonl(folder / "rows.jsonl", rows)
    data = {"eval": "20%", **sections.pop("data", {})}
    recipe = tiny_recipe(folder / "model", path, data=data, **sections)
    cache = folder / "cache"
    return tokenize_rows(recipe, "train", cache), tokenize_rows(recipe, "eval", cache)


def test_what_is_held_out_follows_from_content_and_seed(tmp_path: Path) -> None:
    rows = [{"text": f"row {at}"} for at in range(40)]
    _, held = one_file(tmp_path / "one", rows)
    _, moved = one_file(tmp_path / "two", rows[::-1])
    _, other = one_file(tmp_path / "two", rows, train={"seed": 1})
    chosen = set(texts(tmp_path / "one", held))
    assert len(chosen) == 8
    assert set(texts(tmp_path / "one", moved)) == chosen
    assert set(texts(tmp_path / "one", other)) != chosen


def test_a_copy_of_a_held_out_row_is_held_out_too(tmp_path: Path) -> None:
    rows = [{"text": f"row {at}"} for at in range(20)] * 2
    train, held = one_file(tmp_path / "one", rows)
    assert not set(texts(tmp_path / "one", train)) & set(texts(tmp_path / "one", held))


def test_malformed_rows_are_told_once_where_rows_are_held_out(tmp_path: Path) -> None:
    rows = [{"text": 1}, *({"text": f"row {at}"} for at in range(20))]
    train, held = one_file(tmp_path / "one", rows, data={"max_bad_rows": 1})
    assert [len(source.bad) for source in (*train.sources, *held.sources)] == [1, 0]


def test_to_hold_out_all_rows_is_one_line(tmp_path: Path) -> None:
    for rows in ([{"text": "a"}, {"text": "b"}], [{"text": "same"}] * 3):
        with pytest.raises(DataError, match=r"data\.eval: .* leave none to train; hold out fewer"):
            one_file(tmp_path / "one", rows, data={"eval": 2})


def test_classes_are_held_out_too(tmp_path: Path) -> None:
    tiny_encoder_tokenizer(tmp_path / "model")
    rows = [{"text": f"row {at}", "label": "ab"[at % 2]} for at in range(20)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    task = {"task": "sequence-classification"}
    recipe = tiny_recipe(tmp_path / "model", path, model=task, data={"eval": 5})
    held = tokenize_rows(recipe, "eval", tmp_path / "cache")
    assert held.n_rows == 5
    assert held.label_names == ("a", "b")


def test_a_part_of_a_file_is_what_is_tokenised(tmp_path: Path) -> None:
    rows = [{"text": f"row {at}"} for at in range(20)]
    train, _ = one_file(tmp_path / "one", rows, data={"train_split": "train[:25%]", "eval": 1})
    assert train.n_rows == 4
    assert max(texts(tmp_path / "one", train)) <= "row 5"


def test_rows_that_lose_their_end_token_are_counted(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "model")
    rows = [
        {"text": "a"},
        {"prompt": "b", "completion": "long" * 9},
        {"prompt": "long" * 9, "completion": "b"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    counts = {}
    for truncation in ("end", "start", "drop"):
        data = {"max_length": 8, "truncation": truncation}
        recipe = tiny_recipe(tmp_path / "model", path, data=data)
        (source,) = tokenize_rows(recipe, "train", tmp_path / "cache").sources
        counts[truncation] = (source.rows, source.cut, source.lost_end, source.dropped)
    assert counts == {"end": (2, 1, 1, 1), "start": (3, 2, 0, 0), "drop": (1, 0, 0, 2)}
    recipe = tiny_recipe(tmp_path / "model", path, data={"max_length": 8})
    (source,) = tokenize_rows(recipe, "train", tmp_path / "cache").sources
    assert source.line("training") == (
        f"training rows of {path}: 2 kept; 1 (50.0%) of them cut to data.max_length, 1 of these "
        "without a stop token; 1 (33.3%) dropped with nothing to train within data.max_length"
    )
    assert source.facts()["bad"] == 0
    assert source.lose_much
    assert not replace(source, rows=39, lost_end=1, dropped=1).lose_much


@pytest.mark.parametrize(
    ("amounts", "rows"),
    [
        ([{"weight": 1e308}, {"weight": 1e308}], [10, 10]),
        ([{"weight": 1e308}, {"weight": 1e307}], [18, 2]),
        ([{"weight": 5e-324}, {"weight": 5e-324}], [10, 10]),
        ([{"epochs": 1e308}, {}], "data.train[0]: an epoch would have more than 1,000,000,000"),
        ([{"rows": 10**30}, {}], "data.train[0]: an epoch would have more than 1,000,000,000"),
        ([{"weight": 1e308}, {"weight": 1e-308}], "data.train[1]: none of b is in an epoch"),
        ([{}, {"epochs": 1e-300}], "data.train[1]: none of b is in an epoch"),
    ],
)
def test_amounts_at_the_ends_of_what_numbers_can_be_are_shares_or_refused(
    amounts: list[dict[str, Any]], rows: list[int] | str
) -> None:
    sources = [{"path": name, **amount} for name, amount in zip("ab", amounts, strict=True)]
    data = Data.model_validate({"train": sources})
    if isinstance(rows, str):
        with pytest.raises(DataError, match=re.escape(rows)):
            source_shares(data, [10, 10])
    else:
        assert [share.epoch_rows for share in source_shares(data, [10, 10])] == rows
