"""Where each row of a file begins, so that any row can be read without those before it.

An index is made once, kept in the cache, and taken for that of a file as long as its path, size
and time of change are the same. It is all that is written for rows that are streamed: 8 bytes a row
of JSONL, 8 bytes a row group of Parquet.
"""

import hashlib
import json
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peft_dist.common.atomic import whole_folder
from peft_dist.common.errors import DataError
from peft_dist.common.locks import lock_file
from peft_dist.data.record import TOO_LONG, Broken, Record, lines
from peft_dist.data.sources import Source, decode, jsonl

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

FORMAT = 1
"""Raise this whenever the same file would get another index."""
INDEXED = ("jsonl", "parquet")
"""Kinds of files that have one."""
GROUP_BYTES = 256 << 20
"""Decoded row groups of Parquet that are kept at most, besides the newest."""
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class FileIndex:
    """The rows of one file, by number from 0."""

    path: Path
    is_parquet: bool
    starts: NDArray[np.int64]
    """JSONL: [n_rows] byte at which a row begins. Parquet: [groups + 1] first row of each group,
    and the number of rows."""
    sha256: str
    """Of the file's content."""
    state: tuple[int, ...]
    """What the file system said of it then."""

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.is_parquet else len(self.starts)

    def line(self, row: int) -> int:
        """Return the line of a row, or its number from 1 where a file has no lines."""
        if self.is_parquet:
            return row + 1
        breaks, left = 0, int(self.starts[row])
        with self.path.open("rb") as file:
            while left > 0 and (block := file.read(min(left, 1 << 20))):
                breaks, left = breaks + block.count(b"\n"), left - len(block)
        return breaks + 1

    def read(self, rows: Sequence[int], wanted: Collection[str]) -> Iterator[Record]:
        """Yield some rows, which are in order, with their numbers.

        Raises:
            DataError: It is no longer the file that was indexed.
            OSError: It cannot be read.
        """
        if _state(self.path) != self.state:
            raise DataError(
                "has changed since its rows were indexed",
                where=str(self.path),
                remedy="put it back, or begin anew with `peft-dist train RECIPE --fresh`",
            )
        if self.is_parquet:
            yield from self._of_groups(np.asarray(rows, dtype=np.int64), wanted)
            return
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(int(self.starts[row]))
                _, raw = next(lines(file), (0, b""))
                if raw is None:
                    yield row, Broken(TOO_LONG)
                else:
                    raw = raw if self.starts[row] else raw.removeprefix(_MARK)
                    yield row, decode(raw.rstrip())

    def _of_groups(self, rows: NDArray[np.int64], wanted: Collection[str]) -> Iterator[Record]:
        from peft_dist.data import arrow_files

        groups = np.searchsorted(self.starts, rows, side="right") - 1
        for group in np.unique(groups).tolist():
            within = rows[groups == group]
            table = self._groups.get(group)
            if table is None:
                table = arrow_files.row_group(self.path, group, wanted, self._metadata)
                held = sum(some.nbytes for some in self._groups.values())
                if held + table.nbytes > GROUP_BYTES:
                    self._groups.clear()
                self._groups[group] = table
            records = arrow_files.table_records(table.take(within - self.starts[group]))
            for row, (_, value) in zip(within.tolist(), records, strict=True):
                yield row, value

    @cached_property
    def _metadata(self) -> "pyarrow.parquet.FileMetaData":
        """What a file says of its groups: half of the time that one takes to read."""
        from peft_dist.data import arrow_files

        return arrow_files.parquet_metadata(self.path)

    @cached_property
    def _groups(self) -> "dict[int, pyarrow.Table]":
        return {}


def index_file(path: Path, kind: str, cache_dir: Path) -> FileIndex:
    """Return the index of a file, making it first where it is not in the cache.

    Raises:
        DataError: The file is none of its kind.
        OSError: It, or the cache, cannot be used.
    """
    assert kind in INDEXED, kind
    state = _state(path)
    identity = [FORMAT, str(path.resolve()), *state]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    folder = cache_dir / "index" / key
    found = _opened(folder, path, kind, state)
    if found is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(folder.with_suffix(".lock")):
            found = _opened(folder, path, kind, state)
            if found is None:
                with whole_folder(folder, replace=True) as unfinished:
                    _write(unfinished, path, kind)
                found = _opened(folder, path, kind, state)
    assert found is not None, f"{folder} is broken right after it was written"
    return found


def _write(folder: Path, path: Path, kind: str) -> None:
    starts = _row_groups(path) if kind == "parquet" else _lines(path)
    (folder / "starts").write_bytes(starts.astype("<i8").tobytes())
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    content = {"sha256": sha256, "starts": _digest(folder / "starts")}
    (folder / "index.json").write_text(json.dumps(content), encoding="utf-8")


def _lines(path: Path) -> NDArray[np.int64]:
    next(jsonl(path), None)  # it refuses what is no file of JSON lines
    starts, begin = array("q"), 0
    with path.open("rb", buffering=1 << 20) as file:
        for line, raw in lines(file):
            text = raw.removeprefix(_MARK) if raw and line == 1 else raw
            if text is None or text.rstrip():
                starts.append(begin)
            begin = file.tell()
    return np.frombuffer(starts, dtype=np.int64) if starts else np.empty(0, dtype=np.int64)


def _row_groups(path: Path) -> NDArray[np.int64]:
    from peft_dist.data import arrow_files

    found = arrow_files.parquet_metadata(path)
    sizes = [found.row_group(at).num_rows for at in range(found.num_row_groups)]
    return np.cumsum([0, *sizes], dtype=np.int64)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: Path) -> tuple[int, ...]:
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _opened(folder: Path, path: Path, kind: str, state: tuple[int, ...]) -> FileIndex | None:
    """Open an index, or return None where it is missing or damaged."""
    try:
        content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if content["starts"] != _digest(folder / "starts"):
            return None
        sha256 = str(content["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    starts: NDArray[np.int64] = np.empty(0, dtype="<i8")
    if (folder / "starts").stat().st_size:
        starts = np.memmap(folder / "starts", dtype="<i8", mode="r")
    return FileIndex(path, kind == "parquet", starts, sha256, state)


@dataclass(frozen=True)
class IndexedSource(Source):
    """A source of files with indexes, of which any rows can be read."""

    indexes: tuple[FileIndex, ...] = ()
    rows: tuple[int, ...] = ()
    """The rows that `records` yields, in order."""

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content of all files, from when they were indexed."""
        text = "".join(index.sha256 for index in self.indexes)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """[files + 1] first row of each file, and the number of rows."""
        return np.cumsum([0, *map(len, self.indexes)], dtype=np.int64)

    @cached_property
    def _meant(self) -> range:
        count = int(self._firsts[-1])
        return range(count) if self.part is None else self.part.of(count)

    def __len__(self) -> int:
        return len(self._meant)

    def records(self) -> Iterator[Record]:
        """Yield rows by their numbers among those that are meant, from 1.

        Raises:
            DataError: A file cannot be read, or is no longer what was indexed.
        """
        begin = self._meant.start
        rows = np.array(self.rows, dtype=np.int64) + begin
        files = np.searchsorted(self._firsts, rows, side="right") - 1
        for number in np.unique(files).tolist():
            first = int(self._firsts[number])
            within = (rows[files == number] - first).tolist()
            try:
                for row, value in self.indexes[number].read(within, self.wanted):
                    yield first + row - begin + 1, value
            except OSError as error:
                raise self._cannot_read(error) from error

    def where(self, line: int) -> str:
        """Return file and line of what `records` has numbered so."""
        row = self._meant.start + line - 1
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        index = self.indexes[number]
        return f"{index.path}:{index.line(row - int(self._firsts[number]))}"


def indexed(source: Source, cache_dir: Path) -> IndexedSource:
    """Return a source with the indexes of its files, making them where they are not in the cache.

    Raises:
        DataError: It is of a kind without indexes, has no rows, or cannot be read.
    """
    if source.kind not in INDEXED:
        raise DataError(
            f"rows of {source.name} cannot be streamed: only JSONL and Parquet files can",
            where="data.streaming",
            remedy="write one of these, or remove it",
        )
    try:
        indexes = tuple(index_file(path, source.kind, cache_dir) for path in source.files)
    except OSError as error:
        raise DataError(
            f"cannot be read or indexed: {error.strerror or error}",
            where=str(error.filename or source.name),
        ) from error
    known = {item.name: getattr(source, item.name) for item in fields(source)}
    found = IndexedSource(**known, indexes=indexes)
    if not len(found):
        raise DataError("has no rows", where=source.name, remedy="add some, or name another file")
    return found
