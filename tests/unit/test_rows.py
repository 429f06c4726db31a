"""Reading rows: every kind of source, every form of row, and every way a row can be bad."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from peft_dist.common.errors import DataError
from peft_dist.data.chat_rows import ChatRow
from peft_dist.data.rows import (
    BadRows,
    CompletionRow,
    LabelledRow,
    Row,
    Task,
    TextRow,
    read_rows,
)
from peft_dist.data.sources import open_source
from tests.tiny import write_jsonl

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
PAIRS = [{"prompt": "a\nb", "completion": " c"}, {"prompt": 'd "e", é', "completion": " f"}]
PAIR_ROWS = [CompletionRow(1, "a\nb", " c"), CompletionRow(2, 'd "e", é', " f")]


def read(
    path: Path | str, *, task: Task = "causal-lm", max_bad_rows: int = 0, split: str = "train"
) -> tuple[list[Row], tuple[str, ...]]:
    source = open_source(str(path), split=split, field="data.train")
    bad = BadRows(source, max_bad_rows)
    return list(read_rows(source, task=task, bad=bad)), bad.reports()


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_form_of_row_is_told_by_its_keys_and_other_keys_are_ignored(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"text": "a", "label": 3},
            {"prompt": "", "completion": "c", "id": "ignored"},
            {"messages": [USER, ASSISTANT], "prompt": None, "text": None, "source": "ignored"},
        ],
    )
    rows, reports = read(path)
    assert rows == [TextRow(1, "a"), CompletionRow(2, "", "c"), ChatRow(3, (USER, ASSISTANT), (1,))]
    assert reports == ()


def test_labels_may_be_texts_truth_values_or_whole_numbers(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [{"text": "a", "label": label} for label in ("x", True, 7)]
    )
    rows, _ = read(path, task="sequence-classification")
    assert rows == [LabelledRow(1, "a", "x"), LabelledRow(2, "a", "True"), LabelledRow(3, "a", "7")]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    match suffix:
        case "jsonl":
            write_jsonl(path, PAIRS)
        case "json":
            path.write_text(json.dumps(PAIRS, indent=2), encoding="utf-8")
        case "csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, ["prompt", "completion"])
                writer.writeheader()
                writer.writerows(PAIRS)
        case "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    rows, _ = read(path)
    texts = [(row.prompt, row.completion) for row in rows if isinstance(row, CompletionRow)]
    assert texts == [(row.prompt, row.completion) for row in PAIR_ROWS]


def test_a_datasets_folder_and_a_split_of_one_are_read(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(PAIRS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": dataset}).save_to_disk(tmp_path / "many")
    assert read(tmp_path / "one")[0] == PAIR_ROWS
    assert read(tmp_path / "many", split="test")[0] == PAIR_ROWS
    assert "has no split 'tset'; did you mean 'test'?" in error_of(tmp_path / "many", split="tset")


def test_class_labels_of_datasets_are_read_by_name(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features)
    dataset.save_to_disk(tmp_path / "folder")
    rows, _ = read(tmp_path / "folder", task="sequence-classification")
    assert rows == [LabelledRow(1, "a", "dog"), LabelledRow(2, "b", "cat")]


def test_a_text_with_a_label_is_what_a_classifier_reads_beside_what_is_written_on(
    tmp_path: Path,
) -> None:
    row = {"prompt": "a", "completion": "b", "text": "c", "label": "d"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert read(path)[0] == [CompletionRow(1, "a", "b")]
    assert read(path, task="sequence-classification")[0] == [LabelledRow(1, "c", "d")]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b\xe2\x80\xa8c"}')
    assert read(path)[0] == [TextRow(1, "a"), TextRow(4, "b\u2028c")]


def test_json_lines_in_a_json_file_are_read(tmp_path: Path) -> None:
    assert read(write_jsonl(tmp_path / "rows.json", PAIRS))[0] == PAIR_ROWS


def test_a_cell_longer_than_csv_allows_by_default_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"text\n{'a' * 200_000}\n", encoding="utf-8")
    limit = csv.field_size_limit()
    assert read(path)[0] == [TextRow(2, "a" * 200_000)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "a"', "invalid JSON at column 13"),
        (b'{"text": "\xff"}', "broken UTF-8 at byte 11 of the line"),
        (rb'{"text": "\ud800"}', "text has broken UTF-8 at character 1"),
        pytest.param(b"[" * 100_000, "invalid JSON", id="endless nesting"),
        pytest.param(b"1" * 10_000, "invalid JSON", id="endless number"),
        (b'["a"]', "the row is ['a'], not an object with named texts"),
        (b"null", "the row is null"),
        (b'{"text": 3}', "text is 3, not text"),
        (b'{"text": null}', "text is null"),
        (b'{"text": ""}', "text is empty"),
        (b'{"prompt": "a"}', "has no completion"),
        (b'{"completion": "a"}', "has no prompt"),
        (b'{"prompt": "a", "completion": ""}', "completion is empty"),
        (b'{"prompt": null, "completion": "a"}', "prompt is null"),
        (b'{"prompt": ["a"], "completion": "a"}', "prompt is ['a'], not text"),
        (b'{"messages": "a"}', "messages is 'a', not a list"),
        (b'{"messages": []}', "messages is empty"),
        (b'{"messages": ["a"]}', "messages[0] is 'a', not an object"),
        (b'{"messages": [{"role": "user"}]}', "has no messages[0].content"),
        (b'{"messages": [{"content": "a"}]}', "has no messages[0].role"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no turn of role assistant"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "begin with a system or user"),
        (
            b'{"messages": [{"role": "user", "content": "a"},'
            b' {"role": "assistant", "content": ""}]}',
            "messages[1].content is empty",
        ),
        (b'{"messages": [], "text": "a"}', "has messages and also text; keep one of them"),
        (b'{"messages": [{}], "prompt": "a"}', "has messages and also prompt; keep one of them"),
        (b'{"text": "a", "tools": [{}]}', "has tools but no messages"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    error = error_of(path)
    assert error.startswith(f"{path}:2: ")
    assert why in error
    assert error.endswith("fix the row, or raise data.max_bad_rows above 0 to leave such out")
    rows, reports = read(path, max_bad_rows=1)
    assert rows == [TextRow(1, "a"), TextRow(3, "b")]
    assert len(reports) == 1
    assert reports[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "a"}, "has no label"),
        ({"label": "a"}, "has no text"),
        ({"text": "a", "label": 0.5}, "label is 0.5, not text"),
        ({"text": "a", "label": None}, "label is null"),
        ({"text": "a", "label": ""}, "label is empty"),
    ],
)
def test_a_bad_labelled_row_is_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, row])
    assert error_of(path, task="sequence-classification").startswith(f"{path}:2: {why}")


def test_one_bad_row_too_many_names_the_first_of_them(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": 1}, {"text": 2}])
    error = error_of(path, max_bad_rows=1)
    assert error.startswith(f"{path}:2: text is 1, not text (first of 2 bad rows; line 3: ")
    assert "raise data.max_bad_rows above 1" in error


def test_a_json_list_gives_the_line_on_which_a_row_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"text": "a"},\n\n  {\n    "text": 3\n  }\n]\n', encoding="utf-8")
    assert error_of(path).startswith(f"{path}:4: text is 3, not text")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        (b'[\n{"text": "a"}\n{"text": "b"}]', 3, "expected ',' or ']'"),
        (b'[{"text": "a"},\n]', 2, "Expecting value"),
        (b'[{"text": "a"}', 1, "expected ',' or ']'"),
        (b'[{"text": "a"}]\n x', 1, "text after the list"),
        (b'[{"text": "a"},\n{"text": "\xff"}]', 2, "broken UTF-8"),
    ],
)
def test_a_broken_json_list_is_named_with_its_line(
    tmp_path: Path, text: bytes, line: int, why: str
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(text)
    error = error_of(path, max_bad_rows=9)
    assert error.startswith(f"{path}:{line}: ")
    assert why in error


def test_bad_rows_of_a_csv_are_named_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\na,"b\nc"\nonly\n\na,b,c\na,\n\xff,b\na,"b"c\nlast,row\n')
    rows, reports = read(path, max_bad_rows=9)
    assert rows == [CompletionRow(2, "a", "b\nc"), CompletionRow(10, "last", "row")]
    assert [report.removeprefix(f"{path}:") for report in reports] == [
        "4: has no completion",
        "6: 3 cells under a header of 2",
        "7: completion is empty",
        "8: prompt has broken UTF-8 at character 1",
        "9: invalid CSV: ',' expected after '\"'",
    ]


def test_broken_text_in_parquet_spoils_its_own_row_only(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    raw = pyarrow.array([b"a", b"\xff", None, b"b"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": raw, "other": [1, 2, 3, 4]}), path)
    rows, reports = read(path, max_bad_rows=2)
    assert rows == [TextRow(1, "a"), TextRow(4, "b")]
    assert reports == (f"{path}:2: broken UTF-8", f"{path}:3: text is null")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert error_of(path) == f"{path}: has no rows; add some, or name another file"


def test_an_empty_json_list_and_a_csv_header_alone_have_no_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text("[ ]")
    (tmp_path / "rows.csv").write_text("text\n")
    assert "has no rows" in error_of(tmp_path / "rows.json")
    assert "has no rows" in error_of(tmp_path / "rows.csv")


def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"not parquet at all")
    assert "invalid Parquet" in error_of(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("a")
    assert "unknown kind of file '.txt'; known: .jsonl" in error_of(tmp_path / "rows.txt")
    (tmp_path / "folder").mkdir()
    assert "not a folder that `datasets` saved" in error_of(tmp_path / "folder")


def test_a_missing_file_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    assert error_of(path) == f"{path}: data.train: no such file or folder; fix the path"
    assert "no such file or folder" in error_of("rows/none.csv")


def test_a_hub_name_without_a_network_is_one_line(tmp_path: Path) -> None:
    code = (
        "from peft_dist.data.sources import open_source\n"
        "from peft_dist.common.errors import DataError\n"
        "try: open_source('nobody/no', split='train', field='data.train').fingerprint\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.count("\n") == 1
    assert done.stdout.startswith("nobody/no: neither a file here nor a dataset that the hub")


def test_equal_content_has_one_fingerprint_wherever_it_lies(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    second = write_jsonl(tmp_path / "b.jsonl", PAIRS)
    other = write_jsonl(tmp_path / "c.jsonl", PAIRS[:1])
    prints = [
        open_source(str(path), split="train", field="data.train").fingerprint
        for path in (first, second, other)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_reading_rows_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, peft_dist.data.rows\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60, check=True
    )
