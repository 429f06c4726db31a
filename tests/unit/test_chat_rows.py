"""Conversations: every key with a meaning is honoured or refused, and none is dropped."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from peft_dist.data.bad_row import BadRow
from peft_dist.data.chat_rows import REFUSED_IN_MESSAGE, REFUSED_IN_ROW, WEIGHTS, ChatRow
from peft_dist.data.rows import BadRows, parse_row, read_rows
from peft_dist.data.sources import open_source

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yo"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["a", None]}}}


def chat(*messages: Any, **beside: Any) -> ChatRow:
    row = parse_row(1, {"messages": list(messages), **beside}, "causal-lm")
    assert isinstance(row, ChatRow)
    return row


def refusal(*messages: Any, **beside: Any) -> str:
    with pytest.raises(BadRow) as caught:
        chat(*messages, **beside)
    return str(caught.value)


def test_keys_of_messages_go_to_the_template_but_weights_and_nothing_do_not() -> None:
    calls = [{"function": {"name": "f", "arguments": '{"a": null}'}}]
    row = chat(
        {**USER, "name": "ann", "weight": None, "images": [], "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": calls, "weight": 0},
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {**ASSISTANT, "reasoning_content": "so", "weight": 1, "id": 3},
        id=7,
        tools="[]",
        images=None,
    )
    assert row.messages == (
        {**USER, "name": "ann"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {**ASSISTANT, "reasoning_content": "so", "id": 3},
    )
    assert row.trained == (3,)
    assert row.options == {}


def test_what_stands_beside_the_messages_goes_to_the_template() -> None:
    row = chat(USER, ASSISTANT, tools=[TOOL], chat_template_kwargs={"enable_thinking": False})
    assert row.options == {"tools": [TOOL], "enable_thinking": False}


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("weight", [0, False, 0.0])
def test_a_turn_of_weight_0_is_not_trained_whatever_the_key_is_called(
    key: str, weight: Any
) -> None:
    row = chat({**USER, key: weight}, {**ASSISTANT, key: weight}, USER, {**ASSISTANT, key: 1})
    assert row.trained == (3,)
    assert row.messages == (USER, ASSISTANT, USER, ASSISTANT)


@pytest.mark.parametrize("key", REFUSED_IN_ROW)
def test_a_row_with_more_than_can_be_honoured_is_refused(key: str) -> None:
    assert f"{key} is not supported" in refusal(USER, ASSISTANT, **{key: ["x"]})


@pytest.mark.parametrize("key", REFUSED_IN_MESSAGE)
def test_a_message_with_more_than_can_be_honoured_is_refused(key: str) -> None:
    assert f"messages[1].{key} is not supported" in refusal(USER, {**ASSISTANT, key: ["x"]})


@pytest.mark.parametrize(
    ("messages", "beside", "why"),
    [
        ([USER, {**ASSISTANT, "weight": 0.5}], {}, "messages[1].weight is 0.5; only 0"),
        ([USER, {**ASSISTANT, "weight": "0"}], {}, "messages[1].weight is '0'; only 0"),
        ([{**USER, "train": True}, ASSISTANT], {}, "only turns of role assistant are trained"),
        ([USER, {**ASSISTANT, "weight": 0, "train": 1}], {}, "weight and train, which differ"),
        ([USER, {**ASSISTANT, "weight": 0}], {}, "has the weight 0, so there is nothing to train"),
        ([USER, {**ASSISTANT, "tool_calls": "f()"}], {}, "messages[1].tool_calls is 'f()', not"),
        (
            [USER, {**ASSISTANT, "tool_calls": [{"function": {"arguments": "{"}}]}],
            {},
            "messages[1].tool_calls[0].function.arguments is '{', which is not JSON",
        ),
        ([USER, {**ASSISTANT, "name": "\ud800"}], {}, "messages[1] has broken UTF-8"),
        ([USER, ASSISTANT], {"tools": "no"}, "tools is 'no', which is not JSON"),
        ([USER, ASSISTANT], {"tools": ["no"]}, "tools is ['no'], not a list of objects"),
        ([USER, ASSISTANT], {"chat_template_kwargs": [1]}, "chat_template_kwargs is [1], not an"),
        (
            [USER, ASSISTANT],
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "chat_template_kwargs.add_generation_prompt is not a variable",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT],
            {},
            "messages[0].content[0] is of type image_url; only text is supported",
        ),
        (
            [{"role": "user", "content": ["x"]}, ASSISTANT],
            {},
            "messages[0].content[0] is 'x'; only text",
        ),
    ],
)
def test_a_conversation_that_cannot_be_honoured_is_refused(
    messages: list[Any], beside: dict[str, Any], why: str
) -> None:
    assert why in refusal(*messages, **beside)


def test_content_in_parts_of_text_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat({"role": "user", "content": parts}, ASSISTANT).messages[0]["content"] == "a\nb"


def test_columnar_files_give_the_same_rows_without_the_nulls_they_fill_in(tmp_path: Path) -> None:
    values = [
        {"messages": [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT], "tools": None},
        {
            "messages": [
                USER,
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "1", "name": "f"},
                ASSISTANT,
            ],
            "tools": [{"function": {"name": "f", "parameters": {"type": "object"}}}],
        },
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    source = open_source(str(path), split="train", field="data.train")
    read = list(read_rows(source, task="causal-lm", bad=BadRows(source, 0)))
    assert read == [parse_row(at, value, "causal-lm") for at, value in enumerate(values, start=1)]
