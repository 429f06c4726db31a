"""What Slurm says of jobs: whether they wait, run or are over, or that nobody can tell.

Slurm forgets jobs, its daemons may be down, and its accounting lags. None of that means that a job
has ended: what no answer proves is `UNKNOWN`, neither live nor over.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from peft_dist.common.errors import SlurmError
from peft_dist.slurm.cli_client import ask_slurm, by_cluster, of_cluster

UNKNOWN = "UNKNOWN"
"""The state of a job that no command could tell; its `reason` says why."""
LIVE = frozenset(
    ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING",
     "STAGE_OUT", "RESIZING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT",
     "RESV_DEL_HOLD", "POWER_UP_NODE", "EXPEDITING")
)  # fmt: skip
"""States of jobs that run, or will without anybody doing anything more than releasing them."""
OVER = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY",
     "BOOT_FAIL", "DEADLINE", "LAUNCH_FAILED")
)  # fmt: skip
"""States of jobs that run no more, unless they are queued again. `REVOKED` is of neither: another
cluster of a federation has the job."""
JOB_NAME = re.compile(r"[0-9]+(_[0-9]+)?(@[A-Za-z0-9_.,-]+)?")
NOT_THERE = "Invalid job id"
"""What squeue says, and fails, where the one job it is asked for is gone."""
SCONTROL_AT_MOST = 8
"""Jobs asked of `scontrol`, which takes one at a time; it knows no more than `squeue` shows."""
FORMAT = "%i|%A|%T|%N|%S|%r"
"""squeue: job, raw id, state, nodes, start, reason; the only free text is the last."""
FIELDS = "JobID,JobIDRaw,State,NodeList,Start"
"""The same of sacct, whose reason is why a job waited before it ran."""


@dataclass(frozen=True)
class JobState:
    """What is known of a job."""

    job: str
    state: str
    """Slurm's own word, or `UNKNOWN`."""
    reason: str = ""
    """Why it waits or ended; empty where Slurm gives none."""
    nodes: str = ""
    """Node list as Slurm writes it: node[1-4]."""
    start: str = ""
    """When it started, or is expected to, on Slurm's clock."""
    source: str = ""
    """Which command said so."""


def is_live(state: str) -> bool:
    """Whether a job in this state may still run; False of `UNKNOWN` too."""
    return state in LIVE


def is_over(state: str) -> bool:
    """Whether a job in this state has surely ended; False of `UNKNOWN` too."""
    return state in OVER


def job_states(jobs: Sequence[str], *, timeout_s: float = 30) -> dict[str, JobState]:
    """Return the state of every job asked for, `UNKNOWN` where nobody could tell.

    One squeue for all; those that it does not show, as other users' of several, are asked of sacct,
    then of scontrol.

    Args:
        jobs: As `squeue -r` prints them: `12`, or `12_3` for an element of an array; with
            `@cluster` at the end where Slurm has several.
        timeout_s: How long each command may take.
    """
    wanted = [job for job in dict.fromkeys(jobs) if JOB_NAME.fullmatch(job)]
    # One word that is no job id, and squeue would answer none of them.
    refused = {job: JobState(job, UNKNOWN, "is no job id") for job in jobs if job not in wanted}
    found = {}
    for cluster, own in by_cluster(wanted).items():
        for job, state in _ask(own, cluster, timeout_s).items():
            name = f"{job}@{cluster}" if cluster else job
            found[name] = replace(state, job=name)
    return refused | found


def _ask(wanted: Sequence[str], cluster: str, timeout_s: float) -> dict[str, JobState]:
    at = of_cluster(cluster)
    # Of one job, or of one user's, the controller sends no more than that; for a list of jobs it
    # would send the table of all users' (slurm/src/squeue/squeue.c, _print_job).
    who = ["-j", wanted[0]] if len(wanted) == 1 else [f"--user={os.getuid()}"]
    argv = ["squeue", *at, "--noheader", "--array", "--states=all", *who, "-o", FORMAT]
    try:
        found = _pick(parse_squeue(ask_slurm(argv, timeout_s=timeout_s)), wanted)
    except SlurmError as error:
        if len(wanted) > 1 or NOT_THERE not in str(error):
            # Whoever else answers now may not know that the job was queued again.
            return {job: JobState(job, UNKNOWN, _reason("squeue", error)) for job in wanted}
        found = {}
    unknown = {job: ["squeue does not show it"] for job in wanted if job not in found}
    if unknown:
        _ask_sacct(found, unknown, at, timeout_s)
    for job in list(unknown)[:SCONTROL_AT_MOST]:
        _ask_scontrol(job, found, unknown, at, timeout_s)
    for job, reasons in unknown.items():
        found[job] = JobState(job, UNKNOWN, "; ".join(reasons))
    return found


def _ask_sacct(
    found: dict[str, JobState],
    unknown: dict[str, list[str]],
    at: Sequence[str],
    timeout_s: float,
) -> None:
    argv = ["sacct", *at, "--noheader", "--allocations", "--parsable2", "-o", FIELDS]
    try:
        text = ask_slurm([*argv, "-j", ",".join(unknown)], timeout_s=timeout_s)
    except SlurmError as error:
        for reasons in unknown.values():
            reasons.append(_reason("sacct", error))
        return
    answers = _pick(parse_sacct(text), unknown)
    for job, reasons in list(unknown.items()):
        answer = answers.get(job)
        if answer is None:
            reasons.append("sacct does not know it")
        elif is_over(answer.state):
            found[job] = answer
            del unknown[job]
        else:  # accounting missed its end: a job that may run, squeue shows
            reasons.append(f"sacct says {answer.state}")


def _ask_scontrol(
    job: str,
    found: dict[str, JobState],
    unknown: dict[str, list[str]],
    at: Sequence[str],
    timeout_s: float,
) -> None:
    try:
        text = ask_slurm(["scontrol", *at, "show", "job", "-o", job], timeout_s=timeout_s)
    except SlurmError as error:
        unknown[job].append(_reason("scontrol", error))
        return
    answer = _pick(parse_scontrol(text), [job]).get(job)
    if answer is None:
        unknown[job].append("scontrol does not know it")
    else:
        found[job] = answer
        del unknown[job]


def parse_squeue(text: str) -> list[tuple[str, JobState]]:
    """Return raw id and state of every whole line that squeue printed in our `FORMAT`."""
    rows = [line.split("|", 5) for line in text.splitlines()]
    return [_job(row, "squeue") for row in rows if len(row) == 6 and _names_job(row)]


def parse_sacct(text: str) -> list[tuple[str, JobState]]:
    """Return raw id and state of every whole line that sacct printed with our `FIELDS`."""
    rows = [line.split("|") for line in text.splitlines()]
    # It also says who cancelled: "CANCELLED by 1000".
    return [
        _job([*row, row[2].partition(" ")[2]], "sacct")
        for row in rows
        if len(row) == 5 and _names_job(row)
    ]


def parse_scontrol(text: str) -> list[tuple[str, JobState]]:
    """Return raw id and state of every job that `scontrol show job -o` printed.

    Job names and paths may hold anything; a line that says one field twice says nothing.
    """
    found = []
    for line in text.splitlines():
        pairs = re.findall(
            r"(?:^| )(JobId|ArrayJobId|ArrayTaskId|JobState|Reason|NodeList|StartTime)=(\S*)", line
        )
        field = dict(pairs)
        if len(field) < len(pairs) or not {"JobId", "JobState"} <= field.keys():
            continue
        job = field["JobId"]
        if "ArrayJobId" in field:
            job = f"{field['ArrayJobId']}_{field.get('ArrayTaskId', '')}"
        values = [field.get(name, "") for name in ("NodeList", "StartTime", "Reason")]
        found.append(_job([job, field["JobId"], field["JobState"], *values], "scontrol"))
    return found


def _names_job(row: Sequence[str]) -> bool:
    return row[0][:1].isdecimal() and row[1].isdecimal() and row[2][:1].isupper()


def _job(values: Sequence[str], source: str) -> tuple[str, JobState]:
    job, raw, state, nodes, start, reason = (_clean(value) for value in values)
    return raw, JobState(job, state.partition(" ")[0], reason, nodes, start, source)


def _clean(value: str) -> str:
    value = " ".join(value.split())
    return "" if value in ("None", "(null)", "N/A", "Unknown", "None assigned") else value


def _pick(answers: Sequence[tuple[str, JobState]], wanted: Iterable[str]) -> dict[str, JobState]:
    """Return the answer to each job by its name, else by its raw id, which array elements have.

    The array itself has the raw id of its last element, and all elements while none has started.
    """
    by_raw: dict[str, JobState] = {}
    for raw, answer in answers:
        if raw not in by_raw or is_live(answer.state):
            by_raw[raw] = answer
    by_name = {answer.job: answer for _, answer in answers}
    found = {}
    for job in wanted:
        if job in by_name or job in by_raw:
            found[job] = replace(by_name.get(job) or by_raw[job], job=job)
    return found


def _reason(command: str, error: SlurmError) -> str:
    text = str(error)
    return text if text.startswith(command) else f"{command}: {text}"
