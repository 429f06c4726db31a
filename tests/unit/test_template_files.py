"""Chat templates in files: each source is rendered with its own, and the adapter carries it."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from peft_dist.checkpoint.same_inputs import describe_inputs, first_difference
from peft_dist.checkpoint.saved_tokenizer import tokenizer_to_save
from peft_dist.common.errors import DataError, RecipeError
from peft_dist.common.paths import TOKENIZER_FILES
from peft_dist.config import load_recipe
from peft_dist.config.load import render_yaml
from peft_dist.config.recipe import Recipe
from peft_dist.data.first_rows import check_first_rows
from peft_dist.data.preview import preview
from peft_dist.data.stream import StreamedRows
from peft_dist.data.token_cache import row_job, tokenize_rows
from peft_dist.data.tokenized_rows import TokenizedRows
from peft_dist.entrypoints.merge import _copy_tokenizer
from peft_dist.model.weights import WeightFiles
from tests.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer, write_jsonl

QA = (
    "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
)
ROUND = QA.replace("Q: ", "(").replace("A: ", ")")
CHAT = {"messages": [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]}
OWN = "<|start|>user\ncat<|end|>\n<|start|>assistant\nmat<|end|>\n"
"""The conversation in the tokenizer's own template."""
QUESTION, ROUNDED = "Q: cat<|end|>A: mat<|end|>", "(cat<|end|>)mat<|end|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a tokenizer, two files of rows and two chat templates."""
    tiny_tokenizer(tmp_path / "model")
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [CHAT])
    (tmp_path / "qa.jinja").write_text(QA, encoding="utf-8")
    (tmp_path / "round.jinja").write_text(ROUND, encoding="utf-8")
    return tmp_path


def recipe_of(folder: Path, **data: Any) -> Recipe:
    raw = {"model": {"name": "./model", "dtype": "float32"}, "data": {"train": "one.jsonl", **data}}
    (folder / "recipe.yaml").write_text(render_yaml(raw), encoding="utf-8")
    return load_recipe(folder / "recipe.yaml")


def texts(folder: Path, rows: TokenizedRows) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    parts = zip(rows.offsets[:-1], rows.offsets[1:], strict=True)
    return [str(tokenizer.decode(rows.tokens[begin:end])) for begin, end in parts]


def test_every_source_is_rendered_with_its_own_template_or_the_default(folder: Path) -> None:
    recipe = recipe_of(
        folder,
        train=[{"path": "one.jsonl", "template": "qa.jinja"}, {"path": "two.jsonl"}],
        eval="two.jsonl",
    )
    expected = [QUESTION, OWN]
    rows = tokenize_rows(recipe, "train", folder / "cache")
    assert texts(folder, rows) == expected
    assert rows.stop_tokens == rows.trained_turns == 2
    assert texts(folder, tokenize_rows(recipe, "eval", folder / "cache")) == [OWN]
    found = preview(row_job(recipe, "train", folder / "cache"), 9)
    shown = [row.tokens.tolist() for source in found for _, row in source.rows]
    assert sum(shown, []) == rows.tokens.tolist()
    data = recipe.data.model_copy(update={"streaming": True})
    streamed = StreamedRows(recipe.model_copy(update={"data": data}), folder / "cache")
    assert texts(folder, streamed.at(np.arange(2))[0]) == expected

    train = [{"path": "one.jsonl", "template": "qa.jinja"}, {"path": "two.jsonl"}]
    both = recipe_of(folder, train=train, template="round.jinja", eval="two.jsonl")
    assert texts(folder, tokenize_rows(both, "train", folder / "cache")) == [QUESTION, ROUNDED]
    assert texts(folder, tokenize_rows(both, "eval", folder / "cache")) == [ROUNDED]


def test_the_text_of_a_template_decides_the_cache_and_its_path_does_not(folder: Path) -> None:
    recipe = recipe_of(folder, template="qa.jinja")
    first = tokenize_rows(recipe, "train", folder / "cache")
    shutil.copy(folder / "qa.jinja", folder / "moved.jinja")
    again = tokenize_rows(recipe_of(folder, template="moved.jinja"), "train", folder / "cache")
    assert again.fingerprint == first.fingerprint
    (folder / "qa.jinja").write_text(ROUND, encoding="utf-8")
    assert texts(folder, tokenize_rows(recipe, "train", folder / "cache")) == [ROUNDED]
    (folder / "own.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    own, default = recipe_of(folder, template="own.jinja"), recipe_of(folder)
    keys = [row_job(one, "train", folder / "cache").key() for one in (own, default)]
    assert keys[0] == keys[1], "the tokenizer's own template in a file changes nothing"


def test_a_tokenizer_without_a_template_is_given_one(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"no chat template; .*set data\.template"):
        tokenize_rows(recipe_of(folder), "train", folder / "cache")
    recipe = recipe_of(folder, template="qa.jinja")
    assert texts(folder, tokenize_rows(recipe, "train", folder / "cache")) == [QUESTION]


def test_a_template_that_renders_nothing_is_told(folder: Path) -> None:
    write_jsonl(folder / "one.jsonl", [{"text": "cat"}])
    rows = tokenize_rows(recipe_of(folder, template="qa.jinja"), "train", folder / "cache")
    notice = "no row is a conversation, so the chat template that is set has no effect"
    assert rows.notices == (notice,)


@pytest.mark.parametrize(
    ("data", "content", "words"),
    [
        ({"template": "no.jinja"}, None, r"recipe.yaml: data.template: 'no.jinja' does not exist"),
        (
            {"train": [{"path": "one.jsonl", "template": "no.jinja"}]},
            None,
            r"recipe.yaml: data.train\[0\].template: 'no.jinja' does not exist",
        ),
        (
            {"train": [{"path": "one.jsonl", "template": "qa.jinja"}], "template": "round.jinja"},
            None,
            "template: every source has one of its own; remove it",
        ),
        ({"template": "qa.jinja"}, "a\n{% for %}", "qa.jinja:2: chat template is broken: .+; fix"),
        ({"template": "qa.jinja"}, " \n", "qa.jinja: chat template is empty; name a file"),
        ({"template": "model"}, None, "model: chat template cannot be read: Is a directory; name"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line_before_anything_starts(
    folder: Path, data: dict[str, Any], content: str | None, words: str
) -> None:
    if content is not None:
        (folder / "qa.jinja").write_text(content, encoding="utf-8")
    with pytest.raises((RecipeError, DataError), match=words) as refused:
        check_first_rows(recipe_of(folder, **data))
    assert "\n" not in str(refused.value)


def test_a_classifier_has_no_use_for_a_template(folder: Path) -> None:
    recipe = {"model": {"name": "m", "task": "sequence-classification"}, "data": {"train": "t"}}
    assert Recipe.model_validate(recipe)
    for data in ({"template": "a"}, {"train": [{"path": "t", "template": "a"}]}):
        with pytest.raises(ValueError, match=r"data\.template is for conversations"):
            Recipe.model_validate(recipe | {"data": {"train": "t", **data}})


def test_tags_of_transformers_are_no_fault(folder: Path) -> None:
    marked = QA.replace("{{ (", "{% generation %}{{ (").replace(
        "{% endfor %}", "{% endgeneration %}{% if false %}{% break %}{% endif %}{% endfor %}"
    )
    (folder / "qa.jinja").write_text(marked, encoding="utf-8")
    recipe = recipe_of(folder, template="qa.jinja")
    check_first_rows(recipe)
    assert texts(folder, tokenize_rows(recipe, "train", folder / "cache")) == [QUESTION]


def saved(folder: Path, recipe: Recipe) -> Path:
    """Return a folder with the tokenizer that is saved beside the recipe's adapter."""
    (folder / "adapter").mkdir(exist_ok=True)
    files = [file for pattern in TOKENIZER_FILES for file in (folder / "model").glob(pattern)]
    for name, content in tokenizer_to_save(recipe, files).items():
        text = content if isinstance(content, str) else content.read_text(encoding="utf-8")
        (folder / "adapter" / name).write_text(text, encoding="utf-8")
    return folder / "adapter"


def test_the_adapter_and_a_merged_model_carry_the_template_that_was_trained(folder: Path) -> None:
    config = folder / "model" / "tokenizer_config.json"
    facts = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(facts | {"chat_template": CHAT_TEMPLATE}), encoding="utf-8")
    adapter = saved(folder, recipe_of(folder, template="qa.jinja"))
    found = AutoTokenizer.from_pretrained(adapter)
    assert found.apply_chat_template(CHAT["messages"], tokenize=False) == QUESTION
    assert "chat_template" not in json.loads((adapter / config.name).read_text(encoding="utf-8"))
    _copy_tokenizer(adapter, folder / "model")
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template == QA


def test_where_sources_differ_the_tokenizer_keeps_its_own_template_which_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = [{"path": "one.jsonl", "template": "qa.jinja"}, {"path": "two.jsonl"}]
    with caplog.at_level(logging.INFO):
        adapter = saved(folder, recipe_of(folder, train=train, eval="two.jsonl"))
    assert AutoTokenizer.from_pretrained(adapter).chat_template == CHAT_TEMPLATE
    assert caplog.messages == [
        "the training rows have several chat templates, so the tokenizer is saved beside the "
        "adapter with its own"
    ]


def test_ranks_with_another_template_do_not_train_together(folder: Path) -> None:
    tiny_model(folder / "model", "llama")
    inputs = []
    recipe = recipe_of(folder, template="qa.jinja")
    for text in (QA, QA, QA + "{# other #}"):
        (folder / "qa.jinja").write_text(text, encoding="utf-8")
        inputs.append(describe_inputs(recipe, {}, WeightFiles(folder / "model"), torch.float32))
    hosts = [{"host": f"n{rank}", "inputs": one} for rank, one in enumerate(inputs)]
    line = first_difference(hosts) or ""
    assert line.startswith("rank 2 on host n2 has another data.template than rank 0 on host n0: ")
