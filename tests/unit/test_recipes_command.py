"""`init --preset`, `recipes ls` and `recipes cp`: copies that stand alone, and the next step."""

import json
import shlex
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.cli.recipes import PRESETS
from peft_dist.config import load_recipe
from peft_dist.config.shipped import shipped_recipes
from tests.processes import ROOT

NAMES = [path.stem for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml"))]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = tmp_path / "home/.cache/peft-dist/models/smollm2-135m-instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


def steps(text: str) -> list[list[str]]:
    """Return the commands of ours that a text says come next."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("peft-dist ")]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_valid_as_it_is_written_and_says_the_next_step(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "mine", "--preset", preset]) == 0
    told = capsys.readouterr().out
    recipe = load_recipe("mine/recipe.yaml")
    shipped = load_recipe(ROOT / f"configs/recipes/{PRESETS[preset]}.yaml")
    assert recipe.model_dump(exclude={"data"}) == shipped.model_dump(exclude={"data"})
    assert str(recipe.data.train).startswith(str(Path("mine/data").absolute()))
    commands = steps(told)
    assert commands[0] == ["validate", "mine/recipe.yaml"]
    assert commands[1][:2] == ["submit" if "slurm" in preset else "train", "mine/recipe.yaml"]
    assert main(commands[0]) == 0
    for file in told.splitlines()[0].removeprefix("made ").split(", "):
        assert Path(file).is_file()


def test_a_preset_for_slurm_brings_a_cluster_file_that_its_next_step_can_use(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft_dist.config.cluster import load_cluster

    assert main(["init", "mine", "--preset", "qlora-slurm"]) == 0
    words = steps(capsys.readouterr().out)[1]
    assert load_cluster(words[words.index("--cluster") + 1]).max_nodes


@pytest.mark.parametrize("name", NAMES)
def test_a_copied_recipe_is_valid_where_it_is_and_has_its_rows_and_their_notice(name: str) -> None:
    assert main(["recipes", "cp", name, "here"]) == 0
    assert main(["validate", f"here/{name}.yaml"]) == 0
    files = {path.name for path in Path("here/data").iterdir()}
    assert ("NOTICE" in files) == any(file.startswith("wordnet") for file in files)


@pytest.mark.parametrize("words", [["init", "mine", "--preset", "chat"],
                                   ["recipes", "cp", "chat", "mine"]])  # fmt: skip
def test_nothing_is_overwritten_and_nothing_half_written(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Path("mine/data/devils_dictionary_test.jsonl")
    rows.parent.mkdir(parents=True)
    rows.write_text("mine")
    assert main(words) == 2
    assert capsys.readouterr().err == f"peft-dist: error: {rows}: already there; " \
        "choose a new folder\n"  # fmt: skip
    assert [path for path in Path("mine").rglob("*") if path.is_file()] == [rows]
    assert rows.read_text() == "mine"


def test_a_name_that_no_recipe_has_is_one_line_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, told in (("quikstart", "did you mean 'quickstart'?"), ("zzz", "recipes ls`"),
                       ("../recipes/chat", "'../recipes/chat'")):  # fmt: skip
        assert main(["recipes", "cp", name, "here"]) == 2
        assert told in capsys.readouterr().err
    assert not Path("here").exists()
    assert main(["init", "here", "--preset", "qlora1gpu"]) == 2
    assert "there is no 'qlora1gpu'; did you mean 'qlora-1gpu'?" in capsys.readouterr().err


def test_the_list_has_every_recipe_with_what_it_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *NAMES]
    assert main(["recipes", "ls", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == NAMES
    assert all(one["purpose"] and Path(one["path"]).is_file() for one in found)
    assert {one["preset"] for one in found} == {*PRESETS, None}
    assert len(list(shipped_recipes())) == len(NAMES)
