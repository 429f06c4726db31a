"""Where rows come from: JSONL, JSON, CSV, Parquet, a `datasets` folder or a hub name.

Turns each of them into numbered records of plain Python values. It does not know what a row must
contain (see `rows.py`); a record that cannot be decoded is handed on as `Broken`, because only the
caller knows how many of those are allowed. Text files are read with the standard library alone, so
that a login node can look at them; what reads the others is imported where it is needed.
"""

import csv
import glob
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from peft_dist.common.errors import DataError
from peft_dist.common.paths import files_like
from peft_dist.data.forms import COLUMNS
from peft_dist.data.record import (
    LONGEST_ROW,
    TOO_LONG,
    Broken,
    Record,
    file_and_line,
    in_file,
    lines,
)
from peft_dist.data.row_range import RowRange, parse_split
from peft_dist.data.template_file import TemplateFile


@dataclass(frozen=True)
class Source:
    """Rows with a name that errors can show and a fingerprint of their content."""

    name: str
    kind: str
    split: str = ""
    """Split of a dataset; of one on the hub with the part of it that is meant."""
    part: RowRange | None = None
    """The records that are meant; None: all."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which column holds what, where its name is not ours."""
    shards: tuple[str, ...] = ()
    """The files of a pattern, in the order of their names."""
    template: TemplateFile | None = None
    """What its conversations are rendered with; None: the tokenizer's own template."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the rows, unless they are a dataset."""
        return tuple(map(Path, self.shards or (self.name,)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content of all of it; reads a file to its end.

        Raises:
            DataError: It cannot be read.
        """
        try:
            match self.kind:
                case "hub":
                    return str(self.dataset()._fingerprint)
                case "folder":
                    return _sha256_of_folder(Path(self.name))
                case _:
                    return _sha256(self.files)
        except OSError as error:
            raise self._cannot_read(error) from error

    def records(self) -> Iterator[Record]:
        """Yield every record in file order.

        Raises:
            DataError: The file as a whole cannot be read.
        """
        try:
            if self.part is None:
                yield from self._whole()
            else:
                rows = self.part.of(self._count() if self.part.is_relative else sys.maxsize)
                yield from islice(self._whole(), rows.start, rows.stop)
        except OSError as error:
            raise self._cannot_read(error) from error

    def where(self, line: int) -> str:
        """Return the place of a record, for a report."""
        return place(line, self.name, self.shards)

    @property
    def wanted(self) -> set[str]:
        """Names of the columns that are read where there are any of them."""
        return {*COLUMNS, *self.columns.values()}

    def _whole(self) -> Iterator[Record]:
        if self.kind in ("folder", "hub"):
            from peft_dist.data import arrow_files

            yield from arrow_files.dataset_records(self.dataset(), self.wanted, self.columns)
            return
        for number, path in enumerate(self.files):
            for line, value in self._of_file(path):
                yield in_file(number, line), value

    def _of_file(self, path: Path) -> Iterator[Record]:
        match self.kind:
            case "jsonl":
                return jsonl(path)
            case "json":
                return _json(path)
            case "csv":
                return _csv(path)
        from peft_dist.data import arrow_files

        return arrow_files.parquet_records(path, self.wanted)

    def _count(self) -> int:
        return len(self.dataset()) if self.kind == "folder" else sum(1 for _ in self._whole())

    def dataset(self) -> Any:
        """Return the `datasets.Dataset` of a hub name, or of a folder.

        Raises:
            DataError: There is no such thing.
        """
        from peft_dist.data import arrow_files

        return arrow_files.open_dataset(self.name, self.kind, self.split)

    def _cannot_read(self, error: OSError) -> DataError:
        where = str(error.filename or self.name)
        return DataError(f"cannot be read: {error.strerror or error}", where=where)


def place(line: int, name: str, shards: Sequence[str]) -> str:
    """Return the place of a record, for a report: `file:line`."""
    number, line = file_and_line(line)
    return f"{shards[number] if shards else name}:{line}"


KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def open_source(
    name: str, *, split: str, field: str, columns: Mapping[str, str] | None = None
) -> Source:
    """Find out what `name` is; read nothing of it.

    Args:
        name: Path of a file or folder, a pattern of files such as `part-*.jsonl`, else a name on
            the hub.
        split: Split to read of a hub dataset, or of a folder that has several; of a file only the
            part in brackets counts, of several files together.
        field: The recipe field that holds the name, for errors.
        columns: Which column holds what, where its name is not ours.

    Raises:
        DataError: There is no such thing, or it is of an unknown kind.
    """
    path = Path(name).expanduser()
    columns = columns or {}
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=name) from error
    suffix = path.suffix.lower()
    if is_folder or is_file:
        split_name, part = parse_split(split, field=f"{field}_split")
        if is_folder:
            return Source(str(path), "folder", split_name, part, columns)
        if suffix not in KINDS:
            raise DataError(
                f"{field}: unknown kind of file {path.suffix!r}",
                where=name,
                remedy=f"known: {', '.join(KINDS)}, or a folder saved by `datasets`",
            )
        return Source(str(path), KINDS[suffix], "", part, columns)
    if glob.has_magic(name):
        _, part = parse_split(split, field=f"{field}_split")
        shards = _files_of(str(path), field)
        kind = KINDS[Path(shards[0]).suffix.lower()]
        return Source(str(path), kind, "", part, columns, shards)
    if suffix in KINDS or path.is_absolute() or name.startswith((".", "~")):
        raise DataError(f"{field}: no such file or folder", where=name, remedy="fix the path")
    return Source(name, "hub", split, None, columns)


def _files_of(pattern: str, field: str) -> tuple[str, ...]:
    """Return the files of a pattern.

    Raises:
        DataError: There are none, or none of one known kind.
    """
    found = files_like(pattern)
    if not found:
        raise DataError(f"{field}: no file is named like this", where=pattern, remedy="fix it")
    kinds = {Path(one).suffix.lower() for one in found}
    if len(kinds) > 1 or not kinds <= KINDS.keys():
        raise DataError(
            f"{field}: matches files that end in {', '.join(sorted(kinds))}",
            where=pattern,
            remedy=f"name files of one kind: {', '.join(KINDS)}",
        )
    return found


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


def jsonl(path: Path) -> Iterator[Record]:
    """Yield the records of a file of JSON lines.

    Raises:
        DataError: It is something else.
    """
    with path.open(
        "rb", buffering=1 << 20
    ) as file:  # bytes, so that one broken line does not hide the rest
        for line, raw in lines(file):
            if raw is None:
                yield line, Broken(TOO_LONG)
                continue
            if line == 1:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError("is UTF-16", where=str(path), remedy="save it as UTF-8 text")
                raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.startswith(b"["):
                    raise DataError(
                        "holds a JSON list, not one object a line",
                        where=f"{path}:1",
                        remedy=f"name it {path.stem}.json",
                    )
            if raw := raw.rstrip():
                yield line, decode(raw)


def decode(raw: bytes) -> Any:
    """Return the value that a line holds, or why there is none as a `Broken`."""
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
        yield from jsonl(path)  # many tools write JSON lines into a .json file
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
        begin = at
        value, at = decode(text, begin)
        yield line, value if at - begin <= LONGEST_ROW else Broken(TOO_LONG)
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
    limit = csv.field_size_limit(LONGEST_ROW)  # the default ends at 128 KiB a cell
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
