"""Rows of preferences: every public form, what is trained of them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from peft_dist.common.errors import DataError
from peft_dist.data.token_cache import TokenizedRows
from tests.tiny import tiny_tokenizer, tokenised

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "hi"), ("assistant", "good"), ("assistant", "bad")))  # fmt: skip
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CHAT = "<|start|>user\nhi<|end|>\n<|start|>assistant\n"
EARLIER_CHAT = "<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer, as a model's."""
    tiny_tokenizer(tmp_path / "model")
    return tmp_path


def shown(folder: Path, rows: TokenizedRows) -> list[tuple[str, str]]:
    """Return what is read and what is trained of each row."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    found = []
    for row in range(rows.n_rows):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        tokens, trained = rows.tokens[part], rows.trained[part]
        begin = int(trained.argmax())
        found.append((tokenizer.decode(tokens[:begin]), tokenizer.decode(tokens[trained])))
    return found


def pairs(folder: Path, *rows: Any, **sections: Any) -> TokenizedRows:
    """Tokenise rows for an objective that compares answers."""
    return tokenised(folder, rows, objective="dpo", **sections)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
        ({"prompt": [USER], "chosen": "good", "rejected": "bad"}, CHAT),
        ({"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, CHAT),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, CHAT),
        ({"prompt": [*EARLIER, USER], "chosen": "good", "rejected": "bad"}, EARLIER_CHAT + CHAT),
        ({"chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
         EARLIER_CHAT + CHAT),
    ],
)  # fmt: skip
def test_every_form_of_conversation_trains_the_answer_alone(
    folder: Path, row: dict[str, Any], prompt: str
) -> None:
    found = shown(folder, pairs(folder, row))
    assert found == [(prompt, "good<|end|>"), (prompt, "bad<|end|>")]


def test_an_answer_of_several_turns_trains_its_assistants_turns(folder: Path) -> None:
    more = [GOOD, USER, GOOD]
    found = shown(folder, pairs(folder, {"prompt": [USER], "chosen": more, "rejected": [BAD]}))
    assert found == [(CHAT, "good<|end|>good<|end|>"), (CHAT, "bad<|end|>")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the cat", "chosen": " sat", "rejected": " dog"},
        {"chosen": "the cat sat", "rejected": "the cat dog"},
    ],
)
def test_texts_share_a_prompt_that_is_given_or_found(folder: Path, row: dict[str, Any]) -> None:
    found = shown(folder, pairs(folder, row))
    assert found == [("the cat", " sat<|end|>"), ("the cat", " dog<|end|>")]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no rejected; its keys: 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: completion is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected is neither text nor a list"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "chosen has no turn of role"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "chosen: messages has no turn"),
        ({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [BAD]},
         "chosen: has no messages[1].content"),
        ("text", "the row is 'text', not an object with chosen, rejected"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_pair_is_named_with_its_line(folder: Path, row: Any, why: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError) as refused:
        pairs(folder, good, row)
    assert "train.jsonl:2" in str(refused.value)
    assert why in str(refused.value)
    assert pairs(folder, good, row, data={"max_bad_rows": 1}).n_examples == 1


@pytest.mark.parametrize(("truncation", "kept"), [("end", 2), ("drop", 1)])
def test_a_pair_is_cut_or_left_out_as_one(folder: Path, truncation: str, kept: int) -> None:
    long = {"prompt": "a", "chosen": " b", "rejected": " the" * 30}
    short = {"prompt": "a", "chosen": " b", "rejected": " c"}
    rows = pairs(folder, long, short, data={"max_length": 10, "truncation": truncation})
    assert rows.n_examples == kept
    assert rows.n_rows == 2 * kept
    assert rows.lengths.max() <= 10
    (source,) = rows.sources
    assert (source.rows, source.cut, source.dropped) == (kept, kept - 1, 2 - kept)
    assert source.lost_end == source.cut
    assert rows.example_lengths.sum() == rows.lengths.sum()


def judged(prompt: str, answer: str, label: Any = True) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, "label": label}


def test_a_judged_answer_is_followed_by_one_to_another_prompt(folder: Path) -> None:
    rows = [judged("a", " 1"), judged("a", " 2", False), judged("b", " 3", 1),
            judged("b", " 4", "false"), judged("c", " 5", 0)]  # fmt: skip
    found = tokenised(folder, rows, objective="kto")
    assert found.desirable is not None
    assert found.desirable.tolist() == [True, False, True, False, False]
    assert found.n_examples == 5
    texts = shown(folder, found)
    assert texts[::2] == [(r["prompt"], f"{r['completion']}<|end|>") for r in rows]
    mismatched = [("a", " 3"), ("a", " 3"), ("b", " 2"), ("b", " 2"), ("c", " 4")]
    assert texts[1::2] == [(prompt, f"{answer}<|end|>") for prompt, answer in mismatched]


def test_a_mismatched_answer_that_is_too_long_costs_no_row(folder: Path) -> None:
    rows = [judged("a", " the" * 7), judged("b b b b", " 3", label=False)]
    found = tokenised(folder, rows, objective="kto", data={"max_length": 10, "truncation": "error"})
    assert found.n_examples == 2
    assert found.lengths.max() <= 10


def test_verdicts_and_prompts_are_needed(folder: Path) -> None:
    with pytest.raises(DataError, match="label is 'maybe', not true or false"):
        tokenised(folder, [judged("a", "b", "maybe")], objective="kto")
    with pytest.raises(DataError, match="all rows have one prompt"):
        tokenised(folder, [judged("a", "b"), judged("a", "c")], objective="kto")
    with pytest.raises(DataError, match="has no label"):
        tokenised(folder, [{"prompt": "a", "completion": "b"}], objective="kto")


def test_the_rows_of_an_objective_are_not_those_of_another(folder: Path) -> None:
    row = {"prompt": "a", "completion": " b", "label": True}
    rows = [row, row | {"prompt": "c"}]
    assert tokenised(folder, rows, objective="kto").n_rows == 4
    assert tokenised(folder, rows).n_rows == 2
