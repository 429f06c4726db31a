"""Run directories: private, whole or not at all, never shared by two runs."""

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from peft_dist.config import Recipe, load_recipe
from peft_dist.errors import DataError, RunDirError
from peft_dist.run_dir import RunDir, write_text_atomic


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file)


def refusal(path: Path, recipe: Recipe) -> str:
    with pytest.raises(RunDirError) as caught:
        RunDir.create(path, recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_run_holds_its_recipe_and_facts(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "runs" / "a", recipe, command=["peft-dist", "train"])
    assert load_recipe(run.recipe) == recipe
    facts = json.loads(run.run_facts.read_text(encoding="utf-8"))
    assert facts["command"] == ["peft-dist", "train"]
    assert facts["versions"]
    assert facts["python"] == sys.version.split()[0]
    assert RunDir.open(run.path) == run
    assert RunDir.enclosing(run.recipe) == run


def test_nobody_else_can_read_a_run(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    for path in [run.path, *run.path.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_git_revision_of_the_current_folder_is_recorded(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["init", "-q"],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m", "--allow-empty"],
    ):
        subprocess.run(["git", *arguments], check=True)
    run = RunDir.create(tmp_path / "a", recipe)
    git = json.loads(run.run_facts.read_text(encoding="utf-8"))["git"]
    assert len(git["revision"]) == 40
    assert git["modified"] is False


def test_an_empty_folder_may_be_used(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "a").mkdir()
    assert RunDir.create(tmp_path / "a", recipe).recipe.is_file()


def test_another_run_is_never_overwritten(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    before = run.run_facts.read_bytes()
    assert "holds another run; choose another folder with --run-dir" in refusal(run.path, recipe)
    assert run.run_facts.read_bytes() == before


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x", encoding="utf-8")
    assert "holds 'thesis.tex' already" in refusal(tmp_path / "a", recipe)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_a_file_in_the_way_is_named(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "a").write_text("x", encoding="utf-8")
    assert "is a file" in refusal(tmp_path / "a", recipe)
    assert "cannot be written" in refusal(tmp_path / "a" / "b", recipe)
    assert "cannot be written" in refusal(tmp_path / ("x" * 300), recipe)


def test_a_run_that_failed_before_its_first_step_may_be_replaced(
    tmp_path: Path, recipe: Recipe
) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    run.launcher_log.write_text("traceback", encoding="utf-8")
    run.record_failure(DataError("no rows", where="train.jsonl"))
    run.record_failure(DataError("a later one"))
    facts = json.loads(run.failure.read_text(encoding="utf-8"))
    assert facts == {"exit_code": 2, "error": "train.jsonl: no rows"}
    again = RunDir.create(tmp_path / "a", recipe)
    assert not again.failure.exists()
    assert not again.launcher_log.exists()


def test_a_run_that_failed_later_is_kept(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    run.record_failure(DataError("NaN"))
    run.ledger.write_text('{"step": 1}\n', encoding="utf-8")
    assert "holds another run" in refusal(run.path, recipe)
    assert run.ledger.exists()


def test_a_failed_run_with_a_stranger_in_it_is_kept(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    run.record_failure(DataError("no rows"))
    (run.path / "notes.txt").write_text("x", encoding="utf-8")
    assert "holds another run" in refusal(run.path, recipe)


def test_of_many_launches_at_once_one_gets_the_folder(tmp_path: Path, recipe: Recipe) -> None:
    def attempt(_: int) -> bool:
        try:
            RunDir.create(tmp_path / "a", recipe)
        except RunDirError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
    assert RunDir.open(tmp_path / "a").recipe.is_file()


def test_a_folder_without_a_run_is_not_opened(tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path, "holds no run (recipe.yaml and run.json missing)"),
        (tmp_path / "absent", "is no folder"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(RunDirError) as caught:
            RunDir.open(path)
        assert expected in str(caught.value)


def test_a_recipe_of_the_user_is_in_no_run(tmp_path: Path, recipe_file: Path) -> None:
    assert RunDir.enclosing(recipe_file) is None
    (tmp_path / "recipe.yaml").write_bytes(recipe_file.read_bytes())
    assert RunDir.enclosing(tmp_path / "recipe.yaml") is None


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_text_atomic(path, "old")
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from peft_dist.run_dir import write_text_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text_atomic(Path(sys.argv[1]), 'x' * 5000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    assert "RunDirError" in done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_full_disk_leaves_no_half_run(tmp_path: Path, recipe_file: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from peft_dist.config import load_recipe\n"
        "from peft_dist.run_dir import RunDir\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "recipe = load_recipe(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "RunDir.create(sys.argv[2], recipe)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(recipe_file), str(tmp_path / "runs" / "a")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "recipe.yaml: cannot be written: File too large" in done.stderr
    assert not (tmp_path / "runs" / "a").exists()


def test_a_folder_that_may_not_be_written_is_named(recipe: Recipe) -> None:
    nobody, ourselves = 65534, os.geteuid()
    with TemporaryDirectory() as folder:
        locked = Path(folder) / "locked"
        locked.mkdir(mode=0o500)
        if ourselves == 0:  # who may write everywhere
            Path(folder).chmod(0o755)
            os.chown(locked, nobody, -1)
            os.seteuid(nobody)
        try:
            said = refusal(locked / "a", recipe)
        finally:
            os.seteuid(ourselves)
    assert "cannot be written: Permission denied" in said
    assert str(locked) in said
