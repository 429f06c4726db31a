"""`peft-dist status`: what is said of a run, from its directory and from Slurm."""

import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_dist.cli.main import main
from peft_dist.common.errors import DataError
from peft_dist.common.screen import Screen
from peft_dist.common.table import Column, table_lines
from peft_dist.ledger.events import RollbackEvent, StepEvent
from peft_dist.ledger.reader import BLOCK_BYTES, LedgerReader
from peft_dist.run.directory import RunDir
from peft_dist.run.history import note_crash
from peft_dist.run.lease import STALE_AFTER_S
from peft_dist.run.restart_policy import Kind
from peft_dist.slurm.job_state import JobState
from peft_dist.status.command import gather, newest_runs
from peft_dist.status.progress import RunProgress, progress, read_progress
from peft_dist.status.run_state import RunView, read_run, view
from peft_dist.status.table import ArrayView, duration, render
from peft_dist.tracking.terminal import Terminal
from tests.unit.run_folders import (
    array,
    ended,
    failure,
    lease,
    ledger,
    make_run,
    result,
    slurm_commands,
    submitted,
)

ROOT = Path(__file__).resolve().parents[2]
NOTHING_KNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "some")


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that has squeue print these rows: job, state, nodes, reason."""

    def set_up(*rows: str) -> Path:
        lines = []
        for row in rows:
            job, state, nodes, reason = row.split("|")
            lines.append(f"{job}|{job.partition('_')[0]}|{state}|{nodes}|N/A|{reason}")
        text = "\n".join(["cat <<'END'", *lines, "END"])
        folder = slurm_commands(tmp_path / "bin", squeue=text, sacct="", scontrol=NOTHING_KNOWN)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return folder

    set_up()
    return set_up


def progress_of(run: Path) -> RunProgress:
    return read_progress(run / "ledger.jsonl")


def seen(path: Path, **jobs: str) -> RunView:
    """Return what is said of a run, where Slurm says this of its jobs: `_12="RUNNING"`."""
    answers = {
        name[1:]: JobState(name[1:], *text.split("|"), source="squeue")
        for name, text in jobs.items()
    }
    return view(read_run(path), answers, name="some", now=time.time())


# ---- where a run stands ----


def test_a_ledgers_end_tells_step_loss_and_speed(run: Path) -> None:
    ledger(run, 40, step_s=2.0, total=100)
    assert progress_of(run) == RunProgress(40, 100, 0.1, 1540.0, 2.0)


def test_of_a_long_ledger_only_the_end_is_read_and_half_lines_are_left_out(run: Path) -> None:
    ledger(run, 3000, step_s=1.0)
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"attempt": 1, "event": "step", "step": 3001, "at_')
    found = progress_of(run)
    assert (found.step, found.steps, found.step_s) == (3000, None, 1.0)


def test_samples_of_many_machines_between_slow_steps_do_not_hide_them(run: Path) -> None:
    ledger(run, 40, step_s=60.0)
    before = progress_of(run)
    sample = {"attempt": 1, "time": 0.0, "at_s": 2410.0, "event": "system", "step": 40}
    gpus = [{"utilisation_percent": 97, "memory_used_bytes": 10**10}] * 8
    with (run / "ledger.jsonl").open("a") as file:
        for node in range(0, 1024, 8):
            file.write(json.dumps({**sample, "node": node, "gpus": gpus}) + "\n")
    assert (run / "ledger.jsonl").stat().st_size > 1.2 * BLOCK_BYTES
    assert progress_of(run) == before


def test_a_resumed_run_stands_where_its_newest_attempt_does(run: Path) -> None:
    ledger(run, 30, step_s=2.0)
    ledger(run, 20, first=21, attempt=2)  # it has begun, and done no step
    assert progress_of(run) == RunProgress(20, 100, 4 / 30, 1530.0, 2.0)
    ledger(run, 60, attempt=1)  # a zombie goes on writing
    assert progress_of(run).step == 20


def test_a_rollback_takes_steps_back() -> None:
    step = StepEvent(step=8, attempt=1, at_s=1.0, loss=1.0, tokens_per_s=1.0)
    assert progress([step, RollbackEvent(step=9, attempt=1, at_s=1.0, back_to=5)]).step == 5


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", '{"event": "step"}', "\0" * 9, "NaN",
     '{"event": "step", "attempt": "1", "step": 3, "at_s": 1}',
     '{"event": "step", "attempt": 1, "step": 3, "at_s": null}'],
)  # fmt: skip
def test_lines_that_are_no_events_are_passed_over(run: Path, line: str) -> None:
    ledger(run, 5)
    with (run / "ledger.jsonl").open("a") as file:
        file.write(line + "\n")
    assert progress_of(run).step == 5


def test_a_run_without_a_ledger_stands_nowhere(run: Path) -> None:
    assert progress_of(run) == RunProgress()


# ---- runs without a job ----


def test_a_run_that_nobody_started_is_new(run: Path) -> None:
    found = seen(run)
    assert (found.state, found.attempt, found.heartbeat_s, found.cause) == ("NEW", 0, None, "")


def test_a_run_that_is_held_here_runs_and_has_time_left(run: Path) -> None:
    lease(run, 2, here=True, age_s=300, steps=200)  # its clock is not what proves it
    ledger(run, 40, step_s=0.5, attempt=2)
    found = seen(run)
    assert (found.state, found.attempt, found.step, found.steps) == ("RUNNING", 2, 40, 200)
    assert found.eta_s == pytest.approx(80.0)
    assert found.heartbeat_s == pytest.approx(300, abs=5)
    assert found.nodes == os.uname().nodename


def test_a_run_elsewhere_runs_while_its_heart_beats(run: Path) -> None:
    lease(run, age_s=1)
    assert seen(run).state == "RUNNING"
    lease(run, age_s=STALE_AFTER_S + 5)
    found = seen(run)
    assert (found.state, found.cause) == ("UNKNOWN", "no heartbeat from node1")


@pytest.mark.parametrize(
    ("outcome", "state"), [("interrupted", "INTERRUPTED"), ("failed", "FAILED")]
)
def test_a_run_that_ended_says_how(run: Path, outcome: str, state: str) -> None:
    lease(run, here=True, outcome=outcome)
    assert seen(run).state == state


def test_a_run_whose_process_is_gone_crashed_and_says_why(run: Path) -> None:
    lease(run, here=True, start_ticks=1)
    attempts = run / "attempts"
    note_crash(attempts, 1, rank=0, kind=Kind.LOST_PEER, step=4, error="connection closed by peer")
    note_crash(attempts, 1, rank=3, kind=Kind.OUT_OF_MEMORY, step=4, error="out of memory:\n  4 GB")
    found = seen(run)
    assert (found.state, found.cause) == ("CRASHED", "rank 3: out of memory: 4 GB")


def test_a_result_is_proof_whatever_else_is_there(run: Path) -> None:
    lease(run, age_s=1)
    submitted(run, "12")
    failure(run, "an old fault")
    result(run)
    found = seen(run, _12="FAILED")
    assert (found.state, found.cause, found.eta_s) == ("COMPLETED", "", None)


def test_a_fault_that_no_restart_mends_is_told_in_one_line(run: Path) -> None:
    lease(run, outcome="failed")
    failure(run, "train.non_finite: loss nan; lower train.learning_rate")
    assert seen(run).state == "FAILED"
    assert seen(run).cause == "train.non_finite: loss nan; lower train.learning_rate"


def test_a_directory_that_cannot_be_read_costs_its_own_row(run: Path) -> None:
    (run / "attempts").write_text("no folder")
    found = seen(run)
    assert found.state == "UNKNOWN" and "Not a directory" in found.cause


# ---- runs of Slurm ----


def test_a_job_that_waits_tells_slurms_reason(run: Path) -> None:
    submitted(run, "12", started=False)
    found = seen(run, _12="PENDING|BeginTime")
    assert (found.job, found.state, found.reason, found.nodes) == ("12", "PENDING", "BeginTime", "")


def test_a_job_that_was_queued_again_tells_why_until_it_starts(run: Path) -> None:
    submitted(run, "12")
    ended(run, "12", "again-without node2,node3 pre-flight: node2: 7 of 8 GPUs", code=75)
    found = seen(run, _12="PENDING|BeginTime")
    assert found.cause == "goes on without node2,node3: pre-flight: node2: 7 of 8 GPUs"
    submitted(run, "12", restarts=1)
    assert seen(run, _12="RUNNING").cause == ""
    assert seen(run, _12="NODE_FAIL").cause == ""  # the word is of the start before


def test_a_job_that_runs_names_its_nodes_and_counts_attempts(run: Path) -> None:
    submitted(run, "12", restarts=2)
    lease(run, 3, age_s=2)
    ledger(run, 10, step_s=3.0)
    found = seen(run, _12="RUNNING||node[3-4]")
    assert (found.state, found.nodes, found.attempt) == ("RUNNING", "node[3-4]", 3)
    assert found.eta_s == pytest.approx(270)


@pytest.mark.parametrize(
    ("decision", "cause"),
    [("stop data.train: no rows", "data.train: no rows"), ("stop", ""), ("done", "")],
)
def test_a_job_that_failed_tells_what_was_decided(run: Path, decision: str, cause: str) -> None:
    submitted(run, "12")
    ended(run, "12", decision)
    found = seen(run, _12="FAILED|NonZeroExitCode")
    assert (found.state, found.cause) == ("FAILED", cause)


def test_an_old_fault_is_no_cause_of_a_job_that_waits(run: Path) -> None:
    submitted(run, "12")
    ended(run, "12", "stop data.train: no rows")
    failure(run, "data.train: no rows")
    submitted(run, "13", started=False)
    assert seen(run, _13="PENDING|Priority").cause == ""


def test_a_job_that_ended_well_without_a_result_is_not_done(run: Path) -> None:
    submitted(run, "12")
    found = seen(run, _12="COMPLETED")
    assert (found.state, found.reason) == ("ENDED", "no result")


def test_a_job_that_its_user_cancelled_is_cancelled_however_it_ended(run: Path) -> None:
    submitted(run, "12")
    (run / "slurm" / "cancelled").write_text("1\n")
    assert seen(run, _12="FAILED").state == "CANCELLED"


def test_the_successor_stands_for_a_job_that_is_over(run: Path) -> None:
    submitted(run, "12")
    (run / "slurm" / "successor").write_text("13\n")
    assert seen(run, _12="RUNNING", _13="PENDING|Dependency").job == "12"
    found = seen(run, _12="NODE_FAIL", _13="PENDING|Resources")
    assert (found.job, found.state, found.reason) == ("13", "PENDING", "Resources")
    assert seen(run, _12="FAILED", _13="CANCELLED").job == "12"


def test_of_a_job_that_nobody_knows_the_directory_proves_what_it_can(run: Path) -> None:
    submitted(run, "12")
    unknown = {"_12": "UNKNOWN|squeue: no answer in 10 s"}
    lease(run, age_s=500)
    found = seen(run, **unknown)
    assert (found.state, found.cause) == ("UNKNOWN", "squeue: no answer in 10 s")
    lease(run, 2, age_s=1)
    assert seen(run, **unknown).state == "RUNNING"
    lease(run, 2, age_s=500)
    ended(run, "12", "stop crash loop")
    assert (seen(run, **unknown).state, seen(run, **unknown).cause) == ("FAILED", "crash loop")


def test_a_run_that_goes_on_here_after_its_job_runs(run: Path) -> None:
    submitted(run, "12")
    lease(run, 2, here=True)
    assert seen(run, _12="FAILED").state == "RUNNING"
    lease(run, 2, here=True, slurm_job_id="12")  # what lives of the job itself proves nothing
    assert seen(run, _12="FAILED").state == "FAILED"


# ---- gathering ----


def test_slurm_is_asked_once_for_all_and_not_of_runs_that_are_done(
    tmp_path: Path, slurm: Callable[..., Path]
) -> None:
    commands = slurm("12|RUNNING|node1|None", "14_0|PENDING||Priority", "14_1|RUNNING|node2|None")
    paths = [make_run(tmp_path / "runs" / name) for name in ("one", "done", "here")]
    submitted(paths[0], "12")
    submitted(paths[1], "13")
    result(paths[1])
    many = array(tmp_path / "runs" / "many", [["train.seed=1"], ["train.seed=2"]])
    for index, element in enumerate(many):
        submitted(element, f"14_{index}")
    views = gather([*paths, many[0].parent])
    calls = (commands / "calls").read_text().splitlines()
    assert len(calls) == 1 and f" --user={os.getuid()} " in calls[0]
    assert [entry.state for entry in views if isinstance(entry, RunView)] == [
        "RUNNING", "COMPLETED", "NEW",
    ]  # fmt: skip
    found = views[-1]
    assert isinstance(found, ArrayView)
    assert (found.job, found.counts["pending"], found.counts["running"]) == ("14", 1, 1)


def test_without_names_the_newest_runs_and_arrays_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no runs below ./runs\n"
    for age, name in enumerate(["old", "older", "oldest"]):
        run = make_run(tmp_path / "runs" / name)
        os.utime(run / "run.json", (1000 - age, 1000 - age))
    array(tmp_path / "runs" / "many", [["train.seed=1"]])
    (tmp_path / "runs" / "no run").mkdir()
    names = [path.name for path in newest_runs(tmp_path / "runs")]
    assert names == ["many", "old", "older", "oldest"]
    assert len(newest_runs(tmp_path / "runs", at_most=2)) == 2
    assert main(["status"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["run", "state"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [make_run(tmp_path / name) for name in ("a/chat", "b/chat", "b/other")]
    assert [entry.run for entry in gather(paths)] == ["a/chat", "b/chat", "other"]


@pytest.mark.parametrize("command", ["status", "logs"])
def test_a_folder_without_a_run_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_list_of_an_arrays_runs_that_is_none_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "array.json").write_text('{"elements": [{}]}')
    assert main(["status", str(tmp_path)]) == 2
    assert "array.json: is no list of an array's runs" in capsys.readouterr().err


# ---- the table ----


def big_table(tmp_path: Path) -> list[RunView | ArrayView]:
    """Return rows with everything that a table has to hold."""
    busy = make_run(tmp_path / "a-run-with-a-very-long-name-of-llama-70b")
    submitted(busy, "1234567", restarts=1)
    lease(busy, 2, age_s=3, steps=24000)
    ledger(busy, 12100, step_s=1.3)
    waiting = make_run(tmp_path / "waiting")
    submitted(waiting, "12", started=False)
    failed = make_run(tmp_path / "failed")
    lease(failed, outcome="failed", age_s=90_000)
    failure(failed, "train.non_finite: loss nan at step 12; " + "lower train.learning_rate " * 6)
    nodes = "node[1-9,11-19,21-29,101-199]"
    reason = "ReqNodeNotAvail,_UnavailableNodes:" + nodes
    answers = {
        "1234567": JobState("1234567", "RUNNING", "", nodes),
        "12": JobState("12", "PENDING", reason),
    }
    now = time.time()
    return [
        view(read_run(path), answers, name=path.name, now=now) for path in (busy, waiting, failed)
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    lines = render(big_table(tmp_path), width)
    assert max(len(line) for line in lines) <= width
    text = " ".join(" ".join(lines).split())
    assert "train.non_finite: loss nan at step 12; " + "lower train.learning_rate " * 5 in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_figures_are_never_cut_on_a_usual_terminal(tmp_path: Path, width: int) -> None:
    busy, waiting = render(big_table(tmp_path), width)[1:3]
    assert "1234567" in busy and "RUNNING" in busy
    assert busy.split()[-5:] == ["2", "12100/24000", "0.0003", "4h17m", "3s"]
    assert "PENDING" in waiting and "ReqNode" in waiting


def test_a_cause_is_one_line_where_there_is_no_terminal(tmp_path: Path) -> None:
    lines = render(big_table(tmp_path), None)
    assert [line.startswith("  ^ train.non_finite") for line in lines].count(True) == 1
    assert len(lines) == 6


def test_what_would_steer_a_terminal_is_not_shown(run: Path) -> None:
    submitted(run, "12")
    lines = render([seen(run, _12="PENDING|\x1b[2Jnasty")], 80)
    assert "?[2Jnasty" in lines[1]


def test_columns_are_aligned_and_the_widest_that_may_be_is_cut() -> None:
    columns = (Column("name", cut=True), Column("n", right=True), Column("text", cut=True))
    rows = [["a" * 20, "7", "b" * 30], "free text of some length", ["c", "1234", "d"]]
    assert table_lines(columns, rows, width=48) == [
        "name                    n text",
        "aaaaaaaaaaaaaaaaaaaa    7 bbbbbbbbbbbbbbbbbbbbb\u2026",
        "free text of some length",
        "c                    1234 d",
    ]
    narrow = table_lines(columns, rows, width=33)
    assert narrow[1] == "aaaaaaaaaaaa\u2026    7 bbbbbbbbbbbbb\u2026"
    assert table_lines(columns, rows, width=20)[2:4] == ["free text of some", "  length"]


def test_colours_steer_a_terminal_and_what_others_wrote_does_not() -> None:
    columns = (Column("state", style=lambda _: "red"),)
    lines = table_lines(columns, [["\x1b[2Jbad"]], width=40, colour=True)
    assert lines == ["\x1b[1mstate  \x1b[0m", "\x1b[31m?[2Jbad\x1b[0m"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (3720, "1h02m"),
     (86399, "23h59m"), (187200, "2d04h")],
)  # fmt: skip
def test_times_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_an_array_is_summed_up_and_ends_in_its_results(
    tmp_path: Path, slurm: Callable[..., Path]
) -> None:
    settings = [[f"train.seed={seed}", "train.learning_rate=1e-4"] for seed in (1, 2, 3)]
    first, second, third = array(tmp_path / "sweep", settings)
    for index, path in enumerate((first, second, third)):
        submitted(path, f"16_{index}", started=index < 2)
    result(first, loss=0.5, accuracy=0.75)
    slurm("16_1|RUNNING|node1|None", "16_2|PENDING||JobArrayTaskLimit")
    lines = render(gather([first.parent]), None)
    summary = "sweep: job 16, 3 runs: 1 done, 1 running, 1 pending, 0 failed"
    assert lines[1] == summary and len(lines) == 6
    assert lines[2] == "  ^ as many elements run as --limit allows"
    assert lines[3].split()[:3] == ["000", "16_0", "COMPLETED"]
    result(second, loss=0.25)
    slurm("16_2|TIMEOUT|node1|TimeLimit")
    lines = render(gather([first.parent]), None)
    table = lines[lines.index("results of sweep") + 1 :]
    assert [line.split() for line in table] == [
        ["run", "seed", "learning_rate", "loss", "eval", "first", "eval", "last",
         "accuracy", "first", "accuracy", "last"],
        ["000", "1", "1e-4", "0.5000", "3.0000", "0.6000", "0.2500", "0.7500"],
        ["001", "2", "1e-4", "0.2500", "3.0000", "0.3500", "-", "-"],
        ["002", "3", "1e-4", "-", "-", "-", "-", "-"],
    ]  # fmt: skip


def test_settings_with_one_last_name_keep_their_whole_names(tmp_path: Path) -> None:
    given = ["train.dropout=0.1", "method.dropout=0"]
    [path] = array(tmp_path / "sweep", [given])
    result(path)
    titles = render(gather([path.parent]), None)[5]
    assert titles.split()[:3] == ["run", "train.dropout", "method.dropout"]
    assert "accuracy" not in titles


# ---- the command ----


def test_json_has_every_figure(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lease(run, here=True)
    ledger(run, 10)
    [path] = array(tmp_path / "sweep", [["train.seed=1"]])
    result(path)
    assert main(["status", "--json", str(run), str(path.parent)]) == 0
    one, many = json.loads(capsys.readouterr().out)
    assert (one["state"], one["step"], one["steps"], one["eta_s"]) == ("RUNNING", 10, 100, 180)
    assert many["counts"]["done"] == 1
    assert many["elements"][0]["settings"] == ["train.seed=1"]
    assert many["elements"][0]["result"]["final_loss"] == 0.5


def test_the_table_and_the_progress_line_show_the_ledgers_own_figures(
    run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "peft_dist")
    lease(run, here=True)
    ledger(run, 7, total=9)
    (last,) = LedgerReader(run / "ledger.jsonl").tail(1)
    assert main(["status", str(run)]) == 0
    titles, row = (line.split() for line in capsys.readouterr().out.splitlines())
    shown = dict(zip(titles, row, strict=True))
    assert (shown["step"], shown["loss"], shown["tok/s"]) == ("7/9", "0.5714", "1,507")
    Terminal(9, Screen(io.StringIO())).write(last)
    assert caplog.messages == ["step 7/9  loss 0.5714  1,507 tok/s"]


def test_records_of_the_machine_move_no_run(run: Path) -> None:
    ledger(run, 7)
    before = progress_of(run)
    machine = {"attempt": 1, "time": 0.0, "at_s": 500.0, "event": "system", "step": 6}
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps(machine) + "\n")
    assert progress_of(run) == before


def test_watch_prints_plain_tables_into_a_pipe_until_it_is_interrupted(run: Path) -> None:
    lease(run, here=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_dist", "status", "--watch", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(5)]  # the second table has begun
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert lines[1].split()[1] == "RUNNING" and lines[2] == "\n"
    assert lines[3] == lines[0]
    assert "\x1b" not in "".join(lines) + rest


def test_watch_draws_on_a_terminal_as_wide_and_as_high_as_it_is(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run-{number}-of-many-with-a-long-name") for number in range(12)]
    failure(runs[0], "data.train: no rows; " + "look at the file " * 9)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 10, 70, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_dist", "status", "--watch", *map(str, runs)],
        stdout=theirs,
        cwd=ROOT,
        # readline, which pytest imports, leaves the size of another terminal there
        env={name: text for name, text in os.environ.items() if name not in ("LINES", "COLUMNS")},
    )
    os.close(theirs)
    text = b""
    while b"Ctrl-C ends" not in text:
        text += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    os.close(ours)
    assert b"\x1b[?25l" not in text, "a process that is killed could not show the cursor again"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
    assert len(lines) <= 9 and max(len(line) for line in lines) <= 70
    assert lines[-2].startswith("... and ")


def test_status_and_logs_import_nothing_heavy(run: Path) -> None:
    (run / "logs" / "launcher.log").write_text("hello\n")
    heavy = ("torch", "numpy", "transformers", "accelerate", "peft", "tqdm", "jinja2")
    code = (
        "import sys\n"
        "from peft_dist.cli.main import main\n"
        "assert main(['status', sys.argv[1]]) == main(['logs', sys.argv[1]]) == 0\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == "[]"


def test_on_a_machine_without_jobs_no_column_is_about_a_cluster(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(run).record_failure(DataError("no rows " * 100, where="train.jsonl"))
    assert main(["status", str(run)]) == 0
    titles, row, cause = capsys.readouterr().out.splitlines()
    assert titles.split() == ["run", "state", "reason", "attempt", "step", "loss", "tok/s", "left",
                              "seen"]  # fmt: skip
    assert len(row.split()) == len(titles.split())
    assert cause.endswith("...") and len(cause) < 260
    assert main(["status", "--json", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)[0]["cause"].count("no rows") == 100
