"""What the model makes of each row before it learns: the reference of DPO, IPO and KTO.

The reference is the model as training starts, its adapter included. It is scored by all processes
in the sharded model itself, so no second model is ever loaded, and kept in a cache under a hash of
all that it depends on. What was scored before an interruption is read again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_dist.common.atomic import replace_file
from peft_dist.common.screen import wait
from peft_dist.data.order import assign
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.collectives import broadcast_object, first_of_all, sum_over
from peft_dist.model.architectures import bare_model
from peft_dist.model.loss import Losses
from peft_dist.model_setup import ModelSetup
from peft_dist.objective.passes import Scores, row_scores

log = logging.getLogger(__name__)

FORMAT = 1
"""Raise this whenever the same rows would get other scores or another file."""
ROWS_PER_FILE = 1024
"""Rows that are scored again at most after an interruption."""
_NO_MATTER = ("_name_or_path", "transformers_version", "_attn_implementation_autoset")
"""What a model's configuration holds besides what it computes."""


def reference_scores(
    setup: ModelSetup,
    rows: TokenizedRows,
    cache: Path,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Scores:
    """Return the log-likelihood of each row's trained tokens, float32 [n_rows]. Collective.

    Call it while the adapter is as training starts it.

    Args:
        setup: The model.
        rows: What to score.
        cache: Folder in which scores are kept; rank 0 alone uses it.
        on_batch: Called before every micro-batch.
    """
    started = time.monotonic()
    key, main = _key(setup, rows), setup.world.is_main
    starts = range(0, rows.n_rows, ROWS_PER_FILE)
    scores = torch.zeros(rows.n_rows, dtype=torch.float64, device=setup.world.device)
    missing: list[int] = []
    for start in starts if main else ():
        stop = min(start + ROWS_PER_FILE, rows.n_rows)
        found = _read(cache / key / f"{start}.json", stop - start)
        if found is None:
            missing.append(start)
        else:
            scores[start:stop] = torch.tensor(found, dtype=torch.float64)
    missing = broadcast_object(missing)
    todo = [np.arange(start, min(start + ROWS_PER_FILE, rows.n_rows)) for start in missing]
    with wait("scoring the reference", total=sum(map(len, todo)), unit="answers") as bar:
        for ids in todo:
            part = _score(setup, rows, ids, on_batch)
            scores[ids[0] : ids[-1] + 1] = part
            if main:
                _write(cache / key / f"{ids[0]}.json", part.tolist())
            bar.advance(len(ids))
    how = "scored" if missing else "read from the cache"
    log.info("reference: %d answers %s  %.1f s", rows.n_rows, how, time.monotonic() - started)
    result: Scores = first_of_all(scores).cpu().numpy().astype(np.float32)
    return result


def _score(
    setup: ModelSetup,
    rows: TokenizedRows,
    ids: "np.ndarray[Any, Any]",
    on_batch: Callable[[], None],
) -> torch.Tensor:
    """Return the scores of these rows, which are side by side, float64. Collective."""
    device = setup.world.device
    groups = assign(
        ids,
        rows.lengths,
        world_size=setup.world.size,
        micro_batch_size=setup.recipe.evaluate.micro_batch_size,
    )[setup.world.rank]
    scores = torch.zeros(len(ids), dtype=torch.float64, device=device)
    was_training = setup.model.training
    setup.model.eval()
    try:
        with torch.no_grad(), setup.autocast():
            for micro in groups:
                on_batch()
                batch = setup.pack(rows, micro).to(device)
                losses: Losses = setup.model(batch)
                if len(micro):
                    at = torch.from_numpy(micro - ids[0]).to(device)
                    scores[at] = row_scores(losses, batch).double()
    finally:
        setup.model.train(was_training)
    return sum_over(scores)  # every row is one process's


def _key(setup: ModelSetup, rows: TokenizedRows) -> str:
    """Return a hash of all that decides the scores."""
    adapter = hashlib.sha256()
    for name, tensor in sorted(setup.engine.adapter_state().items()):
        adapter.update(name.encode() + tensor.contiguous().numpy().tobytes())
    config = bare_model(setup.peft).config.to_dict()
    facts = {
        "format": FORMAT,
        "rows": [rows.fingerprint, rows.n_rows],
        "base": setup.base_fingerprint,
        "config": {name: value for name, value in config.items() if name not in _NO_MATTER},
        "method": setup.recipe.method.model_dump(mode="json", exclude={"start_from"}),
        "adapter": adapter.hexdigest(),
        "dtype": str(setup.compute_dtype),
    }
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(file: Path, count: int) -> list[float] | None:
    """Return the scores in a file, or None where it is missing or damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        scores: list[float] = content["scores"]
        if content["sha256"] == _sha256(scores) and len(scores) == count:
            return scores
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(file: Path, scores: list[float]) -> None:
    """Keep scores; training goes on without them where the disk does not let us."""
    content = {"scores": scores, "sha256": _sha256(scores)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(file, json.dumps(content))
    except OSError as error:
        log.warning(
            "reference scores are not kept (%s: %s); a restart scores them again",
            file.parent,
            error.strerror or error,
        )


def _sha256(scores: list[float]) -> str:
    return hashlib.sha256(json.dumps(scores).encode()).hexdigest()
