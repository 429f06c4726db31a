"""`validate --rows` shows what is trained of the first rows, and every one that is malformed."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import ModelError
from peft_dist.config.load import render_yaml
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.entrypoints.show_rows import show_rows
from tests.tiny import tiny_recipe, tiny_tokenizer, write_jsonl
from tests.unit.slurm_desk import Capture, told

ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a é"}]},
    {"instruction": "do", "input": "", "output": "done"},
    {"prompt": "x", "completion": "y" * 60},
    {"prompt": "z" * 60, "completion": "y"},
    {"prompt": "x", "completion": "y"},
]
BAD: list[Any] = [{"text": 1}, {"question": "a"}]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with a tokenizer, rows and a recipe."""
    monkeypatch.setenv("PEFT_DIST_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    recipe = {"model": {"name": "./model"}, "data": {"train": "rows.jsonl", "max_length": 30}}
    (tmp_path / "recipe.yaml").write_text(render_yaml(recipe))
    return tmp_path


def shown(
    project: Path, capsys: Capture, *overrides: str, rows: int = 99, **options: bool
) -> tuple[int, str]:
    given = {"show_mask": False, "json": False, **options}
    recipe = str(project / "recipe.yaml")
    code = show_rows(argparse.Namespace(recipe=recipe, overrides=overrides, rows=rows, **given))
    return code, capsys.readouterr().out


def trained_rows(project: Path) -> TokenizedRows:
    """Return what a training of the project reads."""
    recipe = tiny_recipe(project / "model", project / "rows.jsonl", data={"max_length": 30})
    return tokenize_rows(recipe, "train", project / "cache")


def test_rows_are_shown_with_the_trained_parts_marked_and_a_summary(
    project: Path, capsys: Capture
) -> None:
    code, text = shown(project, capsys)
    assert code == 0
    assert "<|start|>user\nq<|end|>\n<|start|>assistant\n«a é<|end|>»" in text
    assert "x«y<|end|>»" in text
    assert f"x«{'y' * 29}»" in text
    trained = trained_rows(project)
    on, tokens = trained.trained.sum(), len(trained.tokens)
    dropped, summary = text.splitlines()[-2:]
    assert dropped == (
        f"dropped: {project}/rows.jsonl:4: 62 tokens, nothing to train within data.max_length (30)"
    )
    assert summary == (
        f"{project}/rows.jsonl: 5 lines, 4 examples, {on} of {tokens} tokens trained; "
        "1 cut to data.max_length (1 without a stop token), 1 dropped with nothing to train, "
        "0 bad"
    )


def test_a_long_row_is_shown_in_full_where_that_is_asked_for(
    project: Path, capsys: Capture
) -> None:
    write_jsonl(project / "rows.jsonl", [{"text": "long" * 400}])
    _, text = shown(project, capsys, "data.max_length=4000")
    assert "[... 1,207 characters ...]" in text
    _, text = shown(project, capsys, "data.max_length=4000", show_mask=True)
    assert f"«{'long' * 400}<|end|>»" in text


def test_json_holds_the_very_tokens_that_are_trained(project: Path, capsys: Capture) -> None:
    code, text = shown(project, capsys, json=True)
    found = json.loads(text)
    assert code == 0
    assert found.keys() == {"rows", "bad"}
    assert found["bad"] == []
    assert [row["line"] for row in found["rows"]] == [1, 2, 3, 5]
    rows = trained_rows(project)
    assert all(row.keys() == {"line", "tokens", "trained"} for row in found["rows"])
    assert sum((row["tokens"] for row in found["rows"]), []) == rows.tokens.tolist()
    assert sum((row["trained"] for row in found["rows"]), []) == rows.trained.astype(int).tolist()


def test_every_bad_line_is_told_whatever_the_recipe_allows(project: Path, capsys: Capture) -> None:
    write_jsonl(project / "rows.jsonl", [BAD[0], ROWS[4], BAD[1], ROWS[4]])
    code, text = shown(project, capsys, json=True)
    found = json.loads(text)
    assert code == 2
    assert [row["line"] for row in found["rows"]] == [2, 4]
    assert found["bad"] == [
        {"line": 1, "why": "text is 1, not text"},
        {"line": 3, "why": "the row is of no known form; its keys: 'question'"},
    ]
    code, text = shown(project, capsys, rows=2)
    assert code == 2
    assert "bad: " in text
    assert text.endswith("0 cut to data.max_length, 0 dropped with nothing to train, 1 bad\n")


def test_a_row_that_would_end_a_training_is_a_bad_line(project: Path, capsys: Capture) -> None:
    code, text = shown(project, capsys, "data.truncation=error", json=True)
    assert code == 2
    assert [row["line"] for row in json.loads(text)["bad"]] == [3, 4]
    (project / "model" / "chat_template.jinja").unlink()
    code, text = shown(project, capsys, json=True)
    (bad,) = json.loads(text)["bad"]
    assert bad["line"] == 1
    assert bad["why"].startswith("the row has messages, but the tokenizer of")


def test_a_token_that_the_model_has_no_row_for_is_refused(project: Path, capsys: Capture) -> None:
    config = project / "model" / "config.json"
    for known in ({"vocab_size": 40}, {"vocab_size": 9999, "text_config": {"vocab_size": 40}}):
        config.write_text(json.dumps(known))
        with pytest.raises(ModelError, match="of data.train has id .* embedding has 40 rows; put"):
            shown(project, capsys)
    config.write_text('{"vocab_size": 9999}')
    assert shown(project, capsys)[0] == 0


def test_rows_of_several_sources_say_which(project: Path, capsys: Capture) -> None:
    write_jsonl(project / "other.jsonl", ROWS[4:])
    sources = "data.train=[{path: rows.jsonl}, {path: other.jsonl}]"
    _, text = shown(project, capsys, sources, rows=1, json=True)
    found = [(Path(row["source"]).name, row["line"]) for row in json.loads(text)["rows"]]
    assert found == [("rows.jsonl", 1), ("other.jsonl", 1)]


@pytest.mark.slow
def test_the_command_prints_json_alone_and_passes_the_code_on(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(project / "rows.jsonl", [ROWS[4], BAD[0]])
    command = ["validate", str(project / "recipe.yaml"), "--rows", "9", "--json"]
    assert main([*command, "data.max_length=40"]) == 2
    captured = capfd.readouterr()
    assert json.loads(captured.out)["bad"] == [{"line": 2, "why": "text is 1, not text"}]
    assert captured.err == ""


def test_how_rows_are_shown_needs_rows(project: Path, capsys: Capture) -> None:
    assert main(["validate", str(project / "recipe.yaml"), "--show-mask"]) == 2
    assert told(capsys) == "--show-mask: says how rows are shown; add --rows N"
