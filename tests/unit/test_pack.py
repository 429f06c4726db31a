"""Micro-batches: packed and padded say the same about every row."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from peft_dist.data.pack import Batch, pack
from peft_dist.data.token_cache import TokenizedRows
from tests.tiny import VOCABULARY, tiny_tokenizer, tokenised

PAD = 0


def rows_of(lengths: list[int], seed: int = 0, classes: bool = False) -> TokenizedRows:
    """Make rows whose tokens, the pad id among them, and trained flags are random."""
    random = np.random.default_rng(seed)
    n_tokens = sum(lengths)
    return TokenizedRows(
        tokens=random.integers(0, 9, n_tokens, dtype=np.int32),
        trained=random.random(n_tokens) < 0.5,
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        class_ids=np.arange(len(lengths), dtype=np.int64) % 3 if classes else None,
        label_names=("a", "b", "c") if classes else (),
        pad_id=PAD,
        sources=(),
        fingerprint="",
    )


def predictions(batch: Batch) -> list[tuple[int, int, int, int]]:
    """Return (row, place, token read there, target) of each trained prediction."""
    at = batch.label_positions
    columns = (
        batch.target_rows,
        batch.position_ids.flatten()[at],
        batch.input_ids.flatten()[at],
        batch.targets,
    )
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_packed_and_padded_rows_predict_the_same(
    lengths: list[int], seed: int, data: st.DataObject
) -> None:
    rows = rows_of(lengths, seed)
    ids = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    packed, padded = (pack(rows, ids, packing=packing) for packing in (True, False))
    expected = [
        (number, place, int(rows.tokens[begin + place]), int(rows.tokens[begin + place + 1]))
        for number, begin in enumerate(rows.offsets[ids])
        for place in range(int(rows.lengths[ids[number]]) - 1)
        if rows.trained[begin + place + 1]
    ]
    assert predictions(packed) == predictions(padded) == expected
    assert len(expected) == rows.predicted_counts[ids].sum()
    assert packed.n_rows == padded.n_rows == len(ids)
    assert packed.n_tokens == padded.n_tokens == rows.lengths[ids].sum()


def test_a_packed_batch_has_no_padding_and_no_mask() -> None:
    batch = pack(rows_of([2, 4, 3]), np.array([2, 0]), packing=True)
    assert batch.input_ids.shape == (1, 5)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_mask is None


def test_a_padded_batch_pads_on_the_right_and_masks_by_length_not_by_id() -> None:
    rows = rows_of([2, 4])
    rows.tokens[:] = PAD  # real tokens that look like padding
    batch = pack(rows, np.array([0, 1]), packing=False, pad_id=7)
    assert batch.input_ids.tolist() == [[PAD, PAD, 7, 7], [PAD] * 4]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]


@pytest.mark.parametrize("packing", [True, False])
def test_learned_tokens_take_the_first_places_of_every_row(packing: bool) -> None:
    rows = rows_of([2, 4, 3])
    ids = np.array([2, 0, 1])
    without, batch = (
        pack(rows, ids, packing=packing, pad_id=7, virtual_tokens=count) for count in (0, 3)
    )
    assert without.virtual_positions is None
    assert batch.virtual_positions is not None
    first = [0, 6, 11] if packing else [0, 7, 14]
    assert batch.virtual_positions.tolist() == [f + i for f in first for i in range(3)]
    assert batch.position_ids.flatten()[batch.virtual_positions].tolist() == [0, 1, 2] * 3
    assert batch.row_lengths == ((6, 5, 7) if packing else None)
    if packing:
        assert batch.row_bounds is not None
        assert batch.row_bounds.tolist() == [0, 6, 11, 18]
    else:
        assert batch.attention_mask is not None
        assert batch.attention_mask.sum(dim=1).tolist() == [6, 5, 7]
    later = [(row, place + 3, *rest) for row, place, *rest in predictions(without)]
    assert [tuple(p) for p in predictions(batch)] == later
    tokens = np.delete(batch.input_ids.flatten().numpy(), batch.virtual_positions.numpy())
    assert tokens.tolist() == without.input_ids.flatten().tolist()
    assert (batch.n_rows, batch.n_tokens) == (3, 9)


def test_a_batch_to_classify_has_one_target_per_row() -> None:
    batch = pack(rows_of([2, 4, 3, 5], classes=True), np.array([3, 1, 2]), packing=False)
    assert batch.targets.tolist() == [0, 1, 2]
    assert batch.target_rows.tolist() == [0, 1, 2]
    assert not len(batch.label_positions)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("classes", [True, False])
def test_an_empty_micro_batch_is_tokens_without_targets(packing: bool, classes: bool) -> None:
    rows = rows_of([30, 2], classes=classes)
    batch = pack(rows, np.empty(0, dtype=np.int64), packing=packing)
    assert batch.input_ids.tolist() == [rows.tokens[:8].tolist()]
    assert (batch.attention_mask is None) == packing
    assert len(batch.targets) == len(batch.label_positions) == len(batch.target_rows) == 0
    assert (batch.n_rows, batch.n_tokens) == (0, 0)


def test_all_tensors_are_int64_or_masks_and_move_together() -> None:
    batch = pack(rows_of([2, 4]), np.array([0, 1]), packing=False)
    moved = batch.to(torch.device("meta"))
    for name in ("input_ids", "position_ids", "label_positions", "targets", "target_rows"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(moved, name).device.type == "meta"
    assert moved.attention_mask is not None
    assert moved.attention_mask.device.type == "meta"
    assert (moved.n_rows, moved.n_tokens) == (2, 6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_of_each_row_alone(tmp_path: Path, attention: str) -> None:
    tiny_tokenizer(tmp_path / "model")
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "cat?"},
        {"role": "assistant", "content": "the mat"},
    ]
    rows = tokenised(
        tmp_path,
        [{"text": "the cat sat"}, {"prompt": "dog:", "completion": " log"}, {"messages": chat}],
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    models: Any = AutoModelForCausalLM  # untyped upstream
    model = models.from_config(config, attn_implementation=attention)

    def losses(ids: list[int], packing: bool) -> list[float]:
        batch = pack(rows, np.array(ids), packing=packing)
        with torch.no_grad():
            logits = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            ).logits
        picked = logits.flatten(0, 1)[batch.label_positions]
        each = functional.cross_entropy(picked, batch.targets, reduction="none")
        sums = torch.zeros(batch.n_rows).index_add_(0, batch.target_rows, each)
        return [float(value) for value in sums]

    alone = [losses([row], packing=False)[0] for row in range(3)]
    assert losses([0, 1, 2], packing=True) == pytest.approx(alone, rel=1e-5)
    assert losses([0, 1, 2], packing=False) == pytest.approx(alone, rel=1e-5)
