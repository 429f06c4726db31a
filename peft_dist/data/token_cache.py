"""Tokenised rows in a memory-mapped cache, made once by whichever process comes first.

The cache is keyed by the content of the rows, the tokenizer and the options that matter, so it
is never stale; it is checked against its sha256 sums whenever it is opened. There is no pickle in
it, and no process group is needed. Which row trains when is not decided here (see `order.py`).
"""

import hashlib
import json
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_dist.common.atomic import remove_unfinished, whole_folder
from peft_dist.common.errors import DataError, RecipeError
from peft_dist.common.locks import lock_file
from peft_dist.config.recipe import Recipe
from peft_dist.data.counts import SourceRows
from peft_dist.data.encode import Encoder
from peft_dist.data.first_rows import open_row_source
from peft_dist.data.row_job import FittedRows, RowJob, split_notices
from peft_dist.data.sources import Source
from peft_dist.data.tokenized_rows import TokenizedRows as TokenizedRows

FORMAT = 2
"""Raise this whenever the same rows would become other tokens or other files."""
STALE_AFTER_S = 24 * 3600.0
"""Age past which an unfinished cache folder has no owner any more."""
FILES = {
    "tokens": np.dtype("<i4"),
    "trained": np.dtype("?"),
    "offsets": np.dtype("<i8"),
    "class_ids": np.dtype("<i8"),
    "desirable": np.dtype("?"),
}


def tokenize_rows(
    recipe: Recipe, which: Literal["train", "eval"], cache_dir: Path
) -> TokenizedRows:
    """Open the tokenised rows of a recipe, making them first where they are not cached.

    Call it before the process group exists: processes wait for each other on a file lock.

    Raises:
        DataError: The rows cannot be read, or nothing is left of them.
        ModelError: The tokenizer cannot be used.
    """
    job = row_job(recipe, which, cache_dir)
    facts = json.dumps({"format": FORMAT, **job.key()}, sort_keys=True)
    key = hashlib.sha256(facts.encode()).hexdigest()[:32]
    folder = cache_dir / key
    found = _opened(folder, job.sources)
    if found is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with lock_file(cache_dir / f"{key}.lock"):
            found = _opened(folder, job.sources)
            if found is None:
                _make(job, folder)
                found = _opened(folder, job.sources)
    except OSError as error:
        raise DataError(
            f"cannot keep tokenised rows: {error.strerror or error}",
            where=str(cache_dir),
            remedy="free space there, or make it writable",
        ) from error
    assert found is not None, f"{folder} is broken right after it was written"
    return found


def encode_completions(recipe: Recipe, texts: tuple[str, ...]) -> tuple[NDArray[np.int32], ...]:
    """Return each text as the tokens it is trained as in a completion, end token included."""
    return Encoder.of(recipe).completions(texts)


def row_job(recipe: Recipe, which: Literal["train", "eval"], cache_dir: Path) -> RowJob:
    """Return what there is to tokenise; loads the tokenizer.

    Raises:
        DataError: A source is not there.
        ModelError: The tokenizer cannot be used.
        RecipeError: `data.max_length` leaves no room.
    """
    data = recipe.data
    sources = tuple(open_row_source(some, f"data.{which}") for some in data.sources(which))
    assert sources, "the recipe has no data.eval"
    encoders = Encoder.of_all(recipe, [source.template for source in sources])
    job = RowJob(recipe, which, sources, encoders)
    if data.max_length < job.tokenizer.least_length:
        raise RecipeError(
            f"{data.max_length} leaves no room beside the tokenizer's special tokens",
            where="data.max_length",
            remedy=f"set it to {job.tokenizer.least_length} or more",
        )
    if which == "eval" and recipe.model.task == "sequence-classification":
        return replace(job, label_names=tokenize_rows(recipe, "train", cache_dir).label_names)
    return job


def _make(job: RowJob, folder: Path) -> None:
    """Write the cache, in place of a broken one if there is any."""
    # Younger ones may be the work of a node that does not share our locks.
    remove_unfinished(folder, older_than_s=STALE_AFTER_S)
    with whole_folder(folder, replace=True) as unfinished:
        _write(job, unfinished)


def _write(job: RowJob, folder: Path) -> None:
    hold_out = job.hold_out()
    found: list[FittedRows] = []
    lengths: list[int] = []
    labels: list[str] = []
    with ExitStack() as stack:
        tokens = stack.enter_context((folder / "tokens").open("wb"))
        trained = stack.enter_context((folder / "trained").open("wb"))
        for source in job.sources:
            rows = FittedRows(job, source, hold_out)
            found.append(rows)
            for row in rows:
                tokens.write(row.tokens.astype(FILES["tokens"]).tobytes())
                trained.write(row.trained.astype(FILES["trained"]).tobytes())
                lengths.append(len(row.tokens))
                if row.label is not None:
                    labels.append(row.label)
    for rows in found:
        # held-out rows may all come from one source; a source to train on must have some
        if job.which == "train" or not lengths:
            rows.require_some()
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    (folder / "offsets").write_bytes(offsets.astype(FILES["offsets"]).tobytes())
    names = job.label_names
    if job.recipe.model.task == "sequence-classification":
        names = names or _label_names(labels, job.sources)
        index = {name: class_id for class_id, name in enumerate(names)}
        class_ids = np.array([index[label] for label in labels], dtype=FILES["class_ids"])
        (folder / "class_ids").write_bytes(class_ids.tobytes())
    if job.recipe.objective.rows == "judged":
        verdicts = [verdict for rows in found for verdict in rows.verdicts]
        (folder / "desirable").write_bytes(np.array(verdicts, FILES["desirable"]).tobytes())
    content: dict[str, Any] = {
        "format": FORMAT,
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
        "label_names": names or (),
        "pad_id": job.tokenizer.pad_id,
        "sources": [
            # the cache is for these rows wherever they lie
            {
                name: value
                for name, value in asdict(rows.counts()).items()
                if name not in ("name", "shards")
            }
            for rows in found
        ],
        "notices": [*job.notices(), *split_notices(found)],
        "rows_per_example": job.recipe.rows_per_example,
    }
    sealed = {"fingerprint": _fingerprint(content), "content": content}
    (folder / "rows.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def _label_names(labels: list[str], sources: tuple[Source, ...]) -> tuple[str, ...]:
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise DataError(
            f"all rows have the label {names[0]!r}",
            where=", ".join(source.name for source in sources),
            remedy="add other classes",
        )
    return names


def _opened(folder: Path, sources: tuple[Source, ...]) -> TokenizedRows | None:
    """Open a cache, or return None where it is missing, unfinished or damaged."""
    try:
        sealed = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        content = sealed["content"]
        if sealed["fingerprint"] != _fingerprint(content):
            return None
        if any(_sha256(folder / name) != digest for name, digest in content["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    arrays: dict[str, Any] = {
        name: np.memmap(folder / name, dtype=FILES[name], mode="r") for name in content["files"]
    }
    return TokenizedRows(
        tokens=arrays["tokens"],
        trained=arrays["trained"],
        offsets=arrays["offsets"],
        class_ids=arrays.get("class_ids"),
        label_names=tuple(content["label_names"]),
        pad_id=content["pad_id"],
        sources=tuple(
            SourceRows(
                source.name,
                **counts | {"bad": tuple(map(tuple, counts["bad"])), "shards": source.shards},
            )
            for source, counts in zip(sources, content["sources"], strict=True)
        ),
        fingerprint=sealed["fingerprint"],
        notices=tuple(content["notices"]),
        rows_per_example=content["rows_per_example"],
        desirable=arrays.get("desirable"),
    )


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
