"""Where rows come from: JSONL, JSON, CSV, Parquet, a `datasets` folder or a hub name.

Turns each of them into numbered records of plain Python values. It does not know what a row must
contain (see `rows.py`); a record that cannot be decoded is handed on as `Broken`, because only the
caller knows how many of those are allowed.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_dist.common.errors import DataError, nearest

if TYPE_CHECKING:
    import datasets
    import pyarrow

COLUMNS = ("messages", "prompt", "completion", "text", "label", "chosen", "rejected")
"""The only columns read from Parquet files and `datasets`."""
ROWS_PER_READ = 1000


@dataclass(frozen=True)
class Broken:
    """A record that could not be decoded, and why."""

    why: str


Record = tuple[int, Any]
"""Line (or row, where a format has no lines) counted from 1, and the value or a `Broken`."""


@dataclass(frozen=True)
class Source:
    """Rows with a name that errors can show and a fingerprint of their content."""

    name: str
    kind: str
    split: str
    fingerprint: str

    def records(self) -> Iterator[Record]:
        """Yield every record in file order.

        Raises:
            DataError: The file as a whole cannot be read.
        """
        try:
            match self.kind:
                case "jsonl":
                    yield from _jsonl(Path(self.name))
                case "json":
                    yield from _json(Path(self.name))
                case "csv":
                    yield from _csv(Path(self.name))
                case "parquet":
                    yield from _parquet(Path(self.name))
                case _:
                    yield from _dataset(_open_dataset(self.name, self.kind, self.split))
        except OSError as error:
            raise DataError(
                f"cannot be read: {error.strerror or error}", where=self.name
            ) from error

    def where(self, line: int) -> str:
        """Return the place of a record, for a report."""
        return f"{self.name}:{line}"


KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def open_source(name: str, *, split: str, field: str) -> Source:
    """Find out what `name` is and take the fingerprint of its content.

    Args:
        name: Path of a file or folder, else a name on the hub.
        split: Split to read of a hub dataset, or of a folder that has several.
        field: The recipe field that holds the name, for errors.

    Raises:
        DataError: There is no such thing, or it is of an unknown kind.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return Source(str(path), "folder", split, _sha256_of_folder(path))
        if path.is_file():
            kind = KINDS.get(path.suffix.lower())
            if kind is None:
                raise DataError(
                    f"{field}: unknown kind of file {path.suffix!r}",
                    where=name,
                    remedy=f"known: {', '.join(KINDS)}, or a folder saved by `datasets`",
                )
            return Source(str(path), kind, "", _sha256([path]))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error
    if path.suffix.lower() in KINDS or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"{field}: no such file or folder", where=name, remedy="fix the path")
    dataset = _open_dataset(name, "hub", split)
    return Source(name, "hub", split, str(dataset._fingerprint))


def _sha256(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _sha256_of_folder(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = "\0".join(str(path.relative_to(folder)) for path in files)
    return hashlib.sha256(f"{names}\0{_sha256(files)}".encode()).hexdigest()


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:  # bytes, so that one broken line does not hide the rest
        for line, raw in enumerate(file, start=1):
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw := raw.rstrip():
                yield line, _decode(raw)


def _decode(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"broken UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return Broken(f"invalid JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:  # digits past Python's limit, endless nesting
        return Broken(f"invalid JSON: {error}")


def _json(path: Path) -> Iterator[Record]:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):
        yield from _jsonl(path)  # many tools write JSON lines into a .json file
        return
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError("broken UTF-8", where=f"{path}:{line}", remedy="save as UTF-8") from error
    try:
        yield from _elements(text)
    except json.JSONDecodeError as error:
        raise DataError(f"invalid JSON: {error.msg}", where=f"{path}:{error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"invalid JSON: {error}", where=str(path)) from error


def _elements(text: str) -> Iterator[Record]:
    """Yield the elements of a JSON list with the line on which each begins."""
    decode = json.JSONDecoder().raw_decode
    at = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    closed = text[at : at + 1] == "]"
    while not closed:
        line, counted = line + text.count("\n", counted, at), at
        value, at = decode(text, at)
        yield line, value
        at = _skip_space(text, at)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
            at = _skip_space(text, at + 1)
    if text[at + 1 :].strip():
        raise json.JSONDecodeError("text after the list", text, at + 1)


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def _csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default ends at 128 KiB a cell
    try:
        # surrogateescape: a broken byte spoils its own row (rows.py refuses it), not the file
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            header: list[str] | None = None
            line = 1
            while True:
                try:
                    cells = next(reader, None)
                except csv.Error as error:
                    yield line, Broken(f"invalid CSV: {error}")
                    line = reader.line_num + 1
                    continue
                if cells is None:
                    return
                if header is None:
                    header = cells
                elif len(cells) > len(header):
                    yield line, Broken(f"{len(cells)} cells under a header of {len(header)}")
                elif cells:
                    yield line, dict(zip(header, cells, strict=False))
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            yield from _arrow(file.iter_batches(ROWS_PER_READ, columns=columns))
    except pyarrow.ArrowException as error:
        raise DataError(f"invalid Parquet: {error}", where=str(path)) from error


def _dataset(dataset: "datasets.Dataset") -> Iterator[Record]:
    names = [name for name in COLUMNS if name in dataset.column_names]
    classes = getattr(dataset.features.get("label"), "names", None)  # of a ClassLabel
    tables = dataset.select_columns(names).with_format("arrow").iter(ROWS_PER_READ)
    for line, value in _arrow(tables):
        if classes and isinstance(value, dict) and isinstance(value["label"], int):
            known = 0 <= value["label"] < len(classes)
            value["label"] = classes[value["label"]] if known else None
        yield line, value


def _arrow(tables: "Iterable[pyarrow.Table | pyarrow.RecordBatch]") -> Iterator[Record]:
    line = 0
    for table in tables:
        try:
            values = table.to_pylist()
        except UnicodeDecodeError:  # Arrow does not check its text: find the broken rows
            values = [_arrow_row(table.slice(row, 1)) for row in range(table.num_rows)]
        for value in values:
            line += 1
            yield line, value


def _arrow_row(table: "pyarrow.Table | pyarrow.RecordBatch") -> Any:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError:
        return Broken("broken UTF-8")


def _open_dataset(name: str, kind: str, split: str) -> "datasets.Dataset":
    """Open a folder saved by `datasets`, or load a hub dataset, and pick its split."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "the package datasets is not installed",
            where=name,
            remedy="pip install 'peft-dist[train]'",
        ) from error
    datasets.disable_progress_bars()
    if kind == "hub":
        try:
            return datasets.load_dataset(name, split=split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"neither a file here nor a dataset that the hub gives: {error}",
                where=name,
                remedy="fix the path or name, or go online",
            ) from error
    try:
        found = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"not a folder that `datasets` saved: {error}",
            where=name,
            remedy="name a file, or a folder made by Dataset.save_to_disk",
        ) from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise DataError(
            f"has no split {split!r}",
            where=name,
            remedy=f"{nearest(split, found)} (data.train_split, data.eval_split)",
        )
    return found[split]
