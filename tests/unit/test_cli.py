"""The command line as a user meets it: exit codes, one-line errors, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common import paths
from peft_dist.config import load_recipe
from peft_dist.launch import packages, run_here
from peft_dist.launch.launcher_process import Ended
from peft_dist.run.directory import RunDir

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))

# Stands where launch/train.py does: the real launcher starts it, no model is needed.
WORKER = """
import json, os, sys, time
from pathlib import Path
recipe = Path(sys.argv[1])
facts = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "ACCELERATE_USE_FSDP")}
(recipe.parent / f"rank-{facts['RANK']}.json").write_text(json.dumps(facts))
"""
DONE = "(recipe.parent / 'result.json').write_text('{}')\n"


def outcome(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str) -> None:
    """Make an installation whose worker is the given script."""
    package = tmp_path / "installed" / "peft_dist"
    package.mkdir(parents=True)
    assert main(["init", str(package / "_share")]) == 0
    (package / "_share" / "launch" / "train.py").write_text(worker, encoding="utf-8")
    monkeypatch.setattr(paths, "__file__", str(package / "common" / "paths.py"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tmp_path / ".cache/peft-dist/models/smollm2-135m-instruct"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    code, out, err = outcome(capsys, "validate", str(recipe))
    assert (code, err) == (0, "")
    assert out.startswith(f"{recipe}: valid\n")


def test_the_small_shipped_recipes_are_three_uses_and_the_methods() -> None:
    methods = ["bitfit", "bottleneck", "prefix", "prompt", "quickstart"]
    small = [path.stem for path in RECIPES if not re.search(r"-\d|\dk?b-", path.stem)]
    assert small == sorted(["chat", "classify", "dpo", *methods])


def test_validate_tells_how_a_step_is_made(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = outcome(
        capsys, "validate", str(recipe_file), "parallel.processes=2", "train.steps=10"
    )
    assert code == 0
    assert "processes: 2 (fsdp)" in out
    assert "a step: 16 rows, 8 per process in 2 passes of up to 4" in out
    assert "the run: 10 steps, 160 rows" in out
    words = ["parallel.processes=2", "train.steps=1", "train.global_batch_size=17"]
    assert "17 rows, at most 9 per" in outcome(capsys, "validate", str(recipe_file), *words)[1]
    words = ["parallel.processes=1", "train.steps=1", "train.global_batch_size=1"]
    told = outcome(capsys, "validate", str(recipe_file), *words)[1]
    assert "a step: 1 row in 1 pass of up to 4" in told and "the run: 1 step, 1 row" in told


def test_validate_and_a_dry_run_can_be_read_by_programs(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(recipe_file), "parallel.processes=2", "train.steps=10", "--json"]
    found = json.loads(outcome(capsys, "validate", *words)[1])
    assert found["batch"] == {
        "rows": 16, "rows_per_process": 8, "passes": 2, "micro_batch_size": 4
    }  # fmt: skip
    assert (found["valid"], found["processes"], found["steps"]) == (True, 2, 10)
    assert found["recipe"]["train"]["weight_decay"] == 0.0, "with every default"
    run = tmp_path / "never"
    code, out, _ = outcome(capsys, "train", *words, "--dry-run", "--run-dir", str(run))
    found = json.loads(out)
    assert (code, found["run_dir"]) == (0, str(run))
    assert found["recipe"]["train"]["steps"] == 10
    assert found["command"][-1] == str(run / "recipe.yaml")
    assert outcome(capsys, "train", *words)[0] == 2
    assert not run.exists()


def test_schema_is_json_and_carries_the_texts(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "schema")
    schema = json.loads(out)
    assert code == 0
    assert (
        "Peak learning rate"
        in schema["$defs"]["Train"]["properties"]["learning_rate"]["description"]
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required: COMMAND; see peft-dist --help"),
        (["trian"], "there is no 'trian'; did you mean 'train'?"),
        (["validate"], "required: RECIPE"),
        (["validate", "absent.yaml"], "absent.yaml: no such file"),
        (["validate", "absent.yaml", "--quick"], "unrecognized argument '--quick'"),
        (["schema", "now"], "unrecognized argument 'now'"),
        (["train", "absent.yaml", "--nproc", "0"], "got '0'; must be a whole number above 0"),
        (["train", "absent.yaml", "--nproc", "9" * 20], "must be a whole number above 0"),
        (["evaluate", "absent"], "absent: is no folder"),
        (["merge", "absent", "--out", "merged"], "absent: is no folder"),
        (["merge", "absent"], "required: --out; see peft-dist merge --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    code, _, err = outcome(capsys, *argv)
    assert code == 2
    assert err.startswith("peft-dist: error: ")
    assert expected in err
    assert len(err.splitlines()) == 1


def test_a_dry_run_prints_recipe_and_command_and_makes_nothing(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = outcome(
        capsys, "train", str(recipe_file), "--nproc", "2", "train.steps=3", "--dry-run",
        "train.seed=4",
    )  # fmt: skip
    assert code == 0
    assert sorted(tmp_path.rglob("*")) == before
    text, command = out.rstrip().rsplit("\n\n", 1)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(text, encoding="utf-8")
    recipe = load_recipe(resolved)
    assert (recipe.train.steps, recipe.train.seed, recipe.parallel.processes) == (3, 4, 2)
    assert "-m accelerate.commands.launch --config_file" in command
    assert command.endswith(f"launch/train.py {tmp_path}/runs/recipe-under-test/recipe.yaml")


def test_missing_training_packages_are_named_with_the_extra(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "TRAIN_PACKAGES", ("torch_is_absent", "sys"))
    for argv in (["train", str(recipe_file), "--run-dir", "never"], ["quantize", "model"]):
        code, _, err = outcome(capsys, *argv)
        assert code == 2
        assert "torch_is_absent not installed; pip install 'peft-dist[train]'" in err
    assert not Path("never").exists()


def test_init_copies_what_a_user_needs_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine"
    assert main(["init", str(target)]) == 0
    assert (target / "launch" / "train.py").is_file()
    assert (target / "launch" / "strategies" / "fsdp.yaml").is_file()
    assert (target / "configs" / "recipes" / "quickstart.yaml").is_file()
    assert not list(target.rglob("__pycache__"))
    assert main(["validate", str(target / "configs" / "recipes" / "chat.yaml")]) == 0
    edited = target / "configs" / "recipes" / "chat.yaml"
    edited.write_text("mine", encoding="utf-8")
    (target / "launch" / "train.py").unlink()
    code, _, err = outcome(capsys, "init", str(target))
    assert code == 2
    assert "already there" in err
    assert edited.read_text(encoding="utf-8") == "mine"
    assert not (target / "launch" / "train.py").exists()


def test_a_start_says_what_it_is_about_before_any_process_is_started(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(packages, "TRAIN_PACKAGES", ())
    seen: list[str] = []

    def launched(*_: object, **__: object) -> Ended:
        seen.extend(caplog.messages)
        return Ended(1)

    monkeypatch.setattr(run_here, "run_launcher", launched)
    run = tmp_path / "run"
    one, two = (recipe_file.parent / name for name in ("train.jsonl", "two.jsonl"))
    two.write_bytes(one.read_bytes())
    mixture = "data.train=[{path: train.jsonl, weight: 3}, {path: two.jsonl, weight: 1}]"
    main(["train", str(recipe_file), mixture, "--run-dir", str(run), "--nproc", "2"])
    assert seen[0] == f"run directory: {run}"
    assert f"(nf4), lora adapters; rows: {one}, {two}" in seen[1]
    assert seen[2] == "starting 2 processes (fsdp) on the CPU; loading torch and transformers"


@pytest.mark.distributed
def test_train_starts_the_processes_on_the_run_directory(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installation(tmp_path, monkeypatch, WORKER + DONE)
    run = tmp_path / "run"
    code, _, err = outcome(capsys, "train", str(recipe_file), "--nproc", "2", "--run-dir", str(run))
    assert (code, err) == (0, "")
    assert load_recipe(run / "recipe.yaml").parallel.processes == 2
    facts = json.loads((run / "rank-1.json").read_text(encoding="utf-8"))
    assert facts == {"RANK": "1", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}


@pytest.mark.distributed
def test_the_run_says_how_a_worker_ended_not_the_launcher(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    worker = (
        "import sys\n"
        "from pathlib import Path\n"
        "from peft_dist.common.errors import TrainingError\n"
        "from peft_dist.run.directory import RunDir\n"
        "RunDir(Path(sys.argv[1]).parent).record_failure(TrainingError('loss nan at step 7'))\n"
        "sys.exit(3)\n"
    )
    installation(tmp_path, monkeypatch, worker)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = tmp_path / "run"
    arguments = (str(recipe_file), "--run-dir", str(run), "parallel.max_restarts=0")
    code, _, err = outcome(capsys, "train", *arguments)
    assert (code, err) == (3, "peft-dist: error: loss nan at step 7\n")
    # an old verdict says nothing of a new start
    (tmp_path / "installed/peft_dist/_share/launch/train.py").write_text("", encoding="utf-8")
    code, _, err = outcome(capsys, "train", *arguments)
    assert code == 1
    assert "a worker failed" in err


@pytest.mark.distributed
def test_resume_starts_the_runs_own_recipe_and_a_finished_run_not_at_all(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installation(tmp_path, monkeypatch, WORKER + DONE)
    run = RunDir.create(tmp_path / "run", load_recipe(recipe_file, ["train.steps=7"]))
    assert outcome(capsys, "resume", str(run.path), "parallel.strategy=ddp")[::2] == (0, "")
    recipe = load_recipe(run.recipe)
    assert (recipe.train.steps, recipe.parallel.strategy) == (7, "ddp")
    (run.path / "rank-0.json").unlink()
    code, out, err = outcome(capsys, "resume", str(run.path))
    assert (code, out, err) == (0, f"{run.path} has finished; nothing is left to do\n", "")
    for change in ("train.steps=9", "checkpoint.every_steps=3", "method.rank=4"):
        code, out, err = outcome(capsys, "resume", str(run.path), change)
        assert (code, out, err.count("\n")) == (2, "", 1), change
        assert f"has finished, and {change.partition('=')[0]} would be another: " in err
    for same in ("train.steps=7", "parallel.strategy=fsdp"):
        assert outcome(capsys, "resume", str(run.path), same)[0] == 0
    assert not (run.path / "rank-0.json").exists()
    code, _, err = outcome(capsys, "train", str(recipe_file), "--run-dir", str(run.path))
    assert code == 2
    assert "holds a run that has finished; choose another folder" in err
    words = ["train", str(recipe_file), "--run-dir", str(run.path), "train.steps=7"]
    for other in ("train.seed=5", "checkpoint.every_steps=3"):
        code, out, err = outcome(capsys, *words, other)
        assert (code, out) == (2, ""), other
        assert "holds a run that has finished; choose another folder" in err
    for same in ([], ["--nproc", "2"], ["parallel.strategy=fsdp"]):
        told = outcome(capsys, *words, *same)
        assert told == (0, f"{run.path} has finished; nothing is left to do\n", ""), same
    assert not (run.path / "rank-0.json").exists()
    code, _, err = outcome(capsys, "train", str(recipe_file), "--run-dir", str(run.path), "--fresh")
    assert (code, err) == (0, "")
    assert load_recipe(tmp_path / "run.old-1" / "recipe.yaml").train.steps == 7
    assert load_recipe(run.recipe).train.steps is None


@pytest.mark.distributed
def test_a_finished_run_goes_on_for_more_epochs_as_a_run_that_names_it(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installation(tmp_path, monkeypatch, WORKER + DONE)
    run = RunDir.create(tmp_path / "a run", load_recipe(recipe_file, ["train.steps=7"]))
    more = ("resume", str(run.path), "--more-epochs", "2", "--nproc", "1")
    code, _, err = outcome(capsys, *more)
    assert code == 2
    assert err == f"peft-dist: error: {run.path}: has not finished; leave --more-epochs out\n"
    run.result.write_text("{}", encoding="utf-8")
    code, _, err = outcome(capsys, *more, "train.learning_rate=1e-5")
    assert (code, err) == (0, "")
    new = load_recipe(tmp_path / "a run-plus-2-epochs" / "recipe.yaml", check_paths=False)
    assert new.method.start_from == str(run.path)
    assert (new.train.steps, new.train.epochs, new.train.learning_rate) == (None, 2, 1e-5)
    assert load_recipe(run.recipe).train.steps == 7

    dpo = load_recipe(recipe_file, ["objective.kind=dpo"])
    other = RunDir.create(tmp_path / "dpo", dpo)
    other.result.write_text("{}", encoding="utf-8")
    code, _, err = outcome(capsys, "resume", str(other.path), "--more-epochs", "1")
    assert code == 2
    assert "was trained against the adapter it started from" in err


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "resume", str(tmp_path / "absent"))
    assert code == 2
    (line,) = err.splitlines()
    assert "is no folder (recipe.yaml and run.json missing); name a folder that" in line


def test_changes_that_are_allowed_reach_the_workers(
    recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = outcome(
        capsys, "train", str(recipe_file), "--dry-run", "--allow-changed", "train.learning_rate"
    )
    assert code == 0
    assert "--allow-changed train.learning_rate" in out


def test_goodput_reads_the_ledger_of_a_run(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir.create(tmp_path / "run", load_recipe(recipe_file))
    step = {"attempt": 1, "time": 0.0, "at_s": 4.0, "event": "step", "step": 1, "loss": 1.0,
            "tokens_per_s": 2.0}  # fmt: skip
    run.ledger.write_text(json.dumps(step) + "\n", encoding="utf-8")
    code, out, err = outcome(capsys, "goodput", str(run.path), "--json")
    assert (code, err) == (0, "")
    assert isinstance(json.loads(out), dict)
    assert outcome(capsys, "goodput", str(run.path))[1].strip()


@pytest.mark.distributed
def test_a_workers_own_error_is_the_only_line_and_its_code_is_kept(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    worker = (
        "import sys\n"
        "from peft_dist.common.errors import DataError\n"
        "error = DataError('no rows', where='train.jsonl')\n"
        "print('noise', file=sys.stderr)\n"
        "from peft_dist.run.failure_files import write_failure\n"
        "write_failure(error, rank=0)\n"
        "sys.exit(error.exit_code)\n"
    )
    installation(tmp_path, monkeypatch, worker)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = tmp_path / "run"
    code, _, err = outcome(capsys, "train", str(recipe_file), "--run-dir", str(run))
    assert (code, err) == (2, "peft-dist: error: train.jsonl: no rows\n")
    told = (run / "logs" / "launcher.log").read_text(encoding="utf-8")
    assert "noise" in told
    assert told.endswith("peft-dist: the launcher ends, as its processes have: "
                         "rank 0 with exit code 2\n")  # fmt: skip
    for banner in ("Traceback", "ChildFailedError", "exitcode"):
        assert banner not in told


@pytest.mark.distributed
def test_a_crash_shows_the_end_of_the_log_and_where_it_is(
    recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installation(tmp_path, monkeypatch, "raise ValueError('a bug of ours')\n")
    run = tmp_path / "run"
    code, _, err = outcome(
        capsys, "train", str(recipe_file), "--run-dir", str(run), "parallel.max_restarts=1"
    )
    assert code == 1
    log = run / "logs" / "launcher.log"
    told = (
        f"a worker failed; see {log}; `peft-dist resume {run}` begins anew: there is no checkpoint"
    )
    assert err.splitlines()[-1] == f"peft-dist: error: {told}"
    assert log.read_text(encoding="utf-8").count("ValueError: a bug of ours") == 2  # one restart
    assert len(err.splitlines()) <= run_here.LOG_TAIL_LINES + 1


@pytest.mark.distributed
def test_ctrl_c_ends_every_worker(recipe_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from peft_dist.cli.main import main\n"
        "from peft_dist.common import paths\n"
        "paths.__file__ = sys.argv[1]\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    package = tmp_path / "installed" / "peft_dist"
    assert main(["init", str(package / "_share")]) == 0
    (package / "_share" / "launch" / "train.py").write_text(
        WORKER + "time.sleep(120)\n", encoding="utf-8"
    )
    run = tmp_path / "run"
    ours = subprocess.Popen(
        [sys.executable, "-c", code, str(package / "common" / "paths.py"),
         "train", str(recipe_file), "--nproc", "2", "--run-dir", str(run)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not all((run / f"rank-{rank}.json").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline
        assert ours.poll() is None
        time.sleep(0.1)
    ours.send_signal(signal.SIGINT)
    _, err = ours.communicate(timeout=60)
    assert ours.returncode == 75
    told = f"stopped by SIGINT; `peft-dist resume {run}` begins anew: there is no checkpoint"
    assert err == f"peft-dist: {told}\n"
    told = (run / "logs" / "launcher.log").read_text(encoding="utf-8")
    assert told.endswith("peft-dist: the launcher was ended by SIGTERM\n")
    assert "SignalException" not in told
    held = [
        folder
        for folder in Path("/proc").glob("[0-9]*")
        if str(run).encode() in ((folder / "cmdline").read_bytes() if folder.exists() else b"")
    ]
    assert not held
