"""Tokenised rows in a memory-mapped cache, made once by whichever process comes first.

The cache is keyed by the content of the rows, the tokenizer and the options that matter, so it
is never stale; it is checked against its sha256 sums whenever it is opened. There is no pickle in
it, and no process group is needed. Which row trains when is not decided here (see `order.py`).
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_dist.common.atomic import remove_unfinished, whole_folder
from peft_dist.common.errors import DataError, RecipeError
from peft_dist.common.locks import lock_file
from peft_dist.config.recipe import Recipe
from peft_dist.data.encode import EncodedRow, Encoder, load_tokenizer
from peft_dist.data.pairs import PARSE, Group, encode_judged, encode_pairs, with_mismatched
from peft_dist.data.rows import BadRows, read_records, read_rows
from peft_dist.data.sources import Source, open_source
from peft_dist.data.tokenized_rows import TokenizedRows as TokenizedRows

FORMAT = 1
"""Raise this whenever the same rows would become other tokens or other files."""
ROWS_PER_BATCH = 1000
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
    job = _job(recipe, which, cache_dir)
    folder = cache_dir / job.key
    found = _opened(folder, job.source)
    if found is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with lock_file(cache_dir / f"{job.key}.lock"):
            found = _opened(folder, job.source)
            if found is None:
                _make(job, folder)
                found = _opened(folder, job.source)
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
    return _encoder(recipe).completions(texts)


@dataclass(frozen=True)
class _Job:
    source: Source
    encoder: Encoder
    recipe: Recipe
    label_names: tuple[str, ...] | None
    key: str


def _encoder(recipe: Recipe) -> Encoder:
    return Encoder(load_tokenizer(recipe), task=recipe.model.task, name=recipe.model.name)


def _job(recipe: Recipe, which: Literal["train", "eval"], cache_dir: Path) -> _Job:
    data, encoder = recipe.data, _encoder(recipe)
    if data.max_length < encoder.least_length:
        raise RecipeError(
            f"{data.max_length} leaves no room beside the tokenizer's special tokens",
            where="data.max_length",
            remedy=f"set it to {encoder.least_length} or more",
        )
    names: tuple[str, ...] | None = None
    if which == "train":
        source = open_source(data.train, split=data.train_split, field="data.train")
    else:
        assert data.eval is not None, "the recipe has no data.eval"
        source = open_source(data.eval, split=data.eval_split, field="data.eval")
        if recipe.model.task == "sequence-classification":
            names = tokenize_rows(recipe, "train", cache_dir).label_names
    facts: dict[str, Any] = {
        "format": FORMAT,
        "source": [source.kind, source.split, source.fingerprint],
        "tokenizer": encoder.fingerprint(),
        "task": recipe.model.task,
        "options": [data.max_length, data.truncation, data.max_bad_rows],
        "label_names": names,
    }
    if recipe.objective.rows != "single":
        facts["rows"] = recipe.objective.rows
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return _Job(source, encoder, recipe, names, key)


def _make(job: _Job, folder: Path) -> None:
    """Write the cache, in place of a broken one if there is any."""
    # Younger ones may be the work of a node that does not share our locks.
    remove_unfinished(folder, older_than_s=STALE_AFTER_S)
    with whole_folder(folder, replace=True) as unfinished:
        _write(job, unfinished)


def _write(job: _Job, folder: Path) -> None:
    bad = BadRows(job.source, job.recipe.data.max_bad_rows)
    rows = _Fitted(job, bad)
    lengths: list[int] = []
    labels: list[str] = []
    with ExitStack() as stack:
        tokens = stack.enter_context((folder / "tokens").open("wb"))
        trained = stack.enter_context((folder / "trained").open("wb"))
        for row in rows:
            tokens.write(row.tokens.astype(FILES["tokens"]).tobytes())
            trained.write(row.trained.astype(FILES["trained"]).tobytes())
            lengths.append(len(row.tokens))
            if row.label is not None:
                labels.append(row.label)
    if not lengths:
        raise DataError(
            f"no row is left to use: {rows.dropped} dropped, {len(bad.found)} malformed",
            where=job.source.name,
            remedy="see data.max_length and data.truncation",
        )
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    (folder / "offsets").write_bytes(offsets.astype(FILES["offsets"]).tobytes())
    names = job.label_names
    if job.recipe.model.task == "sequence-classification":
        names = names or _label_names(labels, job.source)
        index = {name: class_id for class_id, name in enumerate(names)}
        class_ids = np.array([index[label] for label in labels], dtype=FILES["class_ids"])
        (folder / "class_ids").write_bytes(class_ids.tobytes())
    if job.recipe.objective.rows == "judged":
        (folder / "desirable").write_bytes(np.array(rows.verdicts, FILES["desirable"]).tobytes())
    content: dict[str, Any] = {
        "format": FORMAT,
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
        "label_names": names or (),
        "pad_id": job.encoder.pad_id,
        "bad_rows": sorted(bad.found),
        "truncated_rows": rows.truncated,
        "dropped_rows": rows.dropped,
    }
    if job.recipe.objective.rows != "single":
        content["rows_per_example"] = 2
    sealed = {"fingerprint": _fingerprint(content), "content": content}
    (folder / "rows.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")


class _Fitted:
    """Rows of a job that fit `data.max_length` and have something to train, counting the rest."""

    def __init__(self, job: _Job, bad: BadRows) -> None:
        self._job, self._bad = job, bad
        self.truncated = self.dropped = 0
        self.verdicts: list[bool] = []
        """Of the judged answers that fit."""

    def __iter__(self) -> Iterator[EncodedRow]:
        max_length = self._job.recipe.data.max_length
        for group, verdict in self._groups():
            too_long = [len(row.tokens) > max_length for row in group]
            fitted = [
                self._fit(row, is_own=number == 0 or verdict is None) if long else row
                for number, (row, long) in enumerate(zip(group, too_long, strict=True))
            ]
            whole = [row for row in fitted if row is not None and _has_predictions(row)]
            if len(whole) < len(group):
                self.dropped += 1
                continue
            self.truncated += any(too_long)
            if verdict is not None:
                self.verdicts.append(verdict)
            yield from whole

    def _groups(self) -> Iterator[tuple[Group, bool | None]]:
        """Yield the rows of each example, and the verdict on it where there is one."""
        job, bad = self._job, self._bad
        form = job.recipe.objective.rows
        if form == "single":
            rows = read_rows(job.source, task=job.recipe.model.task, bad=bad)
            while batch := list(islice(rows, ROWS_PER_BATCH)):
                for row in job.encoder.encode(batch, bad):
                    if self._label_is_known(row):
                        yield (row,), None
            return
        examples = read_records(job.source, PARSE[form], bad)
        batches = iter(lambda: list(islice(examples, ROWS_PER_BATCH)), [])
        if form == "pair":
            for pairs in batches:
                yield from ((group, None) for group in encode_pairs(job.encoder, pairs, bad))
            return
        judged = (row for batch in batches for row in encode_judged(job.encoder, batch, bad))
        yield from with_mismatched(judged, job.source.name)

    def _fit(self, row: EncodedRow, *, is_own: bool) -> EncodedRow | None:
        """Return a longer row as `data.truncation` says; one that is nobody's own is always cut."""
        data = self._job.recipe.data
        match data.truncation:
            case "drop" | "error" if not is_own:
                return row.cut(max_length=data.max_length, keep="start")
            case "end":
                return row.cut(max_length=data.max_length, keep="start")
            case "start":
                return row.cut(max_length=data.max_length, keep="end")
            case "drop":
                return None
            case "error":
                raise DataError(
                    f"the row has {len(row.tokens)} tokens, data.max_length is {data.max_length}",
                    where=self._job.source.where(row.line),
                    remedy="raise data.max_length, or set data.truncation to end, start or drop",
                )

    def _label_is_known(self, row: EncodedRow) -> bool:
        names = self._job.label_names
        if names is None or row.label in names:
            return True
        self._bad.add(row.line, f"label {row.label!r} is not in data.train: {', '.join(names)}")
        return False


def _has_predictions(row: EncodedRow) -> bool:
    return len(row.tokens) > 0 if row.label is not None else bool(row.trained[1:].any())


def _label_names(labels: list[str], source: Source) -> tuple[str, ...]:
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise DataError(
            f"all rows have the label {names[0]!r}", where=source.name, remedy="add other classes"
        )
    return names


def _opened(folder: Path, source: Source) -> TokenizedRows | None:
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
        bad_rows=tuple(f"{source.where(line)}: {why}" for line, why in content["bad_rows"]),
        truncated_rows=content["truncated_rows"],
        dropped_rows=content["dropped_rows"],
        fingerprint=sealed["fingerprint"],
        rows_per_example=content.get("rows_per_example", 1),
        desirable=arrays.get("desirable"),
    )


def _fingerprint(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
