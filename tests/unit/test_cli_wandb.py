"""`peft-dist sync` and `peft-dist dashboard`, with the real SDK and a server on the loopback."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_dist.common.manifest import MANIFEST_FILE
from peft_dist.ledger.events import (
    CheckpointEvent,
    EvaluationEvent,
    GpuSample,
    RollbackEvent,
    SavedEvent,
    SaveFailedEvent,
    SkippedEvent,
    StepEvent,
    SystemEvent,
)
from peft_dist.ledger.read_event import from_fields
from peft_dist.run.directory import RunDir
from peft_dist.tracking.wandb import rows
from peft_dist.tracking.wandb.dashboard import COMPARED, SECTIONS
from peft_dist.tracking.wandb.identity import only_writer
from tests.unit.wandb_runs import (
    Training,
    make_run,
    rows_of,
    step_event,
    sync,
    user,
    wanted_rows,
)
from tests.wandb_stub import ENTITY, KEY, Stub, wandb_stub

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.slow


@pytest.fixture
def stub() -> Iterator[Stub]:
    with wandb_stub() as server:
        yield server


@pytest.fixture
def here(stub: Stub, tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    return user(home, stub)


def finished(path: Path, steps: int = 30, outcome: str = "done") -> RunDir:
    """Return a run that nobody has logged, with its adapter and a checkpoint."""
    run = make_run(path, mode="disabled")
    training = Training(run, with_wandb=False)
    training.train(steps)
    training.end(outcome)
    checkpoint = run.checkpoints / "step-00000030"
    for folder, name in ((run.adapter, "adapter_model.safetensors"), (checkpoint, MANIFEST_FILE)):
        folder.mkdir(parents=True)
        (folder / name).write_text(f"content of {name}", encoding="utf-8")
    run.result.write_text("{}", encoding="utf-8")
    return run


def test_runs_that_were_never_logged_are_sent_with_their_adapters(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    runs = [finished(tmp_path / name) for name in ("a", "b")]
    done = sync(here, *(run.path for run in runs))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for run, line in zip(runs, lines, strict=True):
        assert line.startswith(f"{run.path}: sent 32 of 32 rows and the adapter to {stub.url}")
    servers = sorted(stub.runs.values(), key=lambda one: str(one.display_name))
    for run, server in zip(runs, servers, strict=True):
        assert rows_of(server) == wanted_rows(run)
        assert server.exit_codes == [0]
        (artifact,) = server.artifacts
        assert (artifact["type"], artifact["state"]) == ("adapter", "COMMITTED")
        assert set(artifact["files"]) == {"adapter_model.safetensors", "checkpoint-manifest.json"}
        uploaded = stub.uploads[f"{artifact['id']}/adapter_model.safetensors"]
        assert uploaded == (run.adapter / "adapter_model.safetensors").read_bytes()


def test_a_second_time_sends_nothing_and_a_changed_adapter_is_a_new_version(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = finished(tmp_path / "run")
    assert sync(here, run.path).returncode == 0
    uploads = dict(stub.uploads)
    assert "sent 0 of 32" in sync(here, run.path).stdout
    assert len(stub.run().artifacts) == 1
    assert {name for name in stub.uploads if name[0] == "A"} == {
        name for name in uploads if name[0] == "A"
    }
    (run.adapter / "adapter_model.safetensors").write_text("another", encoding="utf-8")
    assert sync(here, run.path).returncode == 0
    assert len(stub.run().artifacts) == 2


def test_a_run_that_goes_on_is_sent_so_far_and_not_called_over(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", mode="offline")
    training = Training(run, with_wandb=False)
    training.train(10)
    assert "sent 11 of 11" in sync(here, run.path).stdout
    training.train(10)
    assert "sent 10 of 21" in sync(here, run.path).stdout
    assert stub.run().exit_codes == []
    training.end()
    assert "sent 1 of 22" in sync(here, run.path).stdout
    assert stub.run().exit_codes == [0]
    assert rows_of(stub.run()) == wanted_rows(run)


def test_a_run_whose_own_process_sends_is_left_to_it(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = finished(tmp_path / "run")
    with only_writer(run, 0.0) as alone:
        assert alone
        done = sync(here, run.path)
    assert done.returncode == 1
    assert "the run's own process is sending to W&B; try again later" in done.stderr


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        ("no key", 2, "W&B: no key; set WANDB_API_KEY, or run `wandb login`"),
        ("another key", 2, "W&B: refuses the key: .*; set WANDB_API_KEY"),
        ("no server", 1, ".*; try again later"),
        ("no run", 2, ".* is no folder .*"),
        ("no ledger", 2, ".*: has not begun to train; .*"),
        ("spoiled ledger", 2, ".*ledger.jsonl:2: 'spoiled' is no event: .*"),
    ],
)
def test_what_cannot_be_sent_is_one_line(
    stub: Stub, here: dict[str, str], tmp_path: Path, problem: str, code: int, line: str
) -> None:
    run = finished(tmp_path / "run")
    if problem == "no key":
        del here["WANDB_API_KEY"]
    elif problem == "another key":
        here["WANDB_API_KEY"] = "f" * 40
    elif problem == "no server":
        stub.refuse()
    elif problem == "no ledger":
        run.ledger.unlink()
    elif problem == "spoiled ledger":
        first = run.ledger.read_text(encoding="utf-8").split("\n")[0]
        run.ledger.write_text(f"{first}\nspoiled\n", encoding="utf-8")
    path = tmp_path / "none" if problem == "no run" else run.path
    done = sync(here, path)
    assert done.returncode == code, done.stderr
    (told,) = done.stderr.splitlines()
    assert re.fullmatch(f"peft-dist: error: {line}", told), told
    assert done.stdout == ""
    assert KEY not in told


def test_of_several_runs_one_that_fails_does_not_stop_the_others(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    run = finished(tmp_path / "run")
    done = sync(here, tmp_path / "none", run.path)
    assert done.returncode == 2
    assert "sent 32 of 32 rows" in done.stdout


def dashboard(here: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peft_dist", "dashboard", *arguments],
        env=here, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_dashboard_is_made_once_and_then_updated(
    stub: Stub, here: dict[str, str], tmp_path: Path
) -> None:
    assert sync(here, finished(tmp_path / "run").path).returncode == 0
    for _ in range(2):
        done = dashboard(here, "a-project")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{stub.url}/{ENTITY}/a-project?nw=")
    (view,) = stub.views
    assert (view["displayName"], view["type"]) == ("peft-dist", "project-view")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == [
        "Training", "Preferences", "Throughput and memory", "Goodput and restarts", "Stragglers",
        "Sweep comparison",
    ]  # fmt: skip
    panels = [panel for section in sections for panel in section["panels"]]
    shown = {name for panel in panels for name in panel["config"].get("metrics", [])}
    shown |= {panel["config"].get("metricRegex") for panel in panels} - {None}
    wanted = {name for section in SECTIONS.values() for _, names in section for name in names}
    assert wanted <= shown
    axes = {panel["config"]["xAxis"] for panel in panels if "xAxis" in panel["config"]}
    assert axes == {rows.STEP}
    compared = next(p for p in panels if p["viewType"] == "Parallel Coordinates Plot")
    columns = [column["accessor"] for column in compared["config"]["columns"]]
    settings = [f"config:{name.replace('.', '.value.')}" for name in COMPARED]
    assert columns == [
        *settings,
        f"summary:{rows.HELD_OUT_LOSS}",
        f"summary:{rows.HELD_OUT_ACCURACY}",
    ]


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        ("no project", 2, "W&B: .*not found.*; name a project that has runs"),
        ("no key", 2, "W&B: no key; .*"),
        ("no server", 1, ".*; try again later"),
    ],
)
def test_a_dashboard_that_cannot_be_saved_is_one_line(
    stub: Stub, here: dict[str, str], problem: str, code: int, line: str
) -> None:
    if problem == "no key":
        del here["WANDB_API_KEY"]
    elif problem == "no server":
        stub.refuse()
    done = dashboard(here, "none")
    assert done.returncode == code, done.stderr
    (told,) = done.stderr.splitlines()
    assert re.fullmatch(f"peft-dist: error: {line}", told), told


def test_a_service_of_the_sdk_that_does_not_end_is_killed() -> None:
    code = """
import subprocess, sys
from types import SimpleNamespace
from peft_dist.tracking.wandb import wandb_run
wandb_run.SERVICE_END_S = 0.2
service = subprocess.Popen(["sleep", "600"])
sdk = SimpleNamespace(teardown=lambda _code: sys.exit(service.wait()))
wandb_run.end_service(sdk)
print(service.poll())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "-9\n", "")


def every_row(tmp_path: Path) -> list[dict[str, Any]]:
    """Return a row of each kind of event that a run writes."""
    run = make_run(tmp_path / "run")
    training = Training(run, with_wandb=False)
    training.train(30)
    for event in (
        StepEvent(step=30, loss=0.5, tokens_per_s=10.0, reward_chosen=0.5, reward_rejected=0.25,
                  reward_margin=0.25, reward_accuracy=0.5),
        EvaluationEvent(step=30, eval_loss=1.5, eval_accuracy=0.5, eval_reward_margin=0.25),
        CheckpointEvent(step=30, stall_s=0.25),
        SavedEvent(step=30, bytes=1000, write_s=0.5),
        SaveFailedEvent(step=30, reason="No space left", write_s=0.5),
        SkippedEvent(step=30, reason="loss nan"),
        RollbackEvent(step=30, reason="loss nan", back_to=20),
        from_fields(
            {"event": "system", "step": 30, "cpu_percent": 50.0, "host": "node-7",
             "gpus": [{"utilization": 0.5, "name": "a card"}]}
        ),
        from_fields({"event": "of another version", "step": 30, "heat": 3.5, "why": "secret"}),
    ):  # fmt: skip
        training.write(event)
    training.end()
    return [one.row for one in rows.LedgerRows(run.ledger).new()]


def test_every_panel_shows_a_figure_that_is_logged(tmp_path: Path) -> None:
    logged = {name for row in every_row(tmp_path) for name in row}
    for panels in SECTIONS.values():
        for title, names in panels:
            for name in names:
                assert any(re.fullmatch(name, one) for one in logged), (title, name)


def test_every_setting_that_is_compared_is_one(tmp_path: Path) -> None:
    from peft_dist.tracking.wandb.wandb_run import recipe_of

    settings = recipe_of(make_run(tmp_path / "run")).model_dump(mode="json")
    for name in COMPARED:
        section, key = name.split(".")
        assert key in settings[section]


def test_texts_other_than_reasons_stay_on_the_machine(tmp_path: Path) -> None:
    texts = {
        (name, value)
        for row in every_row(tmp_path)
        for name, value in row.items()
        if isinstance(value, str) and name != "event"
    }
    assert texts == {
        ("checkpoint/reason", "No space left"),
        ("skipped/reason", "loss nan"),
        ("rollback/reason", "loss nan"),
        ("end/outcome", "done"),
    }


def test_a_row_follows_from_the_ledger_up_to_it_alone(tmp_path: Path) -> None:
    every_row(tmp_path)
    path = tmp_path / "run" / "ledger.jsonl"
    whole = [one.row for one in rows.LedgerRows(path).new()]
    lines, growing = path.read_bytes().splitlines(keepends=True), tmp_path / "growing"
    reader = rows.LedgerRows(growing)
    found = list(reader.new())
    assert found == []
    for line in lines:
        with growing.open("ab") as file:
            file.write(line[:10])
            file.flush()
            found += reader.new()
            file.write(line[10:])
        found += reader.new()
    assert [one.row for one in found] == whole
    assert [one.number for one in found] == list(range(len(whole)))


def test_of_very_many_ranks_the_slowest_and_the_median_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    training = Training(run, with_wandb=False)
    training.write(step_event(1, rank_step_s=[1.0] * 99 + [2.0], rank_memory_bytes=[]))
    training.end()
    row = list(rows.LedgerRows(run.ledger).new())[1].row
    ranks = {name: row[name] for name in row if name.startswith("rank/")}
    assert ranks == {"rank/step_s_max": 2.0, "rank/step_s_median": 1.0, "rank/slowest": 99}


def test_the_machines_of_other_nodes_have_names_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    training = Training(run, with_wandb=False)
    sample = SystemEvent(step=0, cpu_percent=50.0, gpus=[GpuSample(power_w=300.0)])
    for event in (sample, sample.model_copy(update={"node": 8})):
        training.write(event)
    training.end()
    _, own, other, _ = (one.row for one in rows.LedgerRows(run.ledger).new())
    named = [{n: v for n, v in row.items() if n.startswith("system/")} for row in (own, other)]
    assert named[0] == {"system/cpu_percent": 50.0, "system/gpus/0/power_w": 300.0}
    assert named[1] == {"system/node_8/cpu_percent": 50.0, "system/node_8/gpus/0/power_w": 300.0}
    assert all(re.fullmatch(rows.SYSTEM_PATTERN, name) for name in named[1])


def test_goodput_stands_in_every_twentieth_row_and_in_the_last(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    training = Training(run, with_wandb=False)
    training.train(3000)
    training.end()
    told = [one.number for one in rows.LedgerRows(run.ledger).new() if rows.GOODPUT in one.row]
    assert told == [*range(0, 3001, rows.SHARES_EVERY), 3001]
