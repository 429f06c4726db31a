"""Chat templates: what they leave out, how they end a turn, which day it is, and how they fail."""

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.errors import DataError, ModelError
from peft_dist.data import chat_template
from peft_dist.data.token_cache import TokenizedRows
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer, tokenised

END = "<|end|>"
USER = {"role": "user", "content": "cat?"}
ASSISTANT = {"role": "assistant", "content": "the mat"}
CHAT = [USER, ASSISTANT, {"role": "user", "content": "dog?"}, {**ASSISTANT, "content": "the log"}]
KNOWN_ROLES = """{%- for m in messages -%}
{%- if m.role == 'user' -%}Q: {{ m.content }}<|end|>{%- endif -%}
{%- if m.role == 'assistant' -%}A: {{ m.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'A: ' }}{%- endif -%}"""


def rows_of(folder: Path, template: str | None, *values: Any, **data: Any) -> TokenizedRows:
    tiny_tokenizer(folder / "model", begin=True, chat_template=template)
    return tokenised(folder, values, data=data)


def shown(folder: Path, template: str, *messages: Any, **beside: Any) -> list[str]:
    """Return what a conversation becomes, its trained parts in «»."""
    tokenizer = tiny_tokenizer(folder / "model", begin=True, chat_template=template)
    rows = tokenised(folder, [{"messages": messages, **beside}])
    texts = []
    for begin, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True):
        text, was_trained = "", False
        for token, is_trained in zip(
            [*rows.tokens[begin:end], None], [*rows.trained[begin:end], False], strict=True
        ):
            if is_trained != was_trained:
                text += "«" if is_trained else "»"
            text += "" if token is None else str(tokenizer.decode([token]))
            was_trained = is_trained
        texts.append(text)
    assert rows.stop_tokens == rows.trained_turns
    return texts


def refusal(folder: Path, template: str, *messages: Any, **beside: Any) -> str:
    with pytest.raises((DataError, ModelError)) as caught:
        rows_of(folder, template, {"messages": messages, **beside})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("role", ["system", "human", "System", "tool"])
def test_a_turn_of_a_role_that_the_template_ignores_is_refused(tmp_path: Path, role: str) -> None:
    why = refusal(tmp_path, KNOWN_ROLES, {"role": role, "content": "2+2"}, *CHAT)
    assert why.startswith(f"{tmp_path}/train.jsonl:1: the chat template of ")
    assert f"leaves out messages[0], of role {role!r}; fix the row" in why


@pytest.mark.parametrize(
    ("messages", "beside", "left_out"),
    [
        ([USER, {**ASSISTANT, "reasoning_content": "so"}], {}, "messages[1].reasoning_content"),
        ([USER, {**ASSISTANT, "thinking": "so"}], {}, "messages[1].thinking"),
        ([USER, {**ASSISTANT, "tool_calls": [{}]}], {}, "messages[1].tool_calls"),
        ([{**USER, "name": "ann"}, ASSISTANT], {}, "messages[0].name"),
        ([USER, ASSISTANT], {"tools": [{"name": "f"}]}, "tools"),
        ([USER, ASSISTANT], {"documents": [{"text": "a"}]}, "documents"),
        (
            [USER, ASSISTANT],
            {"chat_template_kwargs": {"think": True}},
            "chat_template_kwargs.think, which it does not read",
        ),
    ],
)
def test_a_key_that_changes_nothing_in_what_is_rendered_refuses_the_row(
    tmp_path: Path, messages: list[Any], beside: dict[str, Any], left_out: str
) -> None:
    why = refusal(tmp_path, KNOWN_ROLES, *messages, **beside)
    assert f" leaves out {left_out}; fix the row" in why


def test_what_the_template_reads_is_rendered(tmp_path: Path) -> None:
    template = KNOWN_ROLES.replace("{{ m.content }}", "{{ m.name }}{{ mood }} {{ m.content }}")
    template = "{%- for tool in tools or [] -%}{{ tool.name }},{%- endfor -%}" + template
    messages = [{**USER, "name": "ann"}, {**ASSISTANT, "name": "bob"}]
    beside = {"tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "!"}}
    (text,) = shown(tmp_path, template, *messages, **beside)
    assert text == "f,Q: ann! cat?<|end|>A: «bob! the mat<|end|>»"


MOVES_SYSTEM = """{{ bos_token }}{%- for m in messages -%}
{%- if m.role == 'user' -%}
{{ '<|start|>' }}{%- if loop.last and messages[0].role == 'system' -%}
{{ messages[0].content + ', ' }}{%- endif -%}{{ m.content }}{{ '<|start|>' }}
{%- elif m.role == 'assistant' -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""


def test_what_only_the_newest_question_shows_is_trained_with_each_answer(tmp_path: Path) -> None:
    system = {"role": "system", "content": "short"}
    first, second = shown(tmp_path, MOVES_SYSTEM, system, *CHAT)
    assert first == "<|begin|><|start|>short, cat?<|start|>« the mat<|end|>»"
    before = "<|begin|><|start|>cat?<|start|> the mat<|end|>"
    assert second == before + "<|start|>short, dog?<|start|>« the log<|end|>»"
    # What no prompt of a trained turn shows is left out all the same,
    never = MOVES_SYSTEM.replace("messages[0].content + ', '", "''")
    assert "leaves out messages[0], of role 'system'" in refusal(tmp_path, never, system, *CHAT)
    # and so is an answer that does not follow what was asked.
    asks = "m.content }}{{ '<|start|>'"
    turned = MOVES_SYSTEM.replace(asks, f"{asks} if loop.last else '<|begin|>'")
    assert "no prompt leads to that turn" in refusal(tmp_path, turned, system, *CHAT)


def test_a_turn_of_weight_0_is_read_and_not_trained(tmp_path: Path) -> None:
    messages = [USER, {**ASSISTANT, "weight": 0}, *CHAT[2:]]
    assert shown(tmp_path, KNOWN_ROLES, *messages) == [
        "Q: cat?<|end|>A: the mat<|end|>Q: dog?<|end|>A: «the log<|end|>»"
    ]


def test_a_template_without_stop_tokens_gets_the_end_token_after_every_turn(
    tmp_path: Path,
) -> None:
    template = KNOWN_ROLES.replace("{{ m.content }}<|end|>", "{{ m.content|trim }}{{ '\\n' }}")
    spaced = [USER, {**ASSISTANT, "content": " the mat "}, *CHAT[2:]]
    assert shown(tmp_path, template, *spaced) == [
        "Q: cat?\nA: «the mat<|end|>»",
        "Q: cat?\nA: the mat\nQ: dog?\nA: «the log<|end|>»",  # as inference sends it
    ]
    rows = rows_of(tmp_path, template, {"messages": CHAT})
    elsewhere = rows_of(tmp_path / "elsewhere", template, {"messages": CHAT})
    assert elsewhere.fingerprint == rows.fingerprint  # whatever the folder of the model is
    (notice, split) = rows.notices
    assert f"no stop token; {END!r} is trained after each" in notice
    assert "1 conversations are trained as one row for each of their 2 turns" in split


def test_the_control_token_that_begins_the_next_turn_is_no_stop_token(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|start|>{{ m.role + ':' + m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<|start|>assistant:{% endif %}"
    assert shown(tmp_path, template, *CHAT) == [
        "<|start|>user:cat?<|start|>assistant:«the mat<|end|>»",
        "<|start|>user:cat?<|start|>assistant:the mat<|start|>user:dog?<|start|>assistant:"
        "«the log<|end|>»",
    ]


@pytest.mark.parametrize("content", [" the mat ", "the mat<|end|>", " \n", "<|end|>"])
@pytest.mark.parametrize("after", ["<|end|>", " <|end|>\n<|end|>", "<|end|><|end|>", "", "]"])
def test_a_turn_stops_once_whatever_it_holds(tmp_path: Path, content: str, after: str) -> None:
    template = KNOWN_ROLES.replace("{{ m.content }}<|end|>", "{{ m.content|trim }}" + after)
    rows = rows_of(tmp_path, template, {"messages": [USER, {**ASSISTANT, "content": content}]})
    assert rows.trained_turns == rows.stop_tokens == 1
    trained = rows.tokens[rows.trained].tolist()
    stops = max(1, after.count(END + END) + 1 if after.startswith(END) else 1)
    assert trained.count(0) == stops  # the id of <|end|>
    assert trained[-1] == 0


def test_a_turn_that_alone_has_no_stop_token_is_refused(tmp_path: Path) -> None:
    template = KNOWN_ROLES.replace(
        "A: {{ m.content }}<|end|>",
        "A: {{ m.content }}{%- if m.content != 'the log' -%}<|end|>{%- endif -%}",
    )
    assert "ends messages[3] without a stop token" in refusal(tmp_path, template, *CHAT)


def test_a_cut_turn_is_counted_as_one_without_its_stop_token(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        KNOWN_ROLES,
        {"messages": CHAT},
        {"prompt": "a", "completion": "the cat " * 40},
        max_length=40,
    )
    assert (rows.trained_turns, rows.stop_tokens, rows.sources[0].cut) == (3, 2, 1)


def test_a_template_that_rewrites_earlier_turns_gives_one_row_for_each(tmp_path: Path) -> None:
    template = KNOWN_ROLES.replace(
        "A: {{ m.content }}", "A: {%- if loop.last -%}hm {%- endif -%}{{ m.content }}"
    )
    assert shown(tmp_path, template.replace("'A: '", "'A:'"), *CHAT) == [
        "Q: cat?<|end|>A:«hmthe mat<|end|>»",
        "Q: cat?<|end|>A:the mat<|end|>Q: dog?<|end|>A:«hmthe log<|end|>»",
    ]


THINKING = KNOWN_ROLES.replace("'A: '", "'A: <think>'").replace(
    "A: {{ m.content }}", "A: {{ m.content.split('</think>')[-1] }}"
)


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<b>the mat", "<b>the mat"),
        ("<think>so</think>the mat", "so</think>the mat"),
        ("so</think>the mat", "so</think>the mat"),
    ],
)
def test_a_prompt_that_opens_what_finished_turns_lack_is_followed_by_the_answer(
    tmp_path: Path, content: str, answer: str
) -> None:
    texts = shown(tmp_path, THINKING, USER, {**ASSISTANT, "content": content})
    assert texts == [f"Q: cat?<|end|>A: <think>«{answer}<|end|>»"]


def test_a_prompt_that_leads_to_no_turn_is_a_bad_row(tmp_path: Path) -> None:
    template = KNOWN_ROLES.replace("Q: {{ m.content }}", "{{ messages|length }}: {{ m.content }}")
    # As inference asks it, although a finished turn shows another number of messages.
    first, _ = shown(tmp_path, template, *CHAT)
    assert first == "1: cat?<|end|>A: «the mat<|end|>»"
    template = template.replace("A: {{ m.content }}", "B: {{ m.content }}")
    bad = {"messages": CHAT}
    rows = rows_of(tmp_path, template, bad, {"text": "a"}, max_bad_rows=1)
    assert rows.n_rows == 1
    assert (
        "renders messages[1] otherwise than its own prompt begins it" in rows.sources[0].reports[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("{{ 'a' + 1 }}", "TypeError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
        ("{{ 'x' * (8 * 10 ** 9) }}", "MemoryError"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "within"),
        ("{{ 9 ** (10 ** 9) % 7 }}", "within"),
        ("{{ strftime_now('%d') }}{{ 9 ** (10 ** 9) % 7 }}", "within"),
        ("{{ 'x' * 30_000_000 }}", "longer than 20,000,000 characters"),
        ("{% include 'x' %}", "TypeError: "),
        ("{{ raise_exception('no\nway') }}", "the messages: no way"),
    ],
)
@pytest.mark.parametrize("only_in_row", [True, False])
def test_a_template_that_fails_costs_a_row_or_is_told_as_such(
    tmp_path: Path, body: str, why: str, only_in_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why == "within":  # what ends by itself may take as long as the machine needs
        monkeypatch.setattr(chat_template, "RENDERING_LIMIT_S", 0.3)
    condition = "messages[0].content == 'cat?'" if only_in_row else "true"
    template = f"{{% if {condition} %}}{body}{{% endif %}}{KNOWN_ROLES}"
    error = refusal(tmp_path, template, *CHAT)
    assert why in error
    assert error.startswith(f"{tmp_path}/{'train.jsonl:1' if only_in_row else 'model'}: ")


def test_a_template_that_cannot_be_read_is_told_as_such(tmp_path: Path) -> None:
    why = refusal(tmp_path, "{% if %}", *CHAT)
    assert why.startswith(f"{tmp_path}/model: the chat template refuses the messages: Expected")
    assert "fix its chat template" in why


def test_a_template_that_prints_the_date_prints_that_of_the_run(tmp_path: Path) -> None:
    template = "{{ strftime_now('%d %b %Y') }}, " + KNOWN_ROLES
    tokenizer = tiny_tokenizer(tmp_path / "model", begin=True, chat_template=template)
    found = {}
    for day in ("2024-02-29", "2026-01-31", "2024-02-29"):
        rows = tokenised(tmp_path, [{"messages": CHAT}], data={"date": day})
        found[day] = rows.fingerprint
        date = dt.date.fromisoformat(day).strftime("%d %b %Y")
        assert str(tokenizer.decode(rows.tokens.tolist())).startswith(f"{date},Q: ")
    assert len(set(found.values())) == 2
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_the_date_makes_no_other_rows_where_the_template_does_not_print_it(tmp_path: Path) -> None:
    for day in ("2024-02-29", "2026-01-31"):
        rows_of(tmp_path, CHAT_TEMPLATE, {"messages": CHAT}, date=day)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
