"""Hand a run, or an array of runs, to Slurm; everything is checked before anything is made.

Decides what is submitted; `validate` says what cannot be, `scripts` writes it, `queue_job` asks
Slurm for it. Runs nothing itself.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft_dist.common import env
from peft_dist.common.durations import duration_s, duration_text
from peft_dist.common.errors import LaunchError, RecipeError, RunDirError
from peft_dist.common.sharing import GROUP, folder_mode, set_run_umask
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.cluster import Cluster, render_cluster
from peft_dist.data.first_rows import check_first_rows
from peft_dist.launch.model_folder import check_model_folder
from peft_dist.launch.placement import Machine, plan_processes
from peft_dist.plan.settle import (
    check_memory,
    cluster_hardware,
    fewest_nodes,
    settle_alike,
    time_limit_s,
)
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.run.environment import FILE, write_environment
from peft_dist.run.prediction import Prediction, as_measured, write_prediction
from peft_dist.run.sweep import (
    Element,
    grid,
    refuse_another_array,
    write_array,
)
from peft_dist.slurm import offline, validate
from peft_dist.slurm.after import wait_for
from peft_dist.slurm.chain import queue_chain
from peft_dist.slurm.ensure_not_running import ensure_not_running
from peft_dist.slurm.job_scripts import JOB_SCRIPT, Array, Job, scripts
from peft_dist.slurm.queue_job import Queued, alone, queue_job
from peft_dist.slurm.save_lead import lead_s
from peft_dist.slurm.snapshot import copy_trees, environment_of, import_paths, trees_to_copy
from peft_dist.slurm.submitting import check_script
from peft_dist.slurm.waves import queue_in_waves


@dataclass(frozen=True)
class Request:
    """What a user asks for."""

    recipe: str
    overrides: Sequence[str]
    folder: Path
    cluster: Cluster
    nodes: int | None = None
    """Default: the fewest that the plan finds enough, and 1 where it knows nothing."""
    time: str | None = None
    array: Sequence[str] = ()
    """`key=v1,v2,...` or a YAML file that maps keys to lists of values; all combinations."""
    limit: int | None = None
    singleton: bool = False
    chain: int = 0
    """Jobs to queue besides, each to go on where the one before it ends."""
    elements: Sequence[Element] = ()
    """An array that has been submitted before; each of its runs has a recipe of its own."""
    allow_changed: Sequence[str] = ()
    """Settings that may differ from those a run was trained with."""
    after: Sequence[str] = ()
    """Folders of runs and of other commands' jobs that must have ended well before."""
    frozen: bool = False
    """Whether a start refuses packages or checkouts that differ from those of now."""
    snapshot: bool = False
    """Whether to copy the checkouts that code is imported from, and run the copies."""
    anyway: bool = False
    """Whether to submit what cannot fit into memory all the same."""


@dataclass(frozen=True)
class Run:
    """One run of a submission."""

    folder: Path
    recipe: Recipe
    settings: Sequence[str]
    """In an array, what sets this element apart."""
    prediction: Prediction | None = None
    """What the plan says of it, for the record."""


@dataclass(frozen=True)
class Submission:
    """What would be submitted: every check that needs no Slurm has passed."""

    job: Job
    runs: Sequence[Run]
    files: Mapping[Path, str]
    """Every script, by where it belongs."""
    warnings: Sequence[str]
    chain: int = 0
    after: Sequence[str] = ()
    trees: Mapping[str, Path] = field(default_factory=dict)
    """Checkouts to copy."""

    def wanted(self, *, fresh: bool) -> dict[int, Run]:
        """Return the runs that have not finished, by their index; all of them with `fresh`."""
        return {
            index: run
            for index, run in enumerate(self.runs)
            if fresh or not RunDir(run.folder).is_finished
        }

    def argv(self, wanted: Collection[int], *more: str) -> list[str]:
        """Return the command that submits these runs, with more options."""
        options = []
        if self.job.array:
            limit = "" if self.job.array.limit is None else f"%{self.job.array.limit}"
            options = [f"--array={','.join(map(str, wanted))}{limit}"]
        return ["sbatch", "--parsable", *options, *more, str(self.job.folder / JOB_SCRIPT)]


def prepare(request: Request) -> Submission:
    """Check a request, and work out what is submitted; make nothing and ask nobody.

    Raises:
        PeftDistError: For a recipe or request that cannot run on the cluster.
    """
    cluster, folder = request.cluster, request.folder.absolute()
    _check_numbers(request)
    validate.check_account(cluster)
    validate.check_folder(folder)
    runs, nodes, warnings = _settled(request, _runs(request, folder))
    recipes = [run.recipe for run in runs]
    validate.check_alike(recipes)
    validate.check_processes(cluster, nodes, recipes[0])
    machine = Machine(gpus=cluster.gpus_per_node, cores=cluster.cpus_of_a_node or 1)
    per_node = cluster.processes_per_node or 0
    placement = plan_processes(recipes[0], machine, nodes, per_node=per_node)
    time_limit, time_from = validate.time_limit(cluster, request.time)
    if time_limit is None:
        time_s = time_limit_s([run.prediction for run in runs])
    else:
        time_s = duration_s(time_limit, where=time_from)
    trees = trees_to_copy() if request.snapshot else {}
    job = Job(
        name=validate.job_name(folder.name),
        folder=folder,
        cluster=cluster,
        placement=placement,
        time_s=time_s,
        lead_s=max(
            lead_s(RunDir(run.folder).ledger, cluster.signal_lead_s, run.prediction) for run in runs
        ),
        max_restarts=recipes[0].parallel.max_restarts,
        array=Array(len(runs), request.limit) if _is_array(request) else None,
        singleton=request.singleton,
        allow_changed=tuple(request.allow_changed),
        frozen=request.frozen,
        import_paths=import_paths(folder, trees if request.snapshot else None),
    )
    validate.check_limits(job, time_from=time_from)
    validate.check_cluster_files(cluster)
    warnings += validate.check_cpus(cluster)
    for run in runs:
        warnings += validate.check_paths(cluster, nodes, run.folder, run.recipe)
        warnings += validate.check_batch(run.recipe, placement.processes)
    offline.check_image(cluster)
    for recipe in {recipe.data: recipe for recipe in recipes}.values():
        check_first_rows(recipe)
        warnings += offline.check_recipe(cluster, recipe, request.recipe)
    for recipe in recipes:
        check_model_folder(recipe)
    files = scripts(job, [(run.folder, validate.local_model(run.recipe)) for run in runs])
    warnings = list(dict.fromkeys(warnings))
    return Submission(job, runs, files, warnings, request.chain, request.after, trees)


def submit(
    submission: Submission,
    *,
    command: Sequence[str],
    by: str = "submit",
    fresh: bool = False,
) -> Queued:
    """Submit, and return the job.

    Args:
        submission: What `prepare` returned.
        command: The command line, for the record.
        by: What the run's history says: `submit` or `resume`.
        fresh: Set runs that are there aside and start anew.

    Raises:
        PeftDistError: Where a run is live or Slurm refuses. Nothing has been made then, unless
            Slurm takes the script as it is and yet not the job, as for a limit of a QOS.
    """
    job = submission.job
    wanted = submission.wanted(fresh=fresh)
    if not wanted:
        raise RunDirError(
            "has finished", where=str(job.folder), remedy="start it anew with --fresh"
        )
    if job.cluster.sharing == GROUP:
        os.environ[env.SHARING] = GROUP
    set_run_umask()
    with alone(job.folder):
        return _submit(submission, wanted, command=command, by=by, fresh=fresh)


def _submit(
    submission: Submission,
    wanted: Mapping[int, Run],
    *,
    command: Sequence[str],
    by: str,
    fresh: bool,
) -> Queued:
    job = submission.job
    elements = [
        {"run_dir": run.folder.name, "settings": [*run.settings]} for run in submission.runs
    ]
    script = job.folder / JOB_SCRIPT
    if job.array:
        refuse_another_array(job.folder, elements)
    ensure_not_running([run.folder for run in wanted.values()], script)
    waiting = wait_for(submission.after, singleton=job.singleton)
    # The whole array may be more than Slurm takes at once.
    alone_first = ["--array=0"] if job.array else []
    start = check_script(submission.files[script], alone_first)
    for run in wanted.values():
        recipe, prediction = run.recipe, run.prediction
        if not fresh:
            recipe, prediction = as_measured(RunDir(run.folder), recipe, prediction)
        made = RunDir.claim(
            run.folder, recipe, command=command, fresh=fresh, allow_changed=job.allow_changed
        )
        write_prediction(made, prediction)
        _make_slurm_folder(made, job.cluster)
    _freeze(submission, [run.folder for run in wanted.values()])
    if job.array:
        write_array(job.folder, elements, job.array.limit)
    job.folder.joinpath("logs").mkdir(mode=folder_mode(), exist_ok=True)
    for path, text in submission.files.items():
        write_text_atomic(path, text)
    facts = {
        "by": by,
        "nodes": job.placement.nodes,
        "gpus": job.gpus,
        "time_limit": None if job.time_s is None else duration_text(job.time_s),
        "singleton": job.singleton,
        "frozen": job.frozen,
    }

    def queue(indexes: Collection[int]) -> str:
        return queue_job(
            submission.argv(indexes, *waiting.options),
            {wanted[index].folder: index if job.array else None for index in indexes},
            script=submission.files[script],
            facts=facts,
            waiting=waiting,
            clusters=str(job.cluster.sbatch.get("clusters", "")),
        )

    if job.array:
        job_id = queue_in_waves(queue, [*wanted], job.folder, job.array.limit)
    else:
        job_id = queue([*wanted])
    base, text = ["sbatch", "--parsable"], submission.files[script]
    queue_chain(job, submission.chain, base, script=text, first=job_id)
    return Queued(job_id, "" if waiting.jobs else start)


def _freeze(submission: Submission, folders: Sequence[Path]) -> None:
    """Note with what the runs are submitted, and copy what would change."""
    job = submission.job
    if submission.trees:
        copy_trees(submission.trees, job.folder)
    found = environment_of(job.cluster, with_checkouts=not job.import_paths)
    for folder in folders:
        (folder / FILE).unlink(missing_ok=True)
        if found is not None:
            write_environment(folder, found)


def _check_numbers(request: Request) -> None:
    if request.chain and _is_array(request):
        raise RecipeError("is for one run", where="--chain", remedy="submit the runs one by one")
    for option, number in (("--nodes", request.nodes), ("--limit", request.limit)):
        if number is not None and number < 1:
            raise LaunchError(f"got {number}", where=option, remedy="must be at least 1")
    if request.limit is not None and not _is_array(request):
        raise RecipeError("is for arrays", where="--limit", remedy="give --array too")


def _is_array(request: Request) -> bool:
    return bool(request.array or request.elements)


def _runs(request: Request, folder: Path) -> list[Run]:
    if request.elements:
        folders = [folder / element["run_dir"] for element in request.elements]
        return [
            Run(own, load_recipe(own / "recipe.yaml", request.overrides), element["settings"])
            for own, element in zip(folders, request.elements, strict=True)
        ]
    if request.array:
        return [
            Run(
                folder / f"{index:03d}",
                load_recipe(request.recipe, [*request.overrides, *settings]),
                settings,
            )
            for index, settings in enumerate(grid(request.array))
        ]
    return [Run(folder, load_recipe(request.recipe, request.overrides), ())]


def _settled(request: Request, runs: Sequence[Run]) -> tuple[list[Run], int, list[str]]:
    """Return the runs with every `auto` replaced, their nodes, and what there is to say of memory.

    Raises:
        LaunchError: For one that cannot fit.
    """
    hardware, most = cluster_hardware(request.cluster), request.cluster.max_nodes
    recipes = [run.recipe for run in runs]
    nodes = request.nodes or fewest_nodes(recipes, hardware, most)
    settled = settle_alike(recipes, hardware, nodes)
    warnings = [
        f"memory was not checked: {found.unknown}"
        for found in settled
        if hardware is not None and found.unknown
    ]
    if request.nodes is None and nodes > 1:
        warnings.append(f"on {nodes} nodes: it does not fit on fewer; --nodes asks for others")
    for found in settled:
        warnings += check_memory(found, anyway=request.anyway)
    settled_runs = [
        replace(run, recipe=found.recipe, prediction=found.prediction())
        for run, found in zip(runs, settled, strict=True)
    ]
    return settled_runs, nodes, warnings


def _make_slurm_folder(run: RunDir, cluster: Cluster) -> None:
    folder = run.path / "slurm"
    folder.mkdir(mode=folder_mode(), exist_ok=True)
    for name in ("cancelled", "excluded", "successor"):
        (folder / name).unlink(missing_ok=True)
    write_text_atomic(folder / "cluster.yaml", render_cluster(cluster))
