"""Whole trainings that W&B watches, with the real SDK and a server on the loopback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peft_dist.run.directory import RunDir
from tests.faults.long import cases, only_long
from tests.tiny import completion_rows, tiny_model, write_jsonl
from tests.unit.wandb_runs import ledger, rows_of, side_cars, sync, user, wait_for, wanted_rows
from tests.wandb_stub import Stub, wandb_stub

pytest.importorskip("wandb")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RECIPE = """
model: {name: model, dtype: float32}
method: {kind: lora, rank: 4, alpha: 8}
data: {train: rows.jsonl, eval: held.jsonl}
train: {steps: 40, global_batch_size: 4, micro_batch_size: 2}
checkpoint: {every_steps: 10}
tracking: {wandb: {mode: auto, project: a-project, tags: [tiny], wait_s: 90}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    tiny_model(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", completion_rows(32))
    write_jsonl(folder / "held.jsonl", completion_rows(8, seed=1))
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "home").mkdir()
    # A folder such as W&B itself leaves behind, where a library of this name is looked for.
    (folder / "wandb").mkdir()
    return folder


@pytest.fixture
def stub() -> Iterator[Stub]:
    with wandb_stub() as server:
        yield server


def start(project: Path, stub: Stub, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "peft_dist", "train", "recipe.yaml", "--nproc", "2", *more]
    return subprocess.Popen(
        command, cwd=project, env=user(project / "home", stub),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_training_on_two_processes_arrives_row_for_row(project: Path, stub: Stub) -> None:
    process = start(project, stub, "--run-dir", "runs/whole")
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    run = RunDir.open(project / "runs" / "whole")
    assert rows_of(stub.run()) == wanted_rows(run)
    assert f"W&B: {stub.run().project}" not in out and f"W&B: {stub.url}/" in out
    events = [row["event"] for row in stub.run().rows]
    assert events.count("step") == 40
    assert {"start", "evaluation", "checkpoint", "saved", "end"} <= set(events)
    assert stub.run().config["train"]["value"]["steps"] == 40
    assert stub.run().config["placement"]["value"]["processes"] == 2
    assert (stub.run().tags, stub.run().exit_codes) == (["tiny"], [0])
    done = sync(user(project / "home", stub), run.path)
    assert done.returncode == 0, done.stderr
    assert "sent 0 of" in done.stdout and "and the adapter" in done.stdout
    (artifact,) = stub.run().artifacts
    assert {"adapter_model.safetensors", "adapter_config.json", "checkpoint-manifest.json"} <= set(
        artifact["files"]
    )


@only_long
def test_an_interrupted_and_a_killed_start_go_on_in_the_same_run(project: Path, stub: Stub) -> None:
    path = project / "runs" / "again"
    longer = ("--run-dir", str(path), "train.steps=1000", "checkpoint.every_steps=5")
    process = start(project, stub, *longer)
    wait_for(lambda: steps_done(path) >= 10 and stub.runs and stub.run().inits == 1, timeout_s=90)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    before = steps_done(path)
    process = start(project, stub, *longer)
    wait_for(lambda: steps_done(path) >= before + 10 and stub.run().inits == 2, timeout_s=90)
    newest = max((path / "attempts").glob("????????.json"))
    os.kill(json.loads(newest.read_text(encoding="utf-8"))["pid"], signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    run = RunDir.open(path)
    assert rows_of(stub.run()) == wanted_rows(run)
    assert [row["attempt"] for row in stub.run().rows if row["event"] == "start"] == [1, 2, 3]
    assert stub.run().inits == 3
    titles = [alert["title"] for alert in stub.run().alerts]
    assert titles == ["Interrupted", "Started again", "Ended early", "Started again"]
    wait_for(lambda: side_cars(run) == [], timeout_s=15)


def steps_done(path: Path) -> int:
    file = path / "ledger.jsonl"
    return file.read_text(encoding="utf-8").count('"event": "step"') if file.exists() else 0


@only_long
@pytest.mark.parametrize("fault", ["hang", "500"][: cases(1, 2)])
def test_a_server_that_fails_changes_neither_the_exit_code_nor_the_adapter(
    project: Path, stub: Stub, fault: str
) -> None:
    stub.fault = fault
    process = start(project, stub, "--run-dir", f"runs/{fault}", "tracking.wandb.wait_s=10")
    out, errors = process.communicate(timeout=120)
    ended = time.time()
    assert process.returncode == 0, errors
    assert "W&B lacks rows of this run; `peft-dist sync" in out
    trained = ledger(RunDir.open(project / "runs" / fault))[-1]["time"]
    print(f"{fault}: over {ended - trained:.1f} s after the last record")
    assert ended - trained < 10.0 + 8.0  # and what the launcher needs on a loaded machine
    alone = start(project, stub, "--run-dir", f"runs/{fault}-alone", "tracking.wandb.mode=disabled")
    _, errors = alone.communicate(timeout=120)
    assert alone.returncode == 0, errors
    one, other = (project / "runs" / name / "adapter" for name in (fault, f"{fault}-alone"))
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    losses = [
        [record["loss"] for record in ledger(RunDir.open(folder.parent)) if "loss" in record]
        for folder in (one, other)
    ]
    assert losses[0] == losses[1]
    stub.fault = None
    run = RunDir.open(one.parent)
    done = sync(user(project / "home", stub), run.path)
    assert done.returncode == 0, done.stderr
    assert rows_of(stub.run()) == wanted_rows(run)


def test_training_imports_neither_wandb_nor_a_compiler(project: Path) -> None:
    code = (
        "import sys, torch; from peft_dist.model.import_bitsandbytes import import_bitsandbytes\n"
        "compile_ = torch.compile; import_bitsandbytes(); import peft_dist.finetune\n"
        "assert torch.compile is compile_\n"
        "print([name for name in ('wandb', 'torch._inductor.compile_fx') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=user(project / "home", None), cwd=project,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
