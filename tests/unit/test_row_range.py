"""Parts of a split mean the rows that `datasets` takes for them."""

import datasets
import pytest
from datasets.arrow_reader import ReadInstruction
from hypothesis import given
from hypothesis import strategies as st

from peft_dist.common.errors import DataError
from peft_dist.data.row_range import parse_split

bounds = st.one_of(
    st.just(""), st.integers(-40, 40).map(str), st.integers(-100, 100).map(lambda n: f"{n}%")
)


@given(start=bounds, stop=bounds, n_rows=st.integers(0, 57))
def test_a_part_is_the_rows_that_datasets_takes(start: str, stop: str, n_rows: int) -> None:
    if start and stop and ("%" in start) != ("%" in stop):
        return  # that, `datasets` refuses
    text = f"train[{start}:{stop}]"
    name, part = parse_split(text, field="data.train_split")
    assert part is not None
    info = {"train": datasets.SplitInfo("train", num_examples=n_rows, dataset_name="x")}
    lengths = {name: split.num_examples for name, split in info.items()}
    (theirs,) = ReadInstruction.from_spec(text).to_absolute(lengths)
    expected = range(theirs.from_, max(theirs.from_, theirs.to))
    assert name == "train"
    assert list(part.of(n_rows)) == list(expected)


def test_a_name_alone_means_all() -> None:
    assert parse_split("train", field="data.train_split") == ("train", None)


@pytest.mark.parametrize("text", ["train[", "train[1]", "train[a:b]", "train[:10%]x", "train[::2]"])
def test_what_is_no_part_is_one_line(text: str) -> None:
    with pytest.raises(DataError, match=r"data\.train_split: got .* write it like train, "):
        parse_split(text, field="data.train_split")
    with pytest.raises(DataError, match="give at most 100%"):
        parse_split("train[:101%]", field="data.train_split")
