"""Hand a run, or an array of runs, to Slurm; everything is checked before anything is made.

Decides what is submitted; `render` writes it, `client` speaks to Slurm. Runs nothing itself.
"""

import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_dist.attempts import refuse_if_held
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.cluster import Cluster, duration_s, duration_text, load_cluster
from peft_dist.config.cluster import render_cluster as cluster_text
from peft_dist.config.derived import batch_shape
from peft_dist.errors import ClusterError, LaunchError, RecipeError, RunDirError
from peft_dist.launch.placement import Machine, place
from peft_dist.run_dir import ARRAY_FILE, RunDir, write_text_atomic
from peft_dist.slurm import client, jobs
from peft_dist.slurm.arrays import array_elements, grid, make_array
from peft_dist.slurm.lead import lead_s
from peft_dist.slurm.render import JOB_SCRIPT, Array, Job, render_job, scripts
from peft_dist.slurm.states import is_live, is_over, job_states

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""Folders that each node has for itself, nearly everywhere."""


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    recipe: str
    overrides: Sequence[str]
    folder: Path
    cluster: Cluster
    nodes: int
    time: str | None = None
    array: Sequence[str] = ()
    """`key=v1,v2,...` or a YAML file that maps keys to lists of values; all combinations."""
    limit: int | None = None
    singleton: bool = False
    allow_changed: Collection[str] = ()


@dataclass(frozen=True)
class Run:
    """One run of a submission."""

    folder: Path
    recipe: Recipe
    settings: Sequence[str]
    """In an array, what sets this element apart."""


@dataclass(frozen=True)
class Submission:
    """What would be submitted: every check that needs no Slurm has passed."""

    job: Job
    runs: Sequence[Run]
    warnings: Sequence[str]

    @property
    def files(self) -> dict[Path, str]:
        """Every script, by where it belongs."""
        return scripts(self.job, [(run.folder, _local_model(run.recipe)) for run in self.runs])


def prepare(request: Request) -> Submission:
    """Check a request, and work out what is submitted; make nothing and ask nobody.

    Raises:
        PeftDistError: For a recipe or request that cannot run on the cluster.
    """
    cluster, folder = request.cluster, request.folder.absolute()
    settings_of_runs = grid(request.array)
    runs = [
        Run(
            folder / f"{index:03d}" if settings_of_runs else folder,
            load_recipe(request.recipe, [*request.overrides, *settings]),
            settings,
        )
        for index, settings in enumerate(settings_of_runs or [()])
    ]
    machine = Machine(gpus=cluster.gpus_per_node, cores=cluster.cpus_of_a_node or 1)
    placements = [
        place(run.recipe, machine, request.nodes, per_node=cluster.processes_per_node or 0)
        for run in runs
    ]
    if any(placement != placements[0] for placement in placements):
        raise RecipeError(
            "elements of one array differ in strategy or processes",
            where="--array",
            remedy="submit them one by one",
        )
    if request.limit is not None and not settings_of_runs:
        raise RecipeError("is for arrays", where="--limit", remedy="give --array too")
    job = Job(
        name=_job_name(folder.name),
        folder=folder,
        cluster=cluster,
        placement=placements[0],
        time_s=_time_limit_s(request),
        lead_s=max(lead_s(RunDir(run.folder).ledger, cluster.signal_lead_s) for run in runs),
        max_restarts=runs[0].recipe.parallel.max_restarts,
        array=Array(len(runs), request.limit) if settings_of_runs else None,
        singleton=request.singleton,
    )
    _check_limits(request, job)
    for run in runs:
        _check_shared(cluster, request.nodes, run)
    _check_files(cluster)
    processes = job.placement.processes
    return Submission(job, runs, _check_batches(runs, processes))


def submit(
    submission: Submission,
    *,
    command: Sequence[str],
    by: str = "submit",
    fresh: bool = False,
    allow_changed: Collection[str] = (),
) -> str:
    """Submit, and return the job's id.

    Args:
        submission: What `prepare` returned.
        command: The command line, for the record.
        by: What the run's history says: `submit` or `resume`.
        fresh: Set runs that are there aside and start anew.
        allow_changed: Settings that may differ from those a run was trained with.

    Raises:
        PeftDistError: Where Slurm refuses, or a run is live; then nothing has been made.
    """
    job = submission.job
    open_runs = [index for index, run in enumerate(submission.runs) if not _is_done(run, fresh)]
    if not open_runs:
        raise RunDirError(
            "has finished", where=str(job.folder), remedy="start it anew with --fresh"
        )
    refuse_if_live([run.folder for run in submission.runs])
    client.check_script(render_job(job))
    if job.array:
        elements = [
            {"run_dir": run.folder.name, "settings": list(run.settings)} for run in submission.runs
        ]
        make_array(job.folder, elements, job.array.limit)
    for index in open_runs:
        run = submission.runs[index]
        made = RunDir.claim(
            run.folder, run.recipe, command=command, fresh=fresh, allow_changed=allow_changed
        )
        _make_slurm_folder(made, job.cluster)
    job.folder.joinpath("logs").mkdir(mode=0o700, exist_ok=True)
    for path, text in submission.files.items():
        if path.parent.is_dir():
            write_text_atomic(path, text)
    options = [f"--array={_elements(open_runs, job.array)}"] if job.array else []
    job_id = client.sbatch(job.folder / JOB_SCRIPT, options)
    for index in open_runs:
        event = {
            "event": "submitted",
            "job": f"{job_id}_{index}" if job.array else job_id,
            "time": int(time.time()),
            "by": by,
            "nodes": job.placement.nodes,
            "time_limit": None if job.time_s is None else duration_text(job.time_s),
            "singleton": job.singleton,
        }
        jobs.record(submission.runs[index].folder, event)
    return job_id


def again(
    folder: Path,
    overrides: Sequence[str],
    *,
    nodes: int | None = None,
    time_limit: str | None = None,
    cluster: str | None = None,
) -> Request:
    """Return the request that submits a run, or an array's unfinished runs, once more.

    Args:
        folder: What was submitted.
        overrides: Settings that replace those of the run's own recipe.
        nodes: Another number of nodes.
        time_limit: Another time limit.
        cluster: Another cluster file.

    Raises:
        RunDirError: Where the folder was never submitted.
    """
    elements = array_elements(folder)
    first = folder / elements[0]["run_dir"] if elements else folder
    before = [event for event in jobs.events(first) if "nodes" in event and "by" in event]
    own_cluster = first / "slurm" / "cluster.yaml"
    if cluster is None and not own_cluster.is_file():
        raise RunDirError(
            "was not submitted to Slurm", where=str(folder), remedy="name a cluster with --cluster"
        )
    last: Mapping[str, Any] = before[-1] if before else {}
    return Request(
        recipe=str(first / "recipe.yaml"),
        overrides=overrides,
        folder=folder,
        cluster=load_cluster(cluster or own_cluster),
        nodes=nodes or int(last.get("nodes", 1)),
        time=time_limit or last.get("time_limit"),
        singleton=bool(last.get("singleton", False)),
    )


def was_submitted(folder: Path) -> bool:
    """Say whether a folder holds a run, or an array of runs, that was submitted to Slurm."""
    return (folder / ARRAY_FILE).is_file() or (folder / "slurm" / "cluster.yaml").is_file()


def refuse_if_live(folders: Sequence[Path]) -> None:
    """Refuse runs that wait, run, or may do so.

    Raises:
        RunDirError: Naming the job.
    """
    newest = {job: folder for folder in folders if (job := jobs.newest_job(folder)) is not None}
    states = job_states(list(newest)) if newest else {}
    for job, folder in newest.items():
        state = states[job]
        if is_live(state.state):
            raise RunDirError(
                f"job {job} is {state.state}",
                where=str(folder),
                remedy=f"wait for it, or `peft-dist cancel {folder}`",
            )
        if not is_over(state.state):
            raise RunDirError(
                f"cannot tell whether job {job} is over: {state.reason}",
                where=str(folder),
                remedy="try again when Slurm answers",
            )
    for folder in folders:
        if folder not in newest.values():
            refuse_if_held(RunDir(folder).attempts)


def _job_name(name: str) -> str:
    """Return a name that is safe in a path, in a table and in a script."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:64] or "run"


def _time_limit_s(request: Request) -> int | None:
    text = request.time or request.cluster.default_time or request.cluster.max_time
    return None if text is None else duration_s(text, where="--time" if request.time else "cluster")


def _check_limits(request: Request, job: Job) -> None:
    cluster = request.cluster
    if cluster.max_nodes is not None and request.nodes > cluster.max_nodes:
        raise LaunchError(
            f"{request.nodes} nodes of the {cluster.max_nodes} that a job may have",
            where="--nodes",
            remedy="ask for fewer, or mend max_nodes in the cluster file",
        )
    longest = None if cluster.max_time is None else duration_s(cluster.max_time)
    if job.time_s is not None and longest is not None and job.time_s > longest:
        raise LaunchError(
            f"{duration_text(job.time_s)} is more than the {cluster.max_time} a job may take",
            where="--time",
            remedy="ask for less: the run goes on by itself in the next job",
        )
    if job.time_s is not None and job.time_s <= 2 * job.lead_s:
        raise LaunchError(
            f"{duration_text(job.time_s)} leaves no time to train: "
            f"saving begins {job.lead_s} s before the end",
            where="--time",
            remedy="ask for more, or lower signal_lead_s in the cluster file",
        )


def _check_shared(cluster: Cluster, nodes: int, run: Run) -> None:
    """Refuse paths that the nodes surely do not share."""
    recipe = run.recipe
    paths = {
        "--run-dir": str(run.folder),
        "model.name": _local_model(recipe),
        "data.train": recipe.data.train,
        "data.eval": recipe.data.eval,
    }
    for field, text in paths.items():
        if text is None or not text.startswith("/"):
            continue
        path = Path(os.path.realpath(text))
        if cluster.shared:
            if not any(path.is_relative_to(os.path.realpath(root)) for root in cluster.shared):
                raise LaunchError(
                    f"{text} is in none of {', '.join(cluster.shared)}",
                    where=field,
                    remedy="put it in one of them, or mend shared: in the cluster file",
                )
        elif nodes > 1 and any(path.is_relative_to(root) for root in NODE_LOCAL):
            raise LaunchError(
                f"{text} is on a disk that each node has for itself",
                where=field,
                remedy="put it elsewhere, or name it under shared: in the cluster file",
            )


def _check_files(cluster: Cluster) -> None:
    """Refuse a secrets file that is open to others, before it is ever used."""
    path = Path(cluster.secrets_file or os.devnull)
    if path.is_file() and path.stat().st_mode & 0o077:
        raise ClusterError(
            f"{path} can be read by others", where="secrets_file", remedy=f"chmod 600 {path}"
        )


def _check_batches(runs: Sequence[Run], processes: int) -> list[str]:
    """Refuse steps with fewer rows than processes; return what is only worth a word."""
    warnings = []
    for run in runs:
        shape = batch_shape(run.recipe, processes)
        if shape is None:
            continue
        if shape.rows_per_step < processes:
            raise RecipeError(
                f"{shape.rows_per_step} rows for {processes} processes",
                where="train.global_batch_size",
                remedy=f"set it to {processes} or more, or take fewer nodes",
            )
        if shape.rows_per_step % processes:
            warnings.append(
                f"train.global_batch_size: {shape.rows_per_step} rows are not shared out evenly "
                f"over {processes} processes; some wait for others in every step"
            )
    return sorted(set(warnings))


def _local_model(recipe: Recipe) -> str | None:
    return recipe.model.name if Path(recipe.model.name).is_dir() else None


def _is_done(run: Run, fresh: bool) -> bool:
    return RunDir(run.folder).is_finished and not fresh


def _make_slurm_folder(run: RunDir, cluster: Cluster) -> None:
    folder = run.path / "slurm"
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in ("cancelled", "excluded", "undecided", "decision"):
        (folder / name).unlink(missing_ok=True)
    write_text_atomic(folder / "cluster.yaml", cluster_text(cluster))


def _elements(indexes: Sequence[int], array: Array) -> str:
    limit = "" if array.limit is None else f"%{array.limit}"
    return ",".join(map(str, indexes)) + limit
