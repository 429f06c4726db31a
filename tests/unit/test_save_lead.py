"""How long before its end a job is told to save."""

import json
import re
from pathlib import Path
from typing import Any

from peft_dist.slurm.job_scripts import render_job
from peft_dist.slurm.save_lead import MARGIN, SETTLE_S, lead_s
from tests.unit.run_folders import ledger, make_run
from tests.unit.slurm_jobs import GPUS, job


def add(run: Path, **record: Any) -> None:
    with (run / "ledger.jsonl").open("a") as file:
        metrics = {"loss": 1.0, "tokens_per_s": 1.0, "eval_loss": 1.0}
        file.write(json.dumps({"attempt": 1, "time": 0.0, **metrics, **record}) + "\n")


def test_a_run_that_has_not_begun_gets_what_the_cluster_file_asks_for(tmp_path: Path) -> None:
    assert lead_s(tmp_path / "ledger.jsonl", 120) == 120


def test_quick_steps_and_saves_do_not_shorten_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    ledger(run, 5, step_s=0.5)
    assert lead_s(run / "ledger.jsonl", 120) == 120


def test_the_longest_step_and_the_longest_save_lengthen_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    ledger(run, 5, step_s=2.0)
    add(run, event="saved", step=5, at_s=30.0, write_s=40.0)
    add(run, event="saved", step=5, at_s=31.0, write_s=10.0)
    add(run, event="step", step=6, at_s=40.0)
    add(run, event="step", step=7, at_s=60.0)
    add(run, event="step", step=8, at_s=61.0)
    assert lead_s(run / "ledger.jsonl", 120) == SETTLE_S + MARGIN * (20 + 40)


def test_time_between_attempts_and_in_evaluations_is_no_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    ledger(run, 3, step_s=1.0)
    ledger(run, 6, first=4, step_s=1.0, attempt=2)
    add(run, event="evaluation", step=6, at_s=500.0)
    add(run, event="step", step=7, at_s=501.0)
    assert lead_s(run / "ledger.jsonl", 1) == SETTLE_S + MARGIN * 1


def test_a_look_at_the_machine_during_a_step_does_not_hide_how_long_it_took(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step in range(1, 4):
        add(run, event="step", step=step, at_s=40.0 * step)
        add(run, event="system", step=step, at_s=40.0 * step + 15)
        add(run, event="system", step=step, at_s=40.0 * step + 15, node=8)
    assert lead_s(run / "ledger.jsonl", 1) == SETTLE_S + MARGIN * 40


def test_one_night_of_suspension_does_not_count_for_ever(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    ledger(run, 300, step_s=1.0)
    add(run, event="step", step=301, at_s=50_000.0)
    add(run, event="step", step=302, at_s=50_001.0)
    assert lead_s(run / "ledger.jsonl", 1) == SETTLE_S + MARGIN * 1


def test_a_save_long_before_the_recent_steps_still_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    add(run, event="saved", step=0, at_s=1.0, write_s=40.0)
    ledger(run, 2000, step_s=1.0)
    assert lead_s(run / "ledger.jsonl", 1) == SETTLE_S + MARGIN * (1 + 40)


def test_it_stands_in_the_script() -> None:
    assert re.search(r"^#SBATCH --signal=USR1@180$", render_job(job(GPUS)), re.MULTILINE)
