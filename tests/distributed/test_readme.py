"""Every command of README and docs runs, on a tiny model in the real one's place."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peft_dist.config import load_recipe
from tests.processes import ROOT, environment, run
from tests.tiny import tiny_model

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")
SMALLER = ["train.steps=2", "evaluate.max_rows=4", "data.max_length=256"]
TRAINS = ("peft-dist train", "accelerate launch", "torchrun")


def blocks(language: str) -> list[str]:
    """Return all blocks of a language, in order."""
    texts = [document.read_text(encoding="utf-8") for document in DOCUMENTS]
    return re.findall(rf"```{language}\n(.*?)```", "\n".join(texts), flags=re.DOTALL)


def commands() -> list[str]:
    """Return the lines of all shell blocks, in order, without comments."""
    lines = [line.split("  #")[0].strip() for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a checkout's, whose home holds a tiny model where the recipe looks."""
    folder = tmp_path_factory.mktemp("readme")
    tiny_model(folder / ".cache/peft-dist/models/smollm2-135m-instruct", "llama")
    for name in ("launch", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def at_home(home: Path) -> dict[str, str]:
    """Return the environment of a user who lives there and has our commands on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment(home / ".cache/peft-dist", HOME=str(home), PATH=path)


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_every_command_and_every_python_block_of_readme_and_docs_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(commands()) >= 20
    for command in commands():
        if "<(" in command:  # is for a shell
            script = command.replace("peft-dist", f"{sys.executable} -m peft_dist")
            done = run(["bash", "-c", script], cwd=home, environment=at_home(home))
            assert (done.returncode, done.stderr) == (0, ""), command
            continue
        words = shlex.split(command)
        words = [str(Path(word).expanduser()) if word.startswith("~") else word for word in words]
        words = [word.replace(str(Path.home()), str(home)) for word in words]
        if words[0] == "peft-dist":
            words[:1] = [sys.executable, "-m", "peft_dist"]
        if command.startswith(TRAINS):
            # An array's runs are trained in test_sweep_here.py.
            words += ["--dry-run"] if "--array" in words else SMALLER
        done = run(words, cwd=home, environment=at_home(home), timeout_s=120)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    adapters = sorted(path.parent.name for path in (home / "runs").glob("*/adapter"))
    assert adapters == ["a", "b", "quickstart"]
    monkeypatch.chdir(home)
    assert len(blocks("python")) >= 2
    for code in blocks("python"):
        exec(compile(code, "a block of the documents", "exec"), {})


def test_every_recipe_of_readme_and_docs_is_valid(tmp_path: Path) -> None:
    assert len(blocks("yaml")) >= 3
    for number, text in enumerate(blocks("yaml")):
        path = tmp_path / f"{number}.yaml"
        whole = text if "model:" in text else f"model: {{name: someone/a-model}}\n{text}"
        path.write_text(whole, encoding="utf-8")
        load_recipe(path, check_paths=False)


@pytest.mark.distributed
def test_the_lines_that_a_run_ends_with_load_its_adapter(home: Path) -> None:
    recipe = home / "configs/recipes/quickstart.yaml"
    words = [sys.executable, "-m", "peft_dist", "train", str(recipe), "--run-dir", "runs/lines"]
    done = run([*words, *SMALLER], cwd=home, environment=at_home(home), timeout_s=120)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.split("load it:")[1].splitlines()]
    code = "\n".join([*filter(None, lines), "print(model.active_adapter, len(tokenizer))"])
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home, env=at_home(home), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert loaded.stdout.startswith("default "), loaded.stderr


def test_make_has_the_targets_that_the_documents_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set()
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named |= set(re.findall(r"^ {4}make ([a-z-]+)", text, re.M))
    assert {"quickstart", "test", "install", "check"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_files_that_the_documents_name_exist() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:configs|launch|tests|benchmarks|peft_dist)/[\w./-]*)`", text):
            known = (ROOT / path).exists() or (ROOT / "peft_dist" / path).exists()
            assert known or path == "peft_dist/_share/", path  # only an installed wheel has that
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
            assert (document.parent / link).exists(), (document.name, link)


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1300
