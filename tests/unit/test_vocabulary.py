"""Ids that the model has no row for: one line, before a weight is read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_dist.common.errors import ModelError
from peft_dist.config.recipe import Recipe
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.evaluation.scoring import make_eval_set
from peft_dist.model.vocabulary import refuse_unknown_ids
from tests.tiny import (
    VOCABULARY,
    completion_rows,
    tiny_model,
    tiny_recipe,
    tiny_tokenizer,
    write_jsonl,
)

NEW = "<|new|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose tokenizer was given a token more than the embedding has rows."""
    folder = tmp_path_factory.mktemp("vocabulary") / "model"
    tiny_model(folder, "llama")
    tokenizer = tiny_tokenizer(folder)
    fill = [f"<|fill-{n}|>" for n in range(VOCABULARY - len(tokenizer))]
    tokenizer.add_tokens([*fill, NEW])
    assert tokenizer.convert_tokens_to_ids(NEW) == VOCABULARY
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")  # whoever reads a weight fails
    return folder


def check(model: Path, **sections: Any) -> None:
    folder = model.parent
    write_jsonl(folder / "plain.jsonl", completion_rows(4))
    write_jsonl(folder / "new.jsonl", [*completion_rows(3), {"prompt": NEW, "completion": " cat"}])
    data = {"train": str(folder / "plain.jsonl"), **sections.pop("data", {})}
    recipe: Recipe = tiny_recipe(model, folder / "plain.jsonl", data=data, **sections)
    texts = {"data.train": tokenize_rows(recipe, "train", folder / "cache").tokens}
    if recipe.data.eval is not None:
        texts |= make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "cache")).texts()
    refuse_unknown_ids(recipe, model, texts)


@pytest.mark.parametrize(
    ("field", "sections"),
    [
        ("data.train", {"data": {"train": "new.jsonl"}}),
        ("data.eval", {"data": {"eval": "new.jsonl"}}),
        (
            "evaluate.choices",
            {"data": {"eval": "plain.jsonl"}, "evaluate": {"choices": [" cat", " dog", NEW]}},
        ),
        ("method.text", {"method": {"kind": "prompt", "text": f"a {NEW}"}}),
    ],
)
def test_an_id_past_the_embedding_is_named_with_its_token_and_field(
    model: Path, field: str, sections: dict[str, Any]
) -> None:
    data = {key: str(model.parent / name) for key, name in sections.get("data", {}).items()}
    with pytest.raises(ModelError) as caught:
        check(model, **sections | {"data": data})
    assert str(caught.value).startswith(
        f"model.name: the token '{NEW}' of {field} has id {VOCABULARY}, "
        f"but the model's embedding has {VOCABULARY} rows; "
    )


def test_the_last_row_of_the_embedding_is_one_of_it(model: Path) -> None:
    check(model, data={"eval": str(model.parent / "plain.jsonl")})
    recipe = tiny_recipe(model, model.parent / "plain.jsonl")
    refuse_unknown_ids(recipe, model, {"data.train": np.array([VOCABULARY - 1], dtype=np.int32)})
    with pytest.raises(ModelError):
        refuse_unknown_ids(recipe, model, {"data.train": np.array([VOCABULARY], dtype=np.int32)})
