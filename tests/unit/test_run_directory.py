"""Run directories: private, whole or not at all, never shared by two runs."""

import json
import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from peft_dist.common.errors import DataError, RunDirError, TrainingError
from peft_dist.config import Recipe, load_recipe, render_recipe
from peft_dist.run.directory import RunDir, write_text_atomic

DATED = "data.date=2026-01-31"


@pytest.fixture
def recipe(recipe_file: Path) -> Recipe:
    return load_recipe(recipe_file, [DATED])


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
    line = refusal(tmp_path / "a" / "b", recipe)
    assert line.startswith(f"{tmp_path}/a/b: cannot be made: {tmp_path}/a is a file; ")


def test_a_link_to_an_empty_folder_may_be_used(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to("there")
    run = RunDir.create(tmp_path / "a", recipe)
    assert (tmp_path / "a").is_symlink() and run.recipe.is_file()
    assert (tmp_path / "there" / "recipe.yaml").is_file()
    assert "holds another run" in refusal(tmp_path / "a", recipe)


def test_a_run_that_lies_where_it_cannot_be_written_any_more_is_refused(
    tmp_path: Path, recipe: Recipe
) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    run.path.rename(tmp_path / os.fsdecode(b"\xff"))
    with pytest.raises(RunDirError, match="is not UTF-8"):
        RunDir.claim(tmp_path / os.fsdecode(b"\xff"), recipe)


def test_a_failure_is_noted_once_with_its_time(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    assert run.read_failure() is None
    run.record_failure(DataError("no rows", where="train.jsonl"))
    first = run.read_failure()
    run.record_failure(TrainingError("a later one"))
    assert first is not None
    assert (first.exit_code, first.error) == (2, "train.jsonl: no rows")
    assert datetime.fromisoformat(first.time).tzinfo == UTC
    assert run.read_failure() == first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"exit_code": 3}', '{"exit_code": "x"}'])
def test_a_damaged_failure_still_asks_for_a_person(
    tmp_path: Path, recipe: Recipe, text: str
) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    run.failure.write_text(text, encoding="utf-8")
    found = run.read_failure()
    assert found is not None
    assert found.exit_code == 3
    assert "failure.json cannot be read" in found.error


def test_a_run_is_claimed_again_as_it_was(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.claim(tmp_path / "a", recipe, command=["first"])
    run.ledger.write_text("{}\n", encoding="utf-8")
    assert RunDir.claim(tmp_path / "a", recipe, command=["second"]) == run
    assert json.loads(run.run_facts.read_text(encoding="utf-8"))["command"] == ["first"]
    assert run.ledger.read_text(encoding="utf-8") == "{}\n"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".a", "a"))] == ["a"]


def test_a_run_keeps_the_date_of_its_first_start(tmp_path: Path, recipe_file: Path) -> None:
    undated = load_recipe(recipe_file)
    run = RunDir.create(tmp_path / "a", undated)
    today = load_recipe(run.recipe).data.date
    assert today is not None
    assert abs(today - datetime.now(UTC).date()) <= timedelta(days=1)
    first = load_recipe(recipe_file, ["data.date=2020-02-29"])
    run.recipe.write_text(render_recipe(first), encoding="utf-8")
    RunDir.claim(run.path, undated)  # years later
    assert load_recipe(run.recipe) == first
    RunDir.claim(run.path, load_recipe(recipe_file, [DATED]))
    assert str(load_recipe(run.recipe).data.date) == "2026-01-31"
    again = RunDir.claim(run.path, undated, fresh=True)
    assert load_recipe(again.recipe).data.date == today


def test_a_finished_run_is_refused_unless_it_is_set_aside(tmp_path: Path, recipe: Recipe) -> None:
    for number in (1, 2):
        run = RunDir.claim(tmp_path / "a", recipe)
        run.result.write_text(str(number), encoding="utf-8")
        with pytest.raises(RunDirError, match="has finished; choose another folder .* --fresh"):
            RunDir.claim(tmp_path / "a", recipe)
        fresh = RunDir.claim(tmp_path / "a", recipe, fresh=True)
        assert not fresh.is_finished
        aside = tmp_path / f"a.old-{number}"
        assert (aside / "result.json").read_text(encoding="utf-8") == str(number)


def changed(recipe_file: Path, *overrides: str) -> Recipe:
    return load_recipe(recipe_file, [DATED, *overrides])


def with_checkpoint(path: Path, recipe: Recipe) -> RunDir:
    run = RunDir.create(path, recipe)
    (run.checkpoints / "step-00000040").mkdir(parents=True)
    return run


def test_a_run_that_learns_otherwise_is_refused_with_the_difference(
    tmp_path: Path, recipe: Recipe, recipe_file: Path
) -> None:
    run = with_checkpoint(tmp_path / "a", recipe)
    other = changed(recipe_file, "train.learning_rate=1e-3", "method.rank=9", "train.seed=5")
    with pytest.raises(RunDirError) as caught:
        RunDir.claim(run.path, other)
    line = str(caught.value)
    assert line.startswith(f"{run.path}: method.rank is not what the run has been trained with: ")
    assert (
        "; train.learning_rate: " in line and "; train.seed: " in line and "; put it back" in line
    )
    assert (
        "--allow-changed method.rank --allow-changed train.learning_rate --allow-changed train.seed"
    ) in line
    assert load_recipe(run.recipe) == recipe
    with pytest.raises(RunDirError, match="train.seed is not what"):
        RunDir.claim(run.path, other, allow_changed=["method.rank", "train.learning_rate"])
    assert not run.next_recipe.exists()
    allowed = ["method.rank", "train.learning_rate", "train.seed"]
    RunDir.claim(run.path, other, allow_changed=allowed)
    assert load_recipe(run.next_recipe) == other


@pytest.mark.parametrize(
    "override",
    [
        "parallel.strategy=ddp",
        "parallel.processes=4",
        "checkpoint.every_steps=3",
        "data.max_length=77",
        "train.micro_batch_size=2",
        "train.activation_checkpointing=true",
        "train.non_finite=stop",
        "watchdog.min_s=3",
        "tracking.wandb.mode=offline",
    ],
)
def test_what_changes_nothing_that_is_learned_may_change(
    tmp_path: Path, recipe: Recipe, recipe_file: Path, override: str
) -> None:
    run = with_checkpoint(tmp_path / "a", recipe)
    other = changed(recipe_file, override)
    assert other != recipe
    RunDir.claim(run.path, other)
    assert load_recipe(run.recipe) == recipe, "the start that is claimed may still be refused"
    run.accept_recipe()
    assert load_recipe(run.recipe) == other
    assert not run.next_recipe.exists()


def test_a_recipe_that_no_start_went_on_by_is_forgotten_with_the_next_claim(
    tmp_path: Path, recipe: Recipe, recipe_file: Path
) -> None:
    run = with_checkpoint(tmp_path / "a", recipe)
    RunDir.claim(run.path, changed(recipe_file, "parallel.strategy=ddp"))
    RunDir.claim(run.path, recipe)
    assert not run.next_recipe.exists()
    run.accept_recipe()
    assert load_recipe(run.recipe) == recipe


def test_a_run_without_a_checkpoint_may_change_in_anything(
    tmp_path: Path, recipe: Recipe, recipe_file: Path
) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    other = changed(recipe_file, "train.seed=5")
    RunDir.claim(run.path, other)
    assert load_recipe(run.recipe) == other


def test_a_run_whose_recipe_is_gone_is_not_claimed(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    run.recipe.unlink()
    with pytest.raises(RunDirError, match="recipe.yaml missing"):
        RunDir.claim(run.path, recipe)


def test_a_claim_takes_no_folder_with_something_else(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x", encoding="utf-8")
    for fresh in (False, True):
        with pytest.raises(RunDirError, match="holds 'thesis.tex' already"):
            RunDir.claim(tmp_path / "a", recipe, fresh=fresh)
    for path in (tmp_path / ("x" * 300), "a\0b"):
        with pytest.raises(RunDirError, match="a name of more than|in its name"):
            RunDir.claim(path, recipe)


def test_the_newest_step_is_read_from_the_names(tmp_path: Path, recipe: Recipe) -> None:
    run = RunDir.create(tmp_path / "a", recipe)
    assert (run.newest_step(), run.has_checkpoints) == (0, False)
    unusable = (".step-00000200-a00000001-x", "bad-step-00000300")
    for name in ("step-00000040", "step-00000120", *unusable):
        (run.checkpoints / name).mkdir(parents=True)
    assert (run.newest_step(), run.has_checkpoints) == (120, True)


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
    assert not list(tmp_path.glob(".a-making*"))


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
        "from peft_dist.run.directory import write_text_atomic\n"
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
        "from peft_dist.run.directory import RunDir\n"
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
    assert not list((tmp_path / "runs").iterdir())


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
