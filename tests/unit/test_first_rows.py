"""What is wrong with the rows is told before anything starts: by validate, train and submit."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from peft_dist.cli.main import main
from peft_dist.config import load_recipe
from peft_dist.data.first_rows import ROWS, check_first_rows
from tests.tiny import write_jsonl
from tests.unit.slurm_desk import Capture, Desk, told

Write = Callable[[Path], object]


def spoil(text: bytes) -> Write:
    return lambda path: path.write_bytes(text)


BROKEN: dict[str, tuple[Write, str]] = {
    "empty": (spoil(b""), "train.jsonl: has no rows; add some"),
    "no JSON": (spoil(b'{"text": "a"}\n{"te'), "train.jsonl:2: invalid JSON at column 2"),
    "a list": (spoil(b'[{"text": "a"}]'), "train.jsonl:1: holds a JSON list"),
    "of no form": (
        spoil(b'{"question": "a", "answer": "b"}'),
        "data.columns: {prompt: question, completion: answer}",
    ),
    "without an answer": (
        spoil(b'{"messages": [{"role": "user", "content": "a"}]}'),
        "train.jsonl:1: messages has no turn of role assistant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("command", ["validate", "train", "submit"])
def test_rows_that_cannot_be_used_are_one_line_before_anything_is_made(
    name: str, command: str, desk: Desk, capsys: Capture
) -> None:
    write, expected = BROKEN[name]
    write(desk.folder / "train.jsonl")
    code = desk.submit() if command == "submit" else main([command, str(desk.recipe)])
    assert code == 2
    assert expected in told(capsys)
    assert desk.made() == []
    assert desk.calls() == []


def test_rows_that_this_machine_does_not_see_are_submitted(desk: Desk, capsys: Capture) -> None:
    assert desk.submit("data.train=someone/rows", "--dry-run") == 0


def test_only_the_first_rows_are_looked_at(recipe_file: Path, tmp_path: Path) -> None:
    rows = [{"text": "a"}] * ROWS
    write_jsonl(tmp_path / "train.jsonl", [*rows, {"text": 1}])
    check_first_rows(load_recipe(recipe_file))
    write_jsonl(tmp_path / "train.jsonl", [*rows[1:], {"text": 1}])
    assert main(["validate", str(recipe_file)]) == 2
    assert main(["validate", str(recipe_file), "data.max_bad_rows=1"]) == 0


def test_held_out_rows_and_every_source_are_looked_at(
    recipe_file: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}')
    bad = f"{tmp_path}/bad.jsonl:1: text is 1, not text"
    for setting in ("data.eval=bad.jsonl", "data.train=[{path: train.jsonl}, {path: bad.jsonl}]"):
        assert main(["validate", str(recipe_file), setting]) == 2
        assert told(capsys).startswith(bad)


def test_a_part_of_a_file_is_looked_at_where_it_begins(recipe_file: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": 1}, {"text": "a"}, {"text": "b"}, {"text": 2}])
    assert main(["validate", str(recipe_file), "data.train_split='train[1:3]'"]) == 0
    assert main(["validate", str(recipe_file), "data.train_split='train[2:]'"]) == 2
    assert main(["validate", str(recipe_file), "data.train_split='train[50%:]'"]) == 0


def test_a_folder_is_one_that_datasets_saved(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["validate", str(recipe_file), "data.train=./mine"]) == 2
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    assert main(["validate", str(recipe_file), "data.train=./saved"]) == 0


def test_looking_imports_nothing_that_takes_long(recipe_file: Path) -> None:
    code = (
        "import sys, json; from peft_dist.cli.main import main\n"
        f"assert main(['validate', {str(recipe_file)!r}]) == 0\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'}"
        " & set(sys.modules))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []
