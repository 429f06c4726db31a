"""Rows of the forms that people have: Alpaca, ShareGPT, OpenAI, and columns of any name."""

import json
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import DataError
from peft_dist.data.rows import BadRows, ChatRow, CompletionRow, LabelledRow, Row, Task, read_rows
from peft_dist.data.sources import open_source
from tests.tiny import write_jsonl

ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}


def read(
    folder: Path,
    *rows: dict[str, Any],
    columns: dict[str, str] | None = None,
    task: Task = "causal-lm",
    as_chat: bool = True,
) -> list[Row]:
    path = write_jsonl(folder / "rows.jsonl", rows)
    source = open_source(str(path), split="train", field="data.train", columns=columns)
    return list(read_rows(source, task=task, bad=BadRows(source, 0), as_chat=as_chat))


def turns(row: Row) -> list[tuple[str, str]]:
    assert isinstance(row, ChatRow)
    return [(turn["role"], turn["content"]) for turn in row.messages]


def error_of(folder: Path, *rows: dict[str, Any], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(folder, *rows, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_alpaca_is_a_turn_of_each_with_the_input_under_the_instruction(tmp_path: Path) -> None:
    whole = {**ALPACA, "text": "Stanford's file has the whole prompt once more"}
    bare = {"instruction": "Hi", "input": "", "output": "yo"}
    told = {
        **bare,
        "input": None,
        "system": "Be brief.",
        "history": [["a", "b"]],
    }
    rows = read(tmp_path, whole, bare, told)
    assert turns(rows[0]) == [("user", "Add.\n\n2 and 2"), ("assistant", "4")]
    assert turns(rows[1]) == [("user", "Hi"), ("assistant", "yo")]
    assert turns(rows[2]) == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Hi"),
        ("assistant", "yo"),
    ]


def test_alpaca_without_a_chat_template_is_alpacas_own_prompt(tmp_path: Path) -> None:
    (row,) = read(tmp_path, ALPACA, as_chat=False)
    assert isinstance(row, CompletionRow)
    assert row.completion == "4"
    assert row.prompt.startswith("Below is an instruction that describes a task, paired with")
    assert row.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n")
    (row,) = read(tmp_path, {**ALPACA, "input": ""}, as_chat=False)
    assert isinstance(row, CompletionRow)
    assert "Input" not in row.prompt
    assert "paired" not in row.prompt


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_sharegpt_names_become_roles(tmp_path: Path, key: str) -> None:
    spoken = [("system", "s"), ("human", "q"), ("gpt", "a"), ("tool", "t"), ("assistant", "b")]
    row = {key: [{"from": name, "value": text} for name, text in spoken]}
    roles = ["system", "user", "assistant", "tool", "assistant"]
    assert turns(read(tmp_path, row)[0]) == [
        (role, text) for role, (_, text) in zip(roles, spoken, strict=True)
    ]
    row = {key: row[key][1:3], "system": "beside"}
    assert turns(read(tmp_path, row)[0])[0] == ("system", "beside")


def test_a_speaker_that_nobody_knows_is_a_bad_row(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "narrator", "value": "x"}]}
    assert "messages[0].from is 'narrator'; known: system, human" in error_of(tmp_path, row)


def test_openai_roles_under_conversations_are_read(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert turns(read(tmp_path, {"conversations": said})[0]) == [("user", "q"), ("assistant", "a")]


def test_columns_name_any_key_and_choose_the_form(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "a", "text": "not meant", "messages": []}
    mapped = {"prompt": "question", "completion": "answer"}
    assert read(tmp_path, row, columns=mapped) == [CompletionRow(1, "q", "a")]
    row = {"prompt": "q", "response": "a", "instruction": "x", "output": "y"}
    assert read(tmp_path, row, columns={"completion": "response"}) == [CompletionRow(1, "q", "a")]
    spoken = {"dialog": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    (chat,) = read(tmp_path, spoken, columns={"messages": "dialog"})
    assert turns(chat) == [("user", "q"), ("assistant", "a")]
    row = {"sentence": "s", "class": 3, "label": 9}
    labelled = {"text": "sentence", "label": "class"}
    assert read(tmp_path, row, columns=labelled, task="sequence-classification") == [
        LabelledRow(1, "s", "3")
    ]


def test_a_column_that_a_row_lacks_is_named_with_the_keys_there_are(tmp_path: Path) -> None:
    error = error_of(tmp_path, {"q": "x"}, columns={"prompt": "question"})
    assert "has no 'question', which data.columns names for prompt; its keys: 'q'" in error


@pytest.mark.parametrize(
    ("row", "why", "remedy"),
    [
        (
            {"question": "q", "answer": "a"},
            "is of no known form; its keys: 'question', 'answer'",
            "as data.columns: {prompt: question, completion: answer}",
        ),
        ({"dialogue": []}, "no known form", "as data.columns: {messages: dialogue}"),
        ({"prompt": "q", "response": "a"}, "has no completion", "{completion: response}"),
        ({"sentence": "a"}, "its keys: 'sentence'", "{text: sentence}"),
        ({"x": "a"}, "its keys: 'x'", "{prompt: KEY, completion: KEY} or {text: KEY}"),
        ({}, "its keys: none", "{prompt: KEY, completion: KEY} or {text: KEY}"),
    ],
)
def test_the_remedy_of_an_unknown_form_is_data_columns(
    tmp_path: Path, row: dict[str, Any], why: str, remedy: str
) -> None:
    error = error_of(tmp_path, row)
    assert error.startswith(f"{tmp_path}/rows.jsonl:1: ")
    assert why in error
    assert error.endswith(remedy)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({**ALPACA, "instruction": ""}, "instruction is empty"),
        ({**ALPACA, "input": 3}, "input is 3, not text"),
        ({**ALPACA, "history": ["a"]}, "history is ['a'], not a list of pairs"),
        ({**ALPACA, "output": ""}, "messages[1].content is empty"),
        ({"conversations": [{"from": "gpt"}]}, "has no messages[0].value"),
    ],
)
def test_a_bad_row_of_a_known_form_is_named(tmp_path: Path, row: dict[str, Any], why: str) -> None:
    assert why in error_of(tmp_path, row)


@pytest.mark.parametrize("rows", ['[{"text": "a"}]', '[\n{"text": "a"},\n{"text": "b"}\n]'])
def test_a_json_list_named_jsonl_is_told_its_right_name(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows)
    source = open_source(str(path), split="train", field="data.train")
    with pytest.raises(DataError, match=r"not one object a line; name it rows\.json$"):
        list(source.records())
    path.rename(tmp_path / "rows.json")  # the remedy helps
    source = open_source(str(tmp_path / "rows.json"), split="train", field="data.train")
    assert len(list(source.records())) == len(json.loads(rows))


def test_all_bad_rows_are_counted_and_the_first_few_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a"}, *[{"text": at} for at in range(6)]]
    error = error_of(tmp_path, *rows)
    assert error.startswith(
        f"{tmp_path}/rows.jsonl:2: text is 0, not text (first of 6 bad rows; "
        "line 3: text is 1, not text; line 4: text is 2, not text; line 5: text is 3, not text; "
        "...); fix the row"
    )
