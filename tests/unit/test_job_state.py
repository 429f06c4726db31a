"""What Slurm says of jobs, from texts that Slurm 22.05 printed; silence is never an end."""

import os
from pathlib import Path

import pytest

from peft_dist.slurm.job_state import (
    LIVE,
    OVER,
    JobState,
    is_live,
    is_over,
    job_states,
    parse_sacct,
    parse_scontrol,
    parse_squeue,
)
from tests.unit.run_folders import slurm_commands

SQUEUE = """\
19|19|FAILED|node1|2026-11-24T08:28:56|NonZeroExitCode
17|17|PENDING||2026-11-24T09:28:55|BeginTime
16_3|16|PENDING||N/A|JobArrayTaskLimit
15|15|RUNNING|node[1-2]|2026-11-24T08:28:56|None
16_0|20|COMPLETED|node1|2026-11-24T08:28:56|None
"""
SACCT = """\
16_0|20|COMPLETED|node1|2026-11-24T08:28:56
17|17|CANCELLED by 0|None assigned|None
15|15|RUNNING|node1|2026-11-24T08:28:56
21|21|NODE_FAIL|node[1-3]|2026-11-24T08:28:56
"""
SCONTROL = (
    "JobId=20 ArrayJobId=16 ArrayTaskId=0 ArrayTaskThrottle=1 JobName=wrap UserId=root(0) "
    "Priority=1000 JobState=COMPLETED Reason=None Dependency=(null) ExitCode=0:0 "
    "StartTime=2026-11-24T08:28:56 EndTime=2026-11-24T08:28:59 ReqNodeList=(null) "
    "ExcNodeList=(null) NodeList=node1 BatchHost=node1 Command={command} Power= \n"
)
GONE = "slurm_load_jobs error: Invalid job id specified"
DOWN = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1"


def shown(text: str) -> str:
    """Return a shell command that prints a text."""
    return f"cat <<'END'\n{text}END"


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for Slurm, which knows no job; tests replace its commands."""
    gone = f"echo '{GONE}' >&2; exit 1"
    folder = slurm_commands(tmp_path / "bin", squeue="", sacct="", scontrol=gone)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def asked(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "calls").read_text().splitlines()]


def test_squeue_is_read_by_its_fields() -> None:
    states = dict(parse_squeue(SQUEUE))
    assert states["15"] == JobState(
        "15", "RUNNING", "", "node[1-2]", "2026-11-24T08:28:56", "squeue"
    )
    assert states["16"] == JobState("16_3", "PENDING", "JobArrayTaskLimit", "", "", "squeue")
    assert states["20"].job == "16_0"


def test_a_reason_may_hold_anything_and_a_line_that_is_cut_says_nothing() -> None:
    [(_, state)] = parse_squeue("7|7|PENDING||N/A|Nodes required | are\tDOWN\n8|8|COMPL")
    assert state.reason == "Nodes required | are DOWN"
    assert parse_squeue("slurm_load_jobs error: something\n\n") == []


def test_sacct_says_who_cancelled() -> None:
    states = dict(parse_sacct(SACCT + "16_1|21|COMPL"))
    assert states["17"] == JobState("17", "CANCELLED", "by 0", "", "", "sacct")
    assert states["20"].job == "16_0"


def test_a_path_that_looks_like_a_state_makes_scontrol_say_nothing() -> None:
    [(raw, state)] = parse_scontrol(SCONTROL.format(command="/run/job.sbatch"))
    assert (raw, state.job, state.state, state.nodes) == ("20", "16_0", "COMPLETED", "node1")
    assert parse_scontrol(SCONTROL.format(command="/run JobState=RUNNING x")) == []


def test_no_state_is_both_live_and_over_and_unknown_is_neither() -> None:
    assert not LIVE & OVER
    assert not is_live("UNKNOWN") and not is_over("UNKNOWN")
    assert not is_live("REVOKED") and not is_over("REVOKED")  # it lives on another cluster
    assert is_live("EXPEDITING")
    assert is_live("REQUEUED") and is_live("COMPLETING") and is_over("NODE_FAIL")


def test_all_jobs_are_asked_of_one_squeue(answers: Path) -> None:
    slurm_commands(answers, squeue=shown(SQUEUE))
    states = job_states(["15", "16_3", "17", "15", "16_0"])
    assert [state.state for state in states.values()] == [
        "RUNNING", "PENDING", "PENDING", "COMPLETED",
    ]  # fmt: skip
    assert list(states) == ["15", "16_3", "17", "16_0"]
    assert asked(answers) == ["squeue"]
    assert job_states([]) == {}


def test_an_element_is_found_by_its_raw_id_and_an_array_by_one_that_is_live(answers: Path) -> None:
    slurm_commands(answers, squeue=shown(SQUEUE + "16_2|16|COMPLETED|node1|N/A|None\n"))
    states = job_states(["20", "16"])
    assert states["20"].state == "COMPLETED" and states["20"].job == "20"
    assert states["16"].state == "PENDING"


def test_sacct_may_say_that_a_forgotten_job_is_over_and_not_that_it_is_live(answers: Path) -> None:
    slurm_commands(answers, sacct=shown(SACCT))
    states = job_states(["21", "15"])
    assert states["21"] == JobState(
        "21", "NODE_FAIL", "", "node[1-3]", "2026-11-24T08:28:56", "sacct"
    )
    assert states["15"].state == "UNKNOWN"
    assert "squeue does not show it; sacct says RUNNING; scontrol: " in states["15"].reason
    assert GONE in states["15"].reason


def test_scontrol_is_asked_last(answers: Path) -> None:
    slurm_commands(answers, scontrol=shown(SCONTROL.format(command="x")))
    assert job_states(["16_0"])["16_0"].source == "scontrol"
    assert asked(answers) == ["squeue", "sacct", "scontrol"]


def test_no_question_makes_slurm_send_the_jobs_of_all_users(answers: Path) -> None:
    """A list of jobs would: squeue filters it itself."""
    slurm_commands(answers, squeue=shown(SQUEUE))
    job_states(["15"])
    job_states(["15", "17"])
    one, several = (answers / "calls").read_text(encoding="utf-8").splitlines()
    assert " -j 15 " in one and "--user" not in one
    assert f" --user={os.getuid()} " in several and " -j " not in several


def test_one_job_that_squeue_has_forgotten_is_asked_of_the_others(answers: Path) -> None:
    slurm_commands(answers, squeue=f"echo '{GONE}' >&2; exit 1", sacct=shown(SACCT))
    assert job_states(["21"])["21"].state == "NODE_FAIL"


@pytest.mark.parametrize("command", ["squeue", "sacct", "scontrol"])
def test_a_command_that_fails_is_no_end_of_a_job(answers: Path, command: str) -> None:
    slurm_commands(answers, **{command: DOWN})
    state = job_states(["12"])["12"]
    assert state.state == "UNKNOWN"
    assert f"{command}: slurm_load_jobs error: Unable to contact slurm controller" in state.reason


def test_where_squeue_fails_nobody_else_is_believed(answers: Path) -> None:
    slurm_commands(answers, squeue=DOWN, sacct=shown(SACCT))
    assert job_states(["21"])["21"].state == "UNKNOWN"
    assert asked(answers) == ["squeue"]


def test_a_command_that_hangs_or_is_missing_is_no_end_of_a_job(
    answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm_commands(answers, squeue="exec sleep 30")
    assert "no answer in 0.2 s" in job_states(["12"], timeout_s=0.2)["12"].reason
    monkeypatch.setenv("PATH", str(answers / "nothing here"))
    state = job_states(["12"])["12"]
    assert state.state == "UNKNOWN" and state.reason.startswith("squeue: no such command")


def test_what_is_no_job_id_is_asked_of_nobody(answers: Path) -> None:
    slurm_commands(answers, squeue=shown(SQUEUE))
    states = job_states(["15", "--help", "", "16_[1-3]"])
    assert states["15"].state == "RUNNING"
    assert {states[job].reason for job in ("--help", "", "16_[1-3]")} == {"is no job id"}
    assert "--help" not in (answers / "calls").read_text()


def test_the_users_own_filters_hide_no_job(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm_commands(answers, squeue=f'test -z "$SQUEUE_PARTITION" || exit 0\n{shown(SQUEUE)}')
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    assert job_states(["15"])["15"].state == "RUNNING"
