"""Refuse to submit a run that a job trains, or may train where Slurm gives no answer."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.common.errors import RunDirError, SlurmError
from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from peft_dist.run.lease import refuse_if_held
from peft_dist.slurm.job_state import is_live, is_over, job_states
from peft_dist.slurm.submitting import find_job


def ensure_not_running(folders: Sequence[Path], script: Path) -> None:
    """Refuse runs that wait, run, or may do so.

    Args:
        folders: The runs.
        script: What can be submitted by hand where nobody knows.

    Raises:
        RunDirError: Naming the job.
    """
    for folder in folders:
        _look_up_submission(folder)
    histories = {folder: job_events.events(folder) for folder in folders}
    others = {job: folder for folder in folders for job in job_events.others(folder)}
    may_live = {
        job: folder
        for folder, events in histories.items()
        for job in job_events.candidates(folder, events)
    }
    states = job_states([*may_live, *others]) if may_live or others else {}
    for job, folder in (others | may_live).items():
        state = states[job]
        if is_live(state.state):
            raise RunDirError(
                f"job {job} is {state.state}",
                where=str(folder),
                remedy=f"wait for it, or `peft-dist cancel {folder}`",
            )
    for job, folder in (others | may_live).items():
        state = states[job]
        ended = job not in may_live or _has_ended(job, histories[folder])
        if not is_over(state.state) and not ended:
            raise RunDirError(
                f"cannot tell whether job {job} is over: {state.reason}",
                where=str(folder),
                remedy=f"try again when Slurm answers, or `sbatch {script}` where it surely is: "
                "two jobs never train one run at once",
            )
    attempts = [RunDir(folder).attempts for folder in folders if folder not in may_live.values()]
    with ThreadPoolExecutor(max(1, len(attempts))) as at_once:  # each may take its whole time
        for _ in at_once.map(refuse_if_held, attempts):
            pass


def _look_up_submission(folder: Path) -> None:
    """Note what came of a submission of which nobody learned a job's id.

    Raises:
        RunDirError: Where Slurm does not say.
    """
    event = job_events.open_submission(folder)
    if event is None:
        return
    try:
        found = find_job(event["token"], str(event.get("cluster") or ""))
    except SlurmError as error:
        raise RunDirError(
            f"cannot tell whether a job was queued that nobody knows the id of: {error}",
            where=str(folder),
            remedy="try again when Slurm answers",
        ) from error
    if found is None:
        job_events.record(folder, {"event": "refused", "job": ""})
        return
    job, _, cluster = found.partition("@")
    if cluster:
        event = event | {"cluster": cluster}
    if event["job"]:  # by that job, for when it is over
        replace_file(folder / "slurm" / "successor", f"{job}\n")
        job_events.record(folder, {"event": "queued", "job": event["job"], "successor": job})
    else:
        known = {key: event[key] for key in event.keys() - {"token", "element"}}
        element = "" if event.get("element") is None else f"_{event['element']}"
        job_events.record(folder, known | {"event": "submitted", "job": job + element})


def _has_ended(job: str, events: Sequence[job_events.Event]) -> bool:
    """Whether a job's script wrote that it ends for good; Slurm forgets jobs in minutes."""
    own = [event for event in events if event["job"] == job_events.bare(job)]
    return bool(own) and own[-1]["event"] == "ended" and own[-1].get("decision") != "again"
