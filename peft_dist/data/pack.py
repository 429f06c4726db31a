"""One micro-batch as tensors: rows end to end without padding, or side by side with it.

Both say the same about every row: the same targets, the same positions. Rows are not chosen here
(see `order.py`), and no loss is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peft_dist.data.token_cache import TokenizedRows

DUMMY_TOKENS = 8
"""Length of the stand-in for an empty micro-batch: short, since its result is thrown away."""


class Everyone(NamedTuple):
    """Positions of the micro-batches that all processes compute at the same time."""

    most: int
    """B * T of the largest."""
    of_step: int
    """The sum of it over the micro-batches of a step."""
    most_targets: int
    """N of the one that has most."""
    targets_of_step: int
    """The sum of it over the micro-batches of a step."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences of T tokens with N trained predictions."""

    input_ids: Tensor
    """int64 [B, T]; B is 1 when packed."""
    position_ids: Tensor
    """int64 [B, T]; restarts at 0 with every row."""
    attention_mask: Tensor | None
    """bool [B, T], true for real tokens. None when packed: transformers finds the rows by their
    positions then, and any mask would let them attend to each other."""
    label_positions: Tensor
    """int64 [N] flat index into [B * T] of the position that predicts `targets[i]`; empty for
    classification."""
    targets: Tensor
    """int64 [N] token ids; or class ids, one per row."""
    target_rows: Tensor
    """int64 [N] which row of the micro-batch `targets[i]` belongs to."""
    n_rows: int
    """Real rows; 0 for the stand-in of an empty micro-batch."""
    n_tokens: int
    """Real tokens, padding excluded."""
    row_lengths: tuple[int, ...] | None
    """Tokens of each row where they lie end to end, on the host; None when padded."""
    row_bounds: Tensor | None
    """int32 [rows + 1] where each packed row begins, and the end; None when padded."""
    virtual_positions: Tensor | None = None
    """int64 [rows * P] flat index into [B * T] of the positions of learned embeddings, row by
    row, in front of its tokens; None where there are none."""
    everyone: Everyone | None = None
    """The same on every process, so that they can exchange rows of known sizes; None where they
    do not know it of each other."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the host does not wait for the copy."""
        return self._mapped(lambda tensor: to_device(tensor, device))

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        mask = self.attention_mask
        return Batch(
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            attention_mask=None if mask is None else change(mask),
            label_positions=change(self.label_positions),
            targets=change(self.targets),
            target_rows=change(self.target_rows),
            n_rows=self.n_rows,
            n_tokens=self.n_tokens,
            row_lengths=self.row_lengths,
            row_bounds=None if self.row_bounds is None else change(self.row_bounds),
            virtual_positions=None
            if self.virtual_positions is None
            else change(self.virtual_positions),
            everyone=self.everyone,
        )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on a device, by way of page-locked memory: other copies to a GPU wait.

    torch reuses that memory no sooner than the copy is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def unlabelled(ids: Sequence[int]) -> Batch:
    """Return one row of tokens with nothing to predict, for a pass that only reads."""
    nothing = torch.empty(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.tensor([list(ids)]),
        position_ids=torch.arange(len(ids))[None],
        attention_mask=None,
        label_positions=nothing,
        targets=nothing,
        target_rows=nothing,
        n_rows=0,
        n_tokens=0,
        row_lengths=(len(ids),),
        row_bounds=torch.tensor([0, len(ids)], dtype=torch.int32),
    )


def positions_of(
    rows: TokenizedRows, ids: NDArray[np.int64], *, packing: bool, virtual_tokens: int = 0
) -> int:
    """Return B * T of what `pack` makes of the rows `ids`."""
    taken = _lengths(rows, ids) + virtual_tokens
    return int(taken.sum() if packing else len(taken) * taken.max())


def targets_of(rows: TokenizedRows, ids: NDArray[np.int64]) -> int:
    """Return N of what `pack` makes of the rows `ids` of a language model."""
    begins, ends = rows.offsets[ids] + 1, rows.offsets[ids + 1]
    return sum(
        int(np.count_nonzero(rows.trained[begin:end]))
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
    )


def everyone_of(
    rows: TokenizedRows,
    shares: Sequence[Sequence[NDArray[np.int64]]],
    *,
    packing: bool,
    virtual_tokens: int = 0,
) -> list[Everyone]:
    """Return what `pack` is told of each micro-batch, of row ids by process and micro-batch."""

    def size(ids: NDArray[np.int64]) -> int:
        return positions_of(rows, ids, packing=packing, virtual_tokens=virtual_tokens)

    together = [*zip(*shares, strict=True)]
    most = [max(map(size, of_all)) for of_all in together]
    targets = [max(targets_of(rows, ids) for ids in of_all) for of_all in together]
    return [
        Everyone(positions, sum(most), labelled, sum(targets))
        for positions, labelled in zip(most, targets, strict=True)
    ]


def _lengths(rows: TokenizedRows, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the tokens of each row, or of the stand-in for none."""
    at = ids if len(ids) else np.zeros(1, dtype=np.int64)
    lengths: NDArray[np.int64] = rows.offsets[at + 1] - rows.offsets[at]
    return lengths if len(ids) else lengths.clip(max=DUMMY_TOKENS)


def pack(
    rows: TokenizedRows,
    ids: NDArray[np.int64],
    *,
    packing: bool,
    pad_id: int | None = None,
    virtual_tokens: int = 0,
    everyone: Everyone | None = None,
) -> Batch:
    """Return the rows `ids` as one micro-batch.

    An empty `ids` gives some tokens with nothing to predict, so that a rank without rows still
    runs the collectives that the others wait for.

    Args:
        rows: All rows.
        ids: [n] row ids of the micro-batch.
        packing: Lay rows end to end instead of padding them to the longest.
        pad_id: What to pad with. Default: as the tokenizer says.
        virtual_tokens: Places P to keep free in front of every row.
        everyone: See `Batch`.
    """
    n_rows = len(ids)
    at = ids if n_rows else np.zeros(1, dtype=np.int64)
    begins, lengths = rows.offsets[at], _lengths(rows, ids)

    # one entry per token: its row in the micro-batch, offset in its tokens, and index in the data
    row = np.repeat(np.arange(len(at)), lengths)
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = begins[row] + offset
    tokens = rows.tokens[source].astype(np.int64)

    taken = lengths + virtual_tokens  # positions of each row
    shape = (1, int(taken.sum())) if packing else (len(at), int(taken.max()))
    first = np.cumsum(taken) - taken if packing else np.arange(len(at)) * shape[1]
    flat = first[row] + virtual_tokens + offset
    virtual = (first[:, None] + np.arange(virtual_tokens)).reshape(-1)
    padding = rows.pad_id if pad_id is None else pad_id
    input_ids = np.full(shape[0] * shape[1], padding, dtype=np.int64)
    input_ids[flat] = tokens
    if packing:
        positions, mask = np.arange(shape[1]) - np.repeat(first, taken), None
    else:
        positions = np.tile(np.arange(shape[1]), shape[0])
        mask = np.zeros(shape[0] * shape[1], dtype=np.bool_)
        mask[flat] = mask[virtual] = True

    if not n_rows:
        label_positions = targets = target_rows = np.empty(0, dtype=np.int64)
    elif rows.class_ids is not None:
        label_positions = np.empty(0, dtype=np.int64)
        targets, target_rows = rows.class_ids[at].astype(np.int64), np.arange(n_rows)
    else:
        # the first token of a row has no token before it that could predict it
        predicted = np.flatnonzero(rows.trained[source] & (offset > 0))
        label_positions = flat[predicted] - 1
        targets, target_rows = tokens[predicted], row[predicted]
    return Batch(
        input_ids=torch.from_numpy(input_ids.reshape(shape)),
        position_ids=torch.from_numpy(positions.reshape(shape)),
        attention_mask=None if mask is None else torch.from_numpy(mask.reshape(shape)),
        label_positions=torch.from_numpy(label_positions),
        targets=torch.from_numpy(targets),
        target_rows=torch.from_numpy(target_rows),
        n_rows=n_rows,
        n_tokens=len(tokens) if n_rows else 0,
        row_lengths=tuple(taken.tolist()) if packing else None,
        row_bounds=torch.from_numpy(np.concatenate(([0], np.cumsum(taken))).astype(np.int32))
        if packing
        else None,
        virtual_positions=torch.from_numpy(virtual) if virtual_tokens else None,
        everyone=everyone,
    )
