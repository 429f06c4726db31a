"""Whole commands: every way to launch, and how each fault ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_dist.entrypoints import train
from peft_dist.ledger.events import EndEvent, StartEvent
from peft_dist.ledger.goodput import goodput
from peft_dist.ledger.reader import LedgerReader
from peft_dist.run.provenance import versions
from peft_dist.worker.signals import StopRequests
from tests.disks import tmpfs
from tests.faults.long import cases, only_long
from tests.processes import ROOT, environment, error_lines, free_port, run, torchrun
from tests.tiny import completion_rows, labelled_rows, tiny_model, write_jsonl

pytestmark = pytest.mark.distributed

STEPS = 4
RECIPE = f"""
model: {{name: model, dtype: float32}}
quantization: nf4
method: {{kind: lora, rank: 4, alpha: 8}}
data: {{train: rows.jsonl, eval: held.jsonl}}
train: {{steps: {STEPS}, global_batch_size: 8, micro_batch_size: 2, learning_rate: 5e-3}}
evaluate: {{every_steps: 2, choices: [" cat", " dog"]}}
checkpoint: {{every_steps: 1, keep_last: 2}}
"""
LONGER = "train.steps=60"
PEFT_DIST = [sys.executable, "-m", "peft_dist"]
WAYS = {
    "peft-dist": [*PEFT_DIST, "train", "recipe.yaml", "--nproc", "2"],
    "accelerate": [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / "launch" / "strategies" / "fsdp.yaml"),
        "--main_process_port", str(free_port()),
        str(ROOT / "launch" / "train.py"), "recipe.yaml",
    ],
    "torchrun": [*torchrun(2), str(ROOT / "launch" / "train.py"), "recipe.yaml"],
    "python": [sys.executable, str(ROOT / "launch" / "train.py"), "recipe.yaml"],
}  # fmt: skip
OTHERS = {
    "ddp": [*WAYS["peft-dist"], "parallel.strategy=ddp"],
    "hsdp": [*WAYS["peft-dist"][:-1], "4", "parallel.strategy=hsdp", "parallel.shard_size=2"],
}
"""Other strategies; the ways above are all fsdp."""


def make_project(folder: Path) -> Path:
    """Make a folder with a recipe, its rows and its model."""
    tiny_model(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", completion_rows(32))
    write_jsonl(folder / "held.jsonl", completion_rows(11, seed=1))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the recipe was launched in every way."""
    folder = make_project(tmp_path_factory.mktemp("ways"))
    for way, command in (WAYS | OTHERS).items():
        done = start(folder, [*command, "--run-dir", f"runs/{way}"])
        assert done.returncode == 0, done.stderr[-4000:]
        (folder / f"{way}.out").write_text(done.stdout, encoding="utf-8")
    return folder


def start(folder: Path, command: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a project folder, with a cache that only this project uses."""
    return run(command, environment=environment(folder / "cache", **extra), cwd=folder)


def result(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    return found


def ledger(run_dir: Path, event: str) -> list[dict[str, Any]]:
    lines = (run_dir / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if (record := json.loads(line))["event"] == event]


def attempts(run_dir: Path) -> list[str]:
    """Return how each attempt ended."""
    records = sorted((run_dir / "attempts").glob("????????.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["outcome"] for path in records]


def nothing_was_made(run_dir: Path) -> bool:
    """Whether a run left neither an adapter, whole or half, nor a result."""
    names = [path.name for path in run_dir.rglob("*")]
    return not any("adapter" in name or name == "result.json" for name in names)


@pytest.mark.parametrize("way", WAYS | OTHERS)
def test_every_way_to_launch_gives_the_same_losses(runs: Path, way: str) -> None:
    expected = [record["loss"] for record in ledger(runs / "runs" / "python", "step")]
    assert len(expected) == STEPS
    found = [record["loss"] for record in ledger(runs / "runs" / way, "step")]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("way", WAYS | OTHERS)
def test_every_way_to_launch_gives_the_same_adapter(runs: Path, way: str) -> None:
    expected = load_file(runs / "runs" / "python" / "adapter" / "adapter_model.safetensors")
    found = load_file(runs / "runs" / way / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=0)


@pytest.mark.parametrize("way", WAYS | OTHERS)
def test_the_run_directory_holds_what_is_promised(runs: Path, way: str) -> None:
    folder = runs / "runs" / way
    found = result(folder)
    processes = {"python": 1, "hsdp": 4}.get(way, 2)
    copies = 2 if way in OTHERS else 1
    assert found["world_size"] == processes
    assert found["strategy"] == (way if way in OTHERS else "fsdp")
    assert len(found["base_bytes_per_rank"]) == len(found["peak_rss_bytes_per_rank"]) == processes
    assert sum(found["base_bytes_per_rank"]) == copies * found["base_bytes_total"]
    for name in ("trainable_parameters", "load_seconds", "train_seconds", "tokens_per_second"):
        assert found[name] > 0
    for which in ("first", "last"):
        assert found["eval"][which].keys() >= {"loss", "accuracy"}
    steps = ledger(folder, "step")
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    wanted = {"step", "loss", "lr", "tokens", "tokens_per_s", "peak_memory_bytes", "grad_norm"}
    assert all(record.keys() >= wanted for record in steps)
    for record in steps:
        assert len(record["rank_step_s"]) == len(record["rank_memory_bytes"]) == processes
        assert min(record["rank_step_s"]) > 0 and min(record["rank_memory_bytes"]) > 50e6
        assert record["mfu"] is None
    assert [record["step"] for record in ledger(folder, "evaluation")] == [0, 2, 4]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "step-00000003",
        "step-00000004",
    }
    assert [record["step"] for record in ledger(folder, "saved")] == [1, 2, 3, 4]
    (begun,) = ledger(folder, "start")
    assert begun["world_size"] == processes
    assert begun["hosts"] == [os.uname().nodename] * processes
    assert (begun["device"], begun["versions"]) == ("cpu", versions())
    assert begun["base_bytes_per_rank"] == found["base_bytes_per_rank"]
    assert begun["base_parameters"] > 10_000
    assert "slurm_job_id" not in begun
    assert [record["outcome"] for record in ledger(folder, "end")] == ["done"]
    assert attempts(folder) == ["done"]
    assert not (folder / "failure.json").exists()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder, *folder.rglob("*")))


@pytest.mark.parametrize("way", WAYS)
def test_progress_into_a_pipe_is_plain_lines_with_the_ledgers_figures(runs: Path, way: str) -> None:
    text = (runs / f"{way}.out").read_text(encoding="utf-8")
    assert all(character.isprintable() or character == "\n" for character in text)
    lines = [line.partition("] ")[2] for line in text.splitlines()]
    stages = ("libraries loaded  ", "rows: ", "model: ", "base: ", "shards: ", "saving and reading",
              "training: ", "step 1/")  # fmt: skip
    at = [next(n for n, line in enumerate(lines) if line.startswith(stage)) for stage in stages]
    assert at == sorted(at), "every stage of a start has its line, in order"
    shown = [line for line in lines if line.startswith("step ") and "tok/s" in line]
    steps = ledger(runs / "runs" / way, "step")
    expected = [
        f"step {r['step']}/{STEPS}  loss {r['loss']:.4f}  {r['tokens_per_s']:,.0f} tok/s"
        for r in steps
        if r["step"] in (1, STEPS)
    ]
    assert [line.partition(" tok/s")[0] + " tok/s" for line in shown] == expected


@only_long
def test_the_machine_and_the_job_of_a_run_stand_in_its_ledger(project: Path) -> None:
    command = [*WAYS["python"], "tracking.system_every_s=0.1", LONGER, "evaluate.every_steps=30"]
    done = start(project, command, SLURM_JOB_ID="4711", SLURM_RESTART_COUNT="0")
    assert done.returncode == 0, done.stderr[-4000:]
    folder = project / "runs" / "recipe"
    (begun,) = ledger(folder, "start")
    assert (begun["slurm_job_id"], begun["slurm_restart_count"]) == ("4711", 0)
    machine = ledger(folder, "system")
    assert machine
    assert all(0 <= record["cpu_percent"] <= 100 for record in machine)
    assert all(0 <= record["step"] <= 60 for record in machine)
    events = list(LedgerReader(folder / "ledger.jsonl").all())
    assert isinstance(events[0], StartEvent) and isinstance(events[-1], EndEvent)
    figures = goodput(events)
    lasted_s = events[-1].time - (events[0].time - events[0].at_s)
    assert figures.total_s == pytest.approx(lasted_s, rel=0.01)


def test_the_end_says_what_came_of_it(runs: Path) -> None:
    text = (runs / "peft-dist.out").read_text(encoding="utf-8")
    found = result(runs / "runs" / "peft-dist")
    assert f"{found['eval']['first']['accuracy']:.3f} before" in text
    assert str(runs / "runs" / "peft-dist" / "adapter") in text
    assert "from_pretrained" in text


def test_an_evaluation_gives_the_runs_own_last_score(runs: Path) -> None:
    folder = runs / "runs" / "peft-dist"
    command = [sys.executable, "-m", "peft_dist", "evaluate", str(folder)]
    done = start(runs, command)
    assert done.returncode == 0, done.stderr
    scored = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    last = result(folder)["eval"]["last"]
    assert scored["loss"] == pytest.approx(last["loss"], abs=1e-5)
    assert scored["accuracy"] == last["accuracy"]
    assert f"accuracy {last['accuracy']:.3f}" in done.stdout


def test_the_last_copy_is_the_adapter_and_loads_with_peft(runs: Path) -> None:
    folder = runs / "runs" / "torchrun"
    copy = folder / "checkpoints" / f"step-{STEPS:08d}"
    (file,) = copy.rglob("adapter_model.safetensors")
    assert file.read_bytes() == (folder / "adapter" / file.name).read_bytes()
    base = AutoModelForCausalLM.from_pretrained(runs / "model")
    PeftModel.from_pretrained(base, folder / "adapter")


def test_a_finished_run_is_not_trained_again(runs: Path) -> None:
    before = (runs / "runs" / "python" / "ledger.jsonl").read_bytes()
    done = start(runs, [*WAYS["peft-dist"], "--run-dir", "runs/python"])
    assert done.returncode == 0, done.stderr
    assert "runs/python has finished; nothing is left to do" in done.stdout
    for way in (WAYS["python"], [*WAYS["peft-dist"], "train.seed=5"]):
        done = start(runs, [*way, "--run-dir", "runs/python"])
        assert done.returncode == 2
        (line,) = error_lines(done)
        assert "holds a run that has finished; choose another folder with --run-dir" in line
    assert (runs / "runs" / "python" / "ledger.jsonl").read_bytes() == before


def test_fresh_keeps_the_run_that_was_there(runs: Path, project: Path) -> None:
    shutil.copytree(runs / "runs" / "python", project / "run")
    done = start(
        project,
        [*WAYS["python"], "--run-dir", "run", "train.steps=1", "profile.steps=[1,1]", "--fresh"],
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (project / "run" / "profile").iterdir()] == [
        "steps-1-1-a1-rank-0.json.gz"
    ]
    assert result(project / "run.old-1").keys() == result(project / "run").keys()
    assert (project / "run.old-1" / "adapter").is_dir()
    assert attempts(project / "run") == ["done"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["model.name=./absent"], "model.name"),
        (["data.train=absent.jsonl"], "absent.jsonl"),
        (["data.train=empty.jsonl"], "empty.jsonl"),
        (["method.targets=[q_prj]"], "did you mean 'q_proj'?"),
        (["parallel.processes=3"], "parallel.processes: the recipe says 3, the launcher started 1"),
        (["evaluate.choices=[' cat', ' log']"], "evaluate.choices: row "),
    ],
)
@pytest.mark.usefixtures("alone")
def test_a_fault_is_one_line_and_leaves_nothing(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    expected: str,
) -> None:
    (project / "empty.jsonl").write_text("", encoding="utf-8")
    monkeypatch.chdir(project)
    monkeypatch.setenv("PEFT_DIST_CACHE", str(project / "cache"))
    monkeypatch.setattr(
        "peft_dist.worker.signals.install", StopRequests
    )  # pytest keeps its own handlers
    code = train.main(["recipe.yaml", "--run-dir", "run", "checkpoint.every_steps=null", *changes])
    errors = capsys.readouterr().err
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("peft-dist: error:")]
    assert expected in line
    assert "Traceback" not in errors
    assert nothing_was_made(project / "run")


def test_a_fault_of_two_processes_is_one_line_of_the_command(project: Path) -> None:
    done = start(project, [*WAYS["peft-dist"], "--run-dir", "run", "train.learning_rate=1e30",
                           "train.max_grad_norm=0", "train.steps=30", "train.non_finite=stop",
                           "checkpoint.every_steps=null"])  # fmt: skip
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("peft-dist: error: train.non_finite: loss ")
    assert nothing_was_made(project / "run")
    failure = json.loads((project / "run" / "failure.json").read_text(encoding="utf-8"))
    assert failure["exit_code"] == 3
    # torchrun starts the processes again for any exit code; the verdict stands
    assert attempts(project / "run") == ["failed"]


DISK_BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a disk of its own, of 4 MB."""
    with tmpfs(tmp_path / "disk", f"size={DISK_BYTES}") as folder:
        yield folder


@only_long
@pytest.mark.parametrize("left", [300_000, 24_000][: cases(1, 2)])  # adapter, ledger
def test_a_full_disk_is_one_line_and_freeing_it_is_all_that_it_takes(
    project: Path, small_disk: Path, left: int
) -> None:
    taken, folder = small_disk / "taken", small_disk / "run"
    taken.write_bytes(bytes(DISK_BYTES - left))
    done = start(
        project,
        [*WAYS["peft-dist"], "--run-dir", str(folder), "method.rank=64",
         "train.steps=60", "checkpoint.every_steps=null"],
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"peft-dist: error: {folder}: ")
    assert "MB are free, and the run writes 3.7 MB: an adapter of 0.5 MB and 2 checkp" in line
    assert nothing_was_made(folder) and not (folder / "ledger.jsonl").exists()
    taken.unlink()
    resumed = start(project, [*PEFT_DIST, "resume", str(folder)])
    assert resumed.returncode == 0, resumed.stderr
    steps = [record for record in ledger(folder, "step") if record["attempt"] == 2]
    assert [record["step"] for record in steps] == list(range(1, 61))
    assert result(folder)["steps"] == 60
    assert not (folder / "failure.json").exists()


def processes_of(folder: Path) -> list[int]:
    """Return the processes that were started with the cache in a folder."""
    mark = f"PEFT_DIST_CACHE={folder / 'cache'}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def stopped(project: Path, command: list[str], *, number: int, processes: int) -> str:
    """Start a command, send it a signal once it trains, and return what it said of that."""
    ours = subprocess.Popen(
        [*command, "--run-dir", "run", LONGER],
        cwd=project,
        env=environment(project / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    book, deadline = project / "run" / "ledger.jsonl", time.monotonic() + 120
    while not (book.exists() and book.read_text(encoding="utf-8").count('"step"') > 6):
        assert time.monotonic() < deadline
        assert ours.poll() is None
        time.sleep(0.05)
    assert len(processes_of(project)) >= processes
    ours.send_signal(number)
    _, errors = ours.communicate(timeout=60)
    assert ours.returncode == 75, errors
    deadline = time.monotonic() + 10
    while processes_of(project):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return errors


def test_a_stopped_command_saves_and_says_how_to_go_on(project: Path) -> None:
    # the command, the launcher, two workers
    errors = stopped(project, WAYS["peft-dist"], number=signal.SIGTERM, processes=4)
    run_dir = project / "run"
    newest = max(path.name for path in (run_dir / "checkpoints").iterdir())
    step = int(newest.removeprefix("step-"))
    assert 0 < step < 60
    told = f"stopped by SIGTERM; `peft-dist resume {run_dir}` goes on after step {step}"
    assert errors == f"peft-dist: {told}\n"
    assert nothing_was_made(run_dir / "logs")
    assert not (run_dir / "adapter").exists()
    assert not (run_dir / "failure.json").exists()
    assert attempts(run_dir) == ["interrupted"]


def test_without_our_command_the_same_command_goes_on(project: Path) -> None:
    errors = stopped(project, WAYS["python"], number=signal.SIGUSR1, processes=1)
    assert "stopped after step" in errors
    assert "the same command goes on" in errors
    other = start(project, [*WAYS["python"], "--run-dir", "run", LONGER, "train.learning_rate=1"])
    assert other.returncode == 2
    (line,) = error_lines(other)
    assert "train.learning_rate is not what the run has been trained with: 0.005 before" in line
    (project / "rows.jsonl").write_text(
        (project / "held.jsonl").read_text(encoding="utf-8"), encoding="utf-8"
    )
    changed = start(project, [*WAYS["python"], "--run-dir", "run", LONGER])
    assert changed.returncode == 2
    (line,) = error_lines(changed)
    assert "data.train is not what the run has been trained with: 32 rows, fingerprint" in line
    write_jsonl(project / "rows.jsonl", completion_rows(32))
    newest = max(path.name for path in (project / "run" / "checkpoints").iterdir())
    done = start(project, [*WAYS["python"], "--run-dir", "run", LONGER])
    assert done.returncode == 0, done.stderr
    assert f"going on after step {int(newest.removeprefix('step-'))} (attempt " in done.stdout
    assert [record["step"] for record in ledger(project / "run", "step")] == list(range(1, 61))


@only_long
def test_a_classifier_trains_from_end_to_end(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "bert", trunk_only=True)
    write_jsonl(tmp_path / "rows.jsonl", labelled_rows(64))
    write_jsonl(tmp_path / "held.jsonl", labelled_rows(21, seed=1))
    (tmp_path / "recipe.yaml").write_text(
        "model: {name: model, dtype: float32, task: sequence-classification}\n"
        "quantization: none\n"
        "data: {train: rows.jsonl, eval: held.jsonl}\n"
        "train: {steps: 40, learning_rate: 1e-2}\n"
        "parallel: {strategy: ddp}\n",
        encoding="utf-8",
    )
    done = start(tmp_path, [*WAYS["peft-dist"], "--run-dir", "run"])
    assert done.returncode == 0, done.stderr
    found = result(tmp_path / "run")
    assert found["eval"]["first"]["accuracy"] < 0.7
    assert found["eval"]["last"]["accuracy"] > 0.9
    assert found["labels"] == ["animal", "place", "plant"]
    code = done.stdout.partition("load it:\n")[2]
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    check = "print(model.base_model.model.classifier(__import__('torch').zeros(1, 64)).shape)"
    script = "\n".join([*lines, check])
    loaded = start(tmp_path, [sys.executable, "-c", script])
    assert loaded.returncode == 0, loaded.stderr
    assert "torch.Size([1, 3])" in loaded.stdout
    command = [sys.executable, "-m", "peft_dist", "evaluate", "run"]
    assert start(tmp_path, command).returncode == 0
    scored = json.loads((tmp_path / "run" / "evaluation.json").read_text(encoding="utf-8"))
    assert scored["accuracy"] == found["eval"]["last"]["accuracy"]
