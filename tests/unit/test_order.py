"""The global sample order, the plan of steps, and each row going to exactly one rank."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from peft_dist.config.recipe import Train
from peft_dist.data.order import RowOrder, StepPlan, assign

Lengths = NDArray[np.int64]
sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)
some_lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60).map(
    lambda values: np.array(values, dtype=np.int64)
)


def plan(lengths: Lengths, **train: float) -> StepPlan:
    return StepPlan.of(Train.model_validate(train), lengths)


@given(n_rows=sizes, seed=seeds, epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once(n_rows: int, seed: int, epoch: int) -> None:
    rows = RowOrder(n_rows, seed).rows(epoch * n_rows, (epoch + 1) * n_rows)
    assert sorted(rows.tolist()) == list(range(n_rows))


@given(n_rows=sizes, seed=seeds, cuts=st.lists(st.integers(0, 200), min_size=2, max_size=6))
def test_the_order_is_the_same_however_it_is_read(n_rows: int, seed: int, cuts: list[int]) -> None:
    cuts = sorted(cuts)
    whole = RowOrder(n_rows, seed).rows(cuts[0], cuts[-1])
    order = RowOrder(n_rows, seed)
    parts = [order.rows(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert np.concatenate(parts).tolist() == whole.tolist()


def test_the_order_of_a_seed_never_changes() -> None:
    """A checkpoint of an older release goes on with the same rows."""
    first, second = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7], [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert RowOrder(10, seed=0).rows(0, 20).tolist() == first + second
    assert RowOrder(10, seed=2**63 - 1).rows(0, 10).tolist() == [8, 1, 6, 9, 3, 2, 7, 4, 0, 5]


def test_epochs_and_seeds_differ() -> None:
    order = RowOrder(50, seed=1)
    first, second = order.rows(0, 50).tolist(), order.rows(50, 100).tolist()
    assert first != second
    assert first != RowOrder(50, seed=2).rows(0, 50).tolist()


@given(
    lengths=some_lengths,
    epochs=st.floats(0.01, 3.5),
    batch=st.one_of(
        st.fixed_dictionaries({"global_batch_size": st.integers(1, 20)}),
        st.fixed_dictionaries({"global_batch_tokens": st.integers(1, 200)}),
        st.just({}),
    ),
)
def test_the_steps_of_epochs_consume_the_order_exactly(
    lengths: Lengths, epochs: float, batch: dict[str, int]
) -> None:
    steps = plan(lengths, epochs=epochs, **batch)
    walked = list(steps.steps())
    assert len(walked) == steps.total_steps
    total = max(1, round(epochs * len(lengths)))
    assert walked[-1][1] == steps.total_rows == total
    expected = RowOrder(len(lengths), seed=0).rows(0, total).tolist()
    assert np.concatenate([rows for _, _, rows in walked]).tolist() == expected
    assert all(len(rows) for _, _, rows in walked)
    assert not len(steps.rows(total))


@given(lengths=some_lengths, budget=st.integers(1, 300), seed=seeds)
def test_a_batch_in_tokens_takes_as_many_whole_rows_as_fit(
    lengths: Lengths, budget: int, seed: int
) -> None:
    steps = plan(lengths, steps=7, global_batch_tokens=budget, seed=seed)
    assert steps.total_steps == 7
    order = RowOrder(len(lengths), seed)
    for _, cursor, rows in steps.steps():
        tokens = int(lengths[rows].sum())
        following = int(lengths[order.rows(cursor, cursor + 1)][0])
        assert tokens <= budget or len(rows) == 1
        assert tokens + following > budget


@given(
    lengths=some_lengths,
    done=st.integers(0, 9),
    batch=st.sampled_from(["global_batch_size", "global_batch_tokens"]),
)
def test_training_goes_on_from_a_cursor_as_if_never_stopped(
    lengths: Lengths, done: int, batch: str
) -> None:
    steps = plan(lengths, steps=9, **{batch: 30})
    whole = [(step, cursor, rows.tolist()) for step, cursor, rows in steps.steps()]
    cursor = whole[done - 1][1] if done else 0
    rest = [(s, c, rows.tolist()) for s, c, rows in steps.steps(step=done, cursor=cursor)]
    assert rest == whole[done:]


def test_steps_cross_epochs_and_never_run_out() -> None:
    steps = plan(np.ones(3, dtype=np.int64), steps=4, global_batch_size=2)
    assert steps.total_rows is None
    assert [len(rows) for _, _, rows in steps.steps()] == [2, 2, 2, 2]


def test_one_epoch_of_sixteen_rows_a_step_is_the_default() -> None:
    steps = plan(np.ones(40, dtype=np.int64))
    assert [len(rows) for _, _, rows in steps.steps()] == [16, 16, 8]


@given(lengths=some_lengths, world_size=st.integers(1, 9), micro=st.integers(1, 7), data=st.data())
def test_every_row_of_a_step_goes_to_one_micro_batch(
    lengths: Lengths, world_size: int, micro: int, data: st.DataObject
) -> None:
    rows = np.array(data.draw(st.permutations(range(len(lengths)))), dtype=np.int64)
    shares = assign(rows, lengths, world_size=world_size, micro_batch_size=micro)
    assert len(shares) == world_size
    least = -(-len(rows) // (world_size * micro))
    assert {len(share) for share in shares} == {least}
    batches = [batch for share in shares for batch in share]
    assert all(len(batch) <= micro and batch.dtype == np.int64 for batch in batches)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    again = assign(rows, lengths, world_size=world_size, micro_batch_size=micro)
    assert [b.tolist() for s in again for b in s] == [b.tolist() for b in batches]


@given(lengths=some_lengths, world_size=st.integers(1, 5))
def test_tokens_are_balanced_over_ranks(lengths: Lengths, world_size: int) -> None:
    rows = np.arange(len(lengths))
    shares = assign(rows, lengths, world_size=world_size, micro_batch_size=len(lengths))
    tokens = [sum(int(lengths[batch].sum()) for batch in share) for share in shares]
    assert max(tokens) - min(tokens) <= int(lengths.max())


def test_ranks_without_rows_still_get_a_micro_batch() -> None:
    shares = assign(np.array([5]), np.full(6, 3), world_size=3, micro_batch_size=4)
    assert [[batch.tolist() for batch in share] for share in shares] == [[[5]], [[]], [[]]]


def test_a_step_of_a_row_repeated_over_epochs_keeps_both() -> None:
    shares = assign(np.array([0, 0, 0]), np.array([4]), world_size=2, micro_batch_size=1)
    assert sum(len(batch) for share in shares for batch in share) == 3
