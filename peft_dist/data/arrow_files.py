"""Rows of Parquet files, `datasets` folders and hub datasets: Arrow tables to plain values.

Apart from `sources.py` because these need pyarrow and `datasets`, which only a process that trains
has for sure.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_dist.common.errors import DataError, nearest
from peft_dist.common.sharing import users_umask
from peft_dist.data.record import Broken, Record

if TYPE_CHECKING:
    import datasets
    import pyarrow
    import pyarrow.parquet

ROWS_PER_READ = 1000


def parquet_records(path: Path, wanted: Collection[str]) -> Iterator[Record]:
    """Yield the rows of a Parquet file: their `wanted` columns, or all where it has none of them.

    Raises:
        DataError: It is no Parquet file.
    """
    with _opened(path) as file:
        columns = _chosen(file.schema_arrow.names, wanted)
        yield from _records(file.iter_batches(ROWS_PER_READ, columns=columns))


def parquet_metadata(path: Path) -> "pyarrow.parquet.FileMetaData":
    """Return what a Parquet file says of its row groups.

    Raises:
        DataError: It is no Parquet file.
    """
    with _opened(path) as file:
        return file.metadata


def row_group(
    path: Path, group: int, wanted: Collection[str], metadata: "pyarrow.parquet.FileMetaData"
) -> "pyarrow.Table":
    """Return the columns of a row group that `parquet_records` would yield.

    Raises:
        DataError: There is no such group.
    """
    with _opened(path, metadata) as file:
        columns = _chosen(file.schema_arrow.names, wanted)
        return file.read_row_group(group, columns=columns, use_threads=False)


def table_records(table: "pyarrow.Table") -> Iterator[Record]:
    """Yield the rows of a table, numbered from 1."""
    return _records([table])


@contextmanager
def _opened(
    path: Path, metadata: "pyarrow.parquet.FileMetaData | None" = None
) -> "Iterator[pyarrow.parquet.ParquetFile]":
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, metadata=metadata) as file:
            yield file
    except pyarrow.ArrowException as error:
        raise DataError(f"invalid Parquet: {error}", where=str(path)) from error


def dataset_records(
    dataset: "datasets.Dataset", wanted: Collection[str], columns: Mapping[str, str]
) -> Iterator[Record]:
    """Yield the rows of a dataset as of a Parquet file; classes by their names."""
    label = columns.get("label", "label")
    classes = getattr(dataset.features.get(label), "names", None)  # of a ClassLabel
    names = _chosen(dataset.column_names, wanted)
    tables = dataset.select_columns(names).with_format("arrow").iter(ROWS_PER_READ)
    for line, value in _records(tables):
        if classes and isinstance(value, dict) and isinstance(value.get(label), int):
            known = 0 <= value[label] < len(classes)
            value[label] = classes[value[label]] if known else None
        yield line, value


def _chosen(names: Sequence[str], wanted: Collection[str]) -> list[str]:
    """Leave out columns that nobody reads, which may hold images; but show unknown names."""
    return [name for name in names if name in wanted] or list(names)


def _records(tables: "Iterable[pyarrow.Table | pyarrow.RecordBatch]") -> Iterator[Record]:
    line = 0
    for table in tables:
        try:
            values = table.to_pylist()
        except UnicodeDecodeError:  # Arrow does not check its text: find the broken rows
            values = [_row(table.slice(row, 1)) for row in range(table.num_rows)]
        for value in values:
            line += 1
            yield line, _without_filled(value)


def _without_filled(value: Any) -> Any:
    """Take away the nulls by which Arrow gives all objects of a column the same keys."""
    if not isinstance(value, dict):
        return value
    return {key: _without_nulls(item) for key, item in value.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _row(table: "pyarrow.Table | pyarrow.RecordBatch") -> Any:
    try:
        return table.to_pylist()[0]
    except UnicodeDecodeError:
        return Broken("broken UTF-8")


def open_dataset(name: str, kind: str, split: str) -> "datasets.Dataset":
    """Open a folder saved by `datasets`, or load a hub dataset, and pick its split.

    Raises:
        DataError: There is no such dataset or split.
    """
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
            with users_umask():  # others may read the same cache
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
