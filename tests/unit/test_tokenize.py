"""Rows to tokens: what is trained, what is cut, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from peft_dist.common.errors import DataError, ModelError, PeftDistError, RecipeError
from peft_dist.data.token_cache import TokenizedRows, encode_completions, tokenize_rows
from tests.tiny import (
    CHAT_TEMPLATE,
    tiny_encoder_tokenizer,
    tiny_recipe,
    tiny_tokenizer,
    tokenised,
    write_jsonl,
)

END = "<|end|>"
CHAT = [
    {"role": "user", "content": "cat?"},
    {"role": "assistant", "content": "the mat"},
    {"role": "user", "content": "dog?"},
    {"role": "assistant", "content": "the log "},
]


def tokenizer_in(folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(folder / "model", **options)


def row_of(rows: TokenizedRows, row: int) -> tuple[list[int], list[bool]]:
    at = slice(rows.offsets[row], rows.offsets[row + 1])
    return rows.tokens[at].tolist(), rows.trained[at].tolist()


def trained_text(tokenizer: PreTrainedTokenizerFast, rows: TokenizedRows, row: int) -> str:
    tokens, trained = row_of(rows, row)
    return str(tokenizer.decode([t for t, on in zip(tokens, trained, strict=True) if on]))


def error_of(kind: type[PeftDistError], *args: Any, **sections: Any) -> str:
    with pytest.raises(kind) as caught:
        tokenised(*args, **sections)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_token_of_a_text_and_the_end_token_are_trained(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    rows = tokenised(tmp_path, [{"text": "the cat sat"}])
    tokens, trained = row_of(rows, 0)
    assert tokenizer.decode(tokens) == f"the cat sat{END}"
    assert all(trained)
    assert rows.predicted_counts.tolist() == [len(tokens) - 1]  # the first has no predecessor


def test_a_prompt_is_read_and_its_completion_and_end_token_are_trained(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = tokenised(tmp_path, [{"prompt": "Category:", "completion": " animal"}])
    tokens, _ = row_of(rows, 0)
    prompt = tokenizer("Category:").input_ids
    assert tokens == prompt + tokenizer(" animal").input_ids + [tokenizer.eos_token_id]
    assert trained_text(tokenizer, rows, 0) == f" animal{END}"
    assert rows.predicted_counts.tolist() == [len(tokens) - len(prompt)]
    assert rows.pad_id == tokenizer.pad_token_id


def test_the_tokenizers_begin_token_comes_once_and_is_not_trained(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, begin=True)
    rows = tokenised(
        tmp_path,
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": "<|begin|>a", "completion": "b"},
            {"prompt": "", "completion": "ab"},
            {"text": "ab"},
        ],
    )
    texts = [tokenizer.decode(row_of(rows, row)[0]) for row in range(4)]
    assert texts == [f"<|begin|>ab{END}"] * 4
    assert [trained_text(tokenizer, rows, row) for row in range(4)] == [
        f"b{END}",
        f"b{END}",
        f"ab{END}",
        f"ab{END}",
    ]


def test_truncation_and_padding_saved_with_a_tokenizer_are_not_applied(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.backend_tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    rows = tokenised(tmp_path, [{"text": "abcdef"}, {"prompt": "a", "completion": "b"}])
    texts = [tokenizer.decode(row_of(rows, row)[0]) for row in range(2)]
    assert texts == [f"abcdef{END}", f"ab{END}"]


def test_an_end_token_that_is_written_out_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    rows = tokenised(tmp_path, [{"text": f"a b{END}"}, {"prompt": "a", "completion": f"b{END}"}])
    assert tokenizer.decode(row_of(rows, 0)[0]) == f"a b{END}"
    assert trained_text(tokenizer, rows, 1) == f"b{END}"


def test_every_assistant_turn_is_trained_with_its_end_token_and_no_more(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    rows = tokenised(tmp_path, [{"messages": CHAT}, {"messages": CHAT[:3]}])
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(row_of(rows, 0)[0]) == rendered
    assert trained_text(tokenizer, rows, 0) == f"the mat{END}the log {END}"
    assert trained_text(tokenizer, rows, 1) == f"the mat{END}"


def test_characters_of_several_tokens_are_trained_whole(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    messages = [CHAT[0], {"role": "assistant", "content": "\u4e16 \U0001f680\u00e9"}]
    rows = tokenised(tmp_path, [{"messages": messages}])
    assert trained_text(tokenizer, rows, 0) == f"\u4e16 \U0001f680\u00e9{END}"


def test_a_template_without_an_end_of_turn_gets_the_end_token(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tokenizer_in(tmp_path, chat_template=template)
    rows = tokenised(tmp_path, [{"messages": CHAT[:2]}])
    assert tokenizer.decode(row_of(rows, 0)[0]) == f"user: cat?\nassistant: the mat{END}"
    assert trained_text(tokenizer, rows, 0).endswith(f"mat{END}")
    assert "assistant" not in trained_text(tokenizer, rows, 0)


def test_messages_without_a_chat_template_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    tokenizer_in(tmp_path, chat_template=None)
    error = error_of(DataError, tmp_path, [{"text": "a"}, {"messages": CHAT}])
    assert error.startswith(f"{tmp_path}/train.jsonl:2: the row has messages, but the tokenizer")
    assert "has no chat template; name an instruct model" in error


def test_messages_the_template_refuses_are_bad_rows(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    tokenizer_in(tmp_path, chat_template=template + "{% endif %}" + CHAT_TEMPLATE)
    bad = {"messages": [{"role": "system", "content": "a"}, *CHAT]}
    data = {"max_bad_rows": 1}
    rows = tokenised(tmp_path, [bad, {"messages": CHAT}], data=data)
    assert rows.n_rows == 1
    assert rows.sources[0].reports == (
        f"{tmp_path}/train.jsonl:1: the chat template refuses the messages: no system",
    )


def test_the_first_bad_row_is_the_first_in_the_file(tmp_path: Path) -> None:
    template = "{% if messages[1]['content'] == 'the mat' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer_in(tmp_path, chat_template=template + CHAT_TEMPLATE)
    error = error_of(
        DataError, tmp_path, [{"messages": CHAT}, {"text": 3}], data={"max_bad_rows": 1}
    )
    assert error.startswith(f"{tmp_path}/train.jsonl:1: the chat template refuses the messages")


@pytest.mark.parametrize(
    ("truncation", "text", "trained"),
    [("end", "<|begin|>abcd", "cd"), ("start", f"<|begin|>cdef{END}", f"cdef{END}")],
)
def test_a_long_row_is_cut_where_the_recipe_says(
    tmp_path: Path, truncation: str, text: str, trained: str
) -> None:
    tokenizer = tokenizer_in(tmp_path, begin=True)
    length = len(tokenizer(text, add_special_tokens=False).input_ids)
    rows = tokenised(
        tmp_path,
        [{"prompt": "ab", "completion": "cdef"}, {"text": "a"}],
        data={"max_length": length, "truncation": truncation},
    )
    assert tokenizer.decode(row_of(rows, 0)[0]) == text
    assert trained_text(tokenizer, rows, 0) == trained
    assert (rows.sources[0].cut, rows.sources[0].dropped, rows.n_rows) == (1, 0, 2)


def test_a_long_text_is_split_into_rows_that_hold_every_token_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path, begin=True)
    values = [{"text": "abcdefgh"}, {"text": "a"}, {"prompt": "abc", "completion": "def"}]
    rows = tokenised(tmp_path, values, data={"max_length": 6, "truncation": "split"})
    pieces = [str(tokenizer.decode(row_of(rows, at)[0])) for at in range(rows.n_rows)]
    assert pieces == [
        *("<|begin|>abcde", f"<|begin|>fgh{END}", f"<|begin|>a{END}"),
        "<|begin|>abcde",  # an answer stays with its prompt
    ]
    assert [trained_text(tokenizer, rows, at) for at in (0, 1, 3)] == ["abcde", f"fgh{END}", "de"]
    (source,) = rows.sources
    assert (source.cut, source.lost_end, source.dropped) == (1, 1, 0)
    assert (rows.trained_turns, rows.stop_tokens) == (3, 2)
    assert rows.notices == ("1 texts longer than data.max_length are trained as 2 rows",)
    long = [{"text": "a" * 61}]
    rows = tokenised(tmp_path, long, data={"max_length": 31, "truncation": "split"})
    assert rows.lengths.tolist() == [22, 22, 21]  # no row of a rest alone


def test_a_long_row_is_dropped_or_named_if_the_recipe_says_so(tmp_path: Path) -> None:
    tokenizer_in(tmp_path)
    texts = [{"text": "a"}, {"text": "abcdefgh"}]
    rows = tokenised(tmp_path, texts, data={"max_length": 4, "truncation": "drop"})
    assert (rows.sources[0].cut, rows.sources[0].dropped, rows.n_rows) == (0, 1, 1)
    data = {"max_length": 4, "truncation": "error"}
    error = error_of(DataError, tmp_path, texts, data=data)
    assert error.startswith(f"{tmp_path}/train.jsonl:2: the row has 9 tokens, data.max_length is 4")


def test_a_row_without_a_trained_prediction_is_dropped_and_counted(tmp_path: Path) -> None:
    tokenizer_in(tmp_path)
    long_prompt = {"prompt": "abcdefgh", "completion": "i"}
    rows = tokenised(tmp_path, [long_prompt, {"text": "a"}], data={"max_length": 4})
    assert (rows.n_rows, rows.sources[0].dropped, rows.sources[0].cut) == (1, 1, 0)
    error = error_of(DataError, tmp_path, [long_prompt], data={"max_length": 4})
    assert error.endswith(
        "no row is left to use: 1 dropped as data.max_length (4) leaves nothing of them to train "
        "(the longest has 10 tokens), 0 malformed; raise data.max_length, or set data.truncation: "
        "start, to cut prompts"
    )


def test_labels_become_class_ids_and_special_tokens_survive_truncation(tmp_path: Path) -> None:
    tokenizer = tiny_encoder_tokenizer(tmp_path / "model")
    rows = tokenised(
        tmp_path,
        [{"text": "abcdef", "label": "dog"}, {"text": "b", "label": "cat"}],
        model={"task": "sequence-classification"},
        data={"max_length": 5},
    )
    assert rows.label_names == ("cat", "dog")
    assert rows.class_ids is not None
    assert rows.class_ids.tolist() == [1, 0]
    assert tokenizer.decode(row_of(rows, 0)[0]) == "[CLS]abc[SEP]"
    assert rows.predicted_counts.tolist() == [1, 1]
    assert not rows.trained.any()
    assert rows.sources[0].cut == 1


def test_an_evaluation_label_unknown_to_training_is_a_bad_row(tmp_path: Path) -> None:
    tiny_encoder_tokenizer(tmp_path / "model")
    train = [{"text": "a", "label": name} for name in ("cat", "dog", "eel")]
    write_jsonl(tmp_path / "train.jsonl", train)
    make_eval_set = [{"text": "a", "label": name} for name in ("dog", "emu")]
    write_jsonl(tmp_path / "eval.jsonl", make_eval_set)
    recipe = tiny_recipe(
        tmp_path / "model",
        tmp_path / "train.jsonl",
        model={"task": "sequence-classification"},
        data={"eval": str(tmp_path / "eval.jsonl"), "max_bad_rows": 1},
    )
    rows = tokenize_rows(recipe, "eval", tmp_path / "cache")
    assert rows.label_names == ("cat", "dog", "eel")
    assert rows.class_ids is not None
    assert rows.class_ids.tolist() == [1]
    assert rows.sources[0].reports == (
        f"{tmp_path}/eval.jsonl:2: label 'emu' is not in data.train: cat, dog, eel",
    )


def test_one_class_alone_is_an_error(tmp_path: Path) -> None:
    tiny_encoder_tokenizer(tmp_path / "model")
    row = {"text": "a", "label": "x"}
    error = error_of(DataError, tmp_path, [row, row], model={"task": "sequence-classification"})
    assert "all rows have the label 'x'" in error


def test_a_length_without_room_for_a_token_is_an_error(tmp_path: Path) -> None:
    tiny_encoder_tokenizer(tmp_path / "model")
    task = {"task": "sequence-classification"}
    row = {"text": "a", "label": "x"}
    error = error_of(RecipeError, tmp_path, [row], model=task, data={"max_length": 2})
    assert error.startswith("data.max_length: 2 leaves no room")
    assert error.endswith("set it to 3 or more")


def test_choices_are_the_tokens_a_completion_is_trained_as(tmp_path: Path) -> None:
    tokenizer_in(tmp_path, begin=True)
    rows = tokenised(tmp_path, [{"prompt": "Category:", "completion": " animal"}])
    tokens, trained = row_of(rows, 0)
    (choice,) = encode_completions(
        tiny_recipe(tmp_path / "model", tmp_path / "train.jsonl"), (" animal",)
    )
    assert choice.tolist() == [t for t, on in zip(tokens, trained, strict=True) if on]


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path: Path, content: str | None) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    if content is not None:
        (model / "tokenizer.json").write_text(content)
    error = error_of(ModelError, tmp_path, [{"text": "a"}])
    assert error.startswith(f"{model}: tokenizer cannot be loaded: ")
    assert error.endswith("put tokenizer.json and tokenizer_config.json beside the model")
