"""A row that is too long to be one is named by its line, and not read into memory."""

import csv
import json
import resource
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from peft_dist.data.record import LONGEST_ROW
from peft_dist.data.rows import BadRows, TextRow, read_rows
from peft_dist.data.sources import open_source

WHY = "the row is longer than 20,000,000 bytes"
GOOD: dict[str, Any] = {"text": "good"}
LONG: dict[str, Any] = {"text": "x" * (LONGEST_ROW + 1)}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        case ".json":
            texts = ",\n".join(json.dumps(row) for row in rows)
            path.write_text(f"[{texts}]", encoding="utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["text"], *([row["text"]] for row in rows)])
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("kind", "line", "why"),
    [
        (".jsonl", 2, WHY),
        (".json", 2, WHY),
        (".csv", 3, "invalid CSV: field larger than field limit (20000000)"),
        (".parquet", 2, WHY),
    ],
)
def test_a_row_that_is_too_long_is_named_and_the_others_are_read(
    tmp_path: Path, kind: str, line: int, why: str
) -> None:
    path = write(tmp_path / f"rows{kind}", [GOOD, LONG, GOOD])
    source = open_source(str(path), split="train", field="data.train")
    bad = BadRows(source, 1)
    assert list(read_rows(source, task="causal-lm", bad=bad)) == [
        TextRow(line - 1, "good"),
        TextRow(line + 1, "good"),
    ]
    assert bad.reports() == (f"{path}:{line}: {why}",)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_line_of_just_the_limit_is_a_row(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"text": "x" * (LONGEST_ROW - len('{"text": ""}'))}).encode()
    assert len(row) == LONGEST_ROW
    path.write_bytes(row + end)
    source = open_source(str(path), split="train", field="data.train")
    bad = BadRows(source, 0)
    if end == b"\r\n":  # its end counts
        path.write_bytes(row[:-3] + b'"}' + end)
    assert len(list(read_rows(source, task="causal-lm", bad=bad))) == 1


@pytest.mark.slow
def test_a_line_of_a_gigabyte_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a hole: one line of NULs
        file.seek(0, 2)
        file.write(b'\n{"text": "good"}\n')
    source = open_source(str(path), split="train", field="data.train")
    bad = BadRows(source, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert list(read_rows(source, task="causal-lm", bad=bad)) == [TextRow(2, "good")]
    assert bad.reports() == (f"{path}:1: {WHY}",)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 << 10, f"{grown >> 10} MiB more"
