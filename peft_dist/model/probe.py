"""The made-up rows that a proof compares losses of.

They are the beginnings of sequences of one length: of these transformers needs no mask, and of what
it makes of them a row's tokens are the first, as nothing sees what comes later.
"""

from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel

from peft_dist.data.token_cache import TokenizedRows
from peft_dist.model.architectures import pad_id

ROW_TOKENS = (15, 3, 24)
"""Tokens of each row."""
SAME_TOKENS = 10
"""Tokens with which the first row and the last begin, and after which they differ."""
_MOST_TOKENS = 4096


def probe_rows(
    bare: PreTrainedModel, *, whole: bool = False, classified: bool = False
) -> TokenizedRows:
    """Return made-up rows of ordinary tokens.

    Args:
        bare: The model.
        whole: Return the sequences that the rows begin, each of as many tokens as the longest.
        classified: Let each row have a class, the first, and no token to predict.
    """
    config = bare.config.get_text_config()
    vocabulary: int = config.vocab_size
    special = {
        value
        for one in (config, bare.config)
        for name, value in one.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ordinary = np.array([i for i in range(min(vocabulary, _MOST_TOKENS)) if i not in special])
    count, longest = len(ROW_TOKENS), max(ROW_TOKENS)
    sequences = np.random.default_rng(0).choice(ordinary, (count, longest)).astype(np.int32)
    sequences[0, :SAME_TOKENS] = sequences[-1, :SAME_TOKENS]
    lengths = [longest] * count if whole else ROW_TOKENS
    padding = pad_id(bare.config) if classified else None
    tokens = np.concatenate([one[:n] for one, n in zip(sequences, lengths, strict=True)])
    return TokenizedRows(
        tokens=tokens,
        trained=np.ones(len(tokens), dtype=np.bool_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        class_ids=np.zeros(count, dtype=np.int32) if classified else None,
        label_names=(),
        pad_id=int(ordinary[0]) if padding is None else padding,
        sources=(),
        fingerprint="",
    )


def cut(rows: TokenizedRows, row: int, length: int) -> TokenizedRows:
    """Return the first tokens of one row, alone."""
    part = slice(rows.offsets[row], rows.offsets[row] + length)
    return replace(
        rows,
        tokens=rows.tokens[part],
        trained=rows.trained[part],
        offsets=np.array([0, length], dtype=np.int64),
    )
