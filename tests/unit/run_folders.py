"""Run directories as they look on a disk, without training anything."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_dist.common.atomic import replace_file
from peft_dist.common.process_identity import this_process
from peft_dist.run import job_events
from peft_dist.run.attempt_records import record_path, write_json

ELSEWHERE = {"host": "node1", "boot_id": "another boot", "pid": 4242, "start_ticks": 1}


def make_run(path: Path) -> Path:
    """Make a run that nobody has started."""
    path.mkdir(parents=True)
    (path / "logs").mkdir()
    (path / "recipe.yaml").write_text("{}\n")
    (path / "run.json").write_text("{}\n")
    return path


def lease(
    run: Path, number: int = 1, *, age_s: float = 0.0, here: bool = False, **facts: Any
) -> None:
    """Add an attempt: of this process, or of one on another machine."""
    folder = run / "attempts"
    folder.mkdir(exist_ok=True)
    process = this_process() if here else ELSEWHERE
    path = record_path(folder, number)
    write_json(path, {"attempt": number, **process, "slurm_job_id": None, "beat": 1, **facts})
    then = time.time() - age_s
    os.utime(path, (then, then))


def ledger(
    run: Path, last: int, *, first: int = 1, step_s: float = 2.0, attempt: int = 1, total: int = 100
) -> None:
    """Add an attempt's start and its steps to the ledger."""
    stamp = {"attempt": attempt, "time": 0.0}
    records = [{**stamp, "at_s": 5.0, "event": "start", "step": first - 1, "steps": total}]
    for step in range(first, last + 1):
        at_s = 5.0 + step_s * (step - first + 1)
        figures = {"loss": 4.0 / step, "tokens_per_s": 1500.0 + step}
        records.append({**stamp, "at_s": at_s, "event": "step", "step": step, **figures})
    with (run / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def submitted(run: Path, job: str, *, started: bool = True, restarts: int = 0) -> None:
    """Note a job, and its starts."""
    job_events.record(run, {"event": "submitted", "job": job, "nodes": 2, "by": "submit"})
    for restart in range(restarts + 1 if started else 0):
        if restart:
            ended = {"code": 75, "decision": "again"}
            job_events.record(run, {"event": "ended", "job": job, "restart": restart - 1, **ended})
        begun = {"restart": restart, "nodes": "node[1-2]", "host": "node1"}
        job_events.record(run, {"event": "started", "job": job, **begun})


def ended(run: Path, job: str, decision: str, code: int = 3) -> None:
    """Note how a job's newest start ended: `decision` as in the file beside its logs."""
    starts = [event for event in job_events.events(run) if event["event"] == "started"]
    restart = starts[-1]["restart"]
    logs = run / "logs" / f"{job}-{restart}"
    logs.mkdir(parents=True, exist_ok=True)
    replace_file(logs / "decision", decision + "\n")
    word = decision.partition(" ")[0]
    told = {"event": "ended", "job": job, "restart": restart, "code": code, "decision": word}
    job_events.record(run, told)


def failure(run: Path, error: str) -> None:
    """Note why starting again cannot help."""
    facts = {"exit_code": 3, "error": error, "time": "2026-01-01T00:00:00+00:00"}
    write_json(run / "failure.json", facts)


def result(run: Path, *, loss: float = 0.5, accuracy: float | None = None) -> None:
    """Finish a run."""
    first = {"loss": 3.0, "accuracy": None if accuracy is None else 0.25, "rows": 8}
    last = {"loss": loss + 0.1, "accuracy": accuracy, "rows": 8}
    facts = {"steps": 100, "final_loss": loss, "eval": {"first": first, "last": last}}
    write_json(run / "result.json", facts)


def array(path: Path, settings: Sequence[Sequence[str]]) -> list[Path]:
    """Make an array, and return its runs."""
    runs = [make_run(path / f"{index:03d}") for index in range(len(settings))]
    elements = [
        {"run_dir": run.name, "settings": list(given)}
        for run, given in zip(runs, settings, strict=True)
    ]
    write_json(path / "array.json", {"elements": elements, "limit": 2})
    return runs


def slurm_commands(folder: Path, **scripts: str) -> Path:
    """Make commands that answer as Slurm did once: the body of a shell script each."""
    folder.mkdir(exist_ok=True)
    for name, body in scripts.items():
        command = folder / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >>{folder}/calls\n{body}\n')
        command.chmod(0o755)
    return folder
