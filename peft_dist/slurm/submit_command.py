"""Hand evaluate, quantize or merge to Slurm: a job in a folder of its own.

The job is that of a run in all but what its nodes run; see `command_supervisor`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft_dist.common import env
from peft_dist.common.durations import duration_s, duration_text
from peft_dist.common.errors import LaunchError, RecipeError
from peft_dist.common.sharing import GROUP, set_run_umask
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.cluster import Cluster, render_cluster
from peft_dist.config.parallel import Parallel
from peft_dist.launch.command import merge_command, merge_words, quantize_command
from peft_dist.launch.placement import Machine, Placement, plan_processes
from peft_dist.run.command_folder import check_command_folder, make_command_folder
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.slurm import offline, validate
from peft_dist.slurm.after import wait_for
from peft_dist.slurm.ensure_not_running import ensure_not_running
from peft_dist.slurm.job_scripts import JOB_SCRIPT, Job, interpreter_of, scripts, workers
from peft_dist.slurm.queue_job import Queued, alone, queue_job
from peft_dist.slurm.submitting import check_script

LEAD_S = 30
"""Seconds before its time limit at which a command is stopped, to say so: it saves nothing."""


@dataclass(frozen=True)
class Where:
    """On what a command runs, and when."""

    cluster: Cluster
    nodes: int = 1
    time: str | None = None
    after: Sequence[str] = ()
    job_dir: str | None = None


@dataclass(frozen=True)
class CommandJob:
    """A command that is ready to be submitted; nothing has been made or asked."""

    job: Job
    words: Sequence[str]
    """The command, as a person would type it."""
    warnings: Sequence[str]
    after: Sequence[str]

    @property
    def folder(self) -> Path:
        """Where its scripts, logs and notes go."""
        return self.job.folder

    @property
    def files(self) -> dict[Path, str]:
        """Every script, by where it belongs."""
        return scripts(self.job, [(self.folder, None)])

    def argv(self, *more: str) -> list[str]:
        """Return the command that submits it, with more options."""
        return ["sbatch", "--parsable", *more, str(self.folder / JOB_SCRIPT)]


def evaluate_job(
    where: Where, run_dir: str, overrides: Sequence[str], *, processes: int | None = None
) -> CommandJob:
    """Return the job that scores a run's adapter, once that is there.

    Args:
        where: On what.
        run_dir: The run.
        overrides: Settings that replace those of its recipe.
        processes: How many share the work. Default: as many as the cluster file says of a node.

    Raises:
        PeftDistError: For what cannot run there.
    """
    run = RunDir.open(run_dir)
    recipe = load_recipe(run.recipe, overrides)
    if recipe.data.eval is None:
        raise RecipeError(
            "there are no held-out rows", where="data.eval", remedy="add data.eval=FILE"
        )
    # As many processes as there are here: those that trained say nothing of that.
    parallel = Parallel(strategy=recipe.parallel.strategy, processes=processes)
    recipe = recipe.model_copy(update={"parallel": parallel})
    placement = _place(recipe, where)
    offline.check_recipe(where.cluster, recipe, str(run.recipe))
    arguments = [str(run.path), *overrides]
    command = workers(where.cluster, placement, "score.py", arguments)
    folder = Path(where.job_dir or run.path / "evaluate").absolute()
    paths = {"RUN_DIR": str(run.path), "model.name": recipe.model.name}
    return _job(where, folder, placement, ["evaluate", *arguments], command, paths)


def merge_job(
    where: Where, run_dir: str, out: str, *, base: str = "full", gguf: str | None = None
) -> CommandJob:
    """Return the job that merges a run's adapter into its base, once it is there.

    Args:
        where: On what; one process works, with at most one GPU.
        run_dir: The run.
        out: The folder to make.
        base: What the adapter is added to: `full`, the weights of the files, or `dequantized`,
            those that 4-bit training saw.
        gguf: Type of numbers of a GGUF file that is also made, or None.

    Raises:
        PeftDistError: For what cannot run there.
    """
    run, target = RunDir.open(run_dir), Path(out).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise LaunchError(
            f"{target} is already there", where="--out", remedy="choose another folder"
        )
    recipe = load_recipe(run.recipe)
    _check_model(where, recipe.model.name, recipe.model.revision)
    where, placement = _one_process(where)
    python = interpreter_of(where.cluster)
    command = merge_command(run.path, target, base=base, gguf=gguf, python=python)
    words = merge_words(run.path, target, base=base, gguf=gguf)
    folder = Path(where.job_dir or run.path / "merge").absolute()
    paths = {"RUN_DIR": str(run.path), "model.name": recipe.model.name, "--out": str(target)}
    return _job(where, folder, placement, words, command, paths)


def quantize_job(where: Where, model: str, options: Mapping[str, str]) -> CommandJob:
    """Return the job that fills the cache with the packed form of a model.

    Args:
        where: On what; one process works, with at most one GPU.
        model: Folder or hub id.
        options: Those of `quantize`, with their values.

    Raises:
        PeftDistError: For what cannot run there.
    """
    name = str(Path(model).absolute()) if Path(model).is_dir() else model
    _check_model(where, name, options.get("--revision"))
    where, placement = _one_process(where)
    words = [name, *(word for pair in options.items() for word in pair)]
    command = quantize_command(words, python=interpreter_of(where.cluster))
    folder = Path(where.job_dir or Path("runs") / f"quantize-{Path(name).name}").absolute()
    return _job(where, folder, placement, ["quantize", *words], command, {"MODEL": name})


def submit_command(made: CommandJob) -> Queued:
    """Submit a command's job, and return it.

    Raises:
        PeftDistError: Where it is live or Slurm refuses; nothing has been made then.
    """
    job, folder = made.job, made.folder
    if job.cluster.sharing == GROUP:
        os.environ[env.SHARING] = GROUP
    set_run_umask()
    script = folder / JOB_SCRIPT
    with alone(folder):
        ensure_not_running([folder], script)
        waiting = wait_for(made.after)
        start = check_script(made.files[script])
        make_command_folder(folder, made.words)
        for name in ("cancelled", "excluded", "successor"):
            (folder / "slurm" / name).unlink(missing_ok=True)
        write_text_atomic(folder / "slurm" / "cluster.yaml", render_cluster(job.cluster))
        for path, text in made.files.items():
            write_text_atomic(path, text)
        facts = {
            "by": "submit",
            "nodes": job.placement.nodes,
            "gpus": job.gpus,
            "time_limit": None if job.time_s is None else duration_text(job.time_s),
        }
        job_id = queue_job(
            made.argv(*waiting.options),
            {folder: None},
            script=made.files[script],
            facts=facts,
            waiting=waiting,
            clusters=str(job.cluster.sbatch.get("clusters", "")),
        )
        return Queued(job_id, "" if waiting.jobs else start)


def _job(
    where: Where,
    folder: Path,
    placement: Placement,
    words: Sequence[str],
    command: Sequence[str],
    paths: Mapping[str, str],
) -> CommandJob:
    cluster = where.cluster
    validate.check_account(cluster)
    check_command_folder(folder, words[0])
    validate.check_cluster_files(cluster)
    offline.check_image(cluster)
    limit, limit_from = validate.time_limit(cluster, where.time)
    job = Job(
        name=validate.job_name(f"{words[0]}-{Path(words[1]).name}"),
        folder=folder,
        cluster=cluster,
        placement=placement,
        time_s=None if limit is None else duration_s(limit, where=limit_from),
        lead_s=LEAD_S,
        max_restarts=0,
        command=tuple(command),
    )
    validate.check_limits(job, time_from=limit_from)
    paths = {"--job-dir": str(folder), **paths}
    warnings = validate.check_cpus(cluster) + validate.check_shared(cluster, where.nodes, paths)
    return CommandJob(job, words, warnings, where.after)


def _check_model(where: Where, name: str, revision: str | None) -> None:
    remedy = "`peft-dist fetch RECIPE --cluster FILE` on a login node, of a recipe with this model"
    offline.check_model(where.cluster, name, revision, remedy=remedy)


def _place(recipe: Recipe, where: Where) -> Placement:
    cluster = where.cluster
    if where.nodes < 1:
        raise LaunchError(f"got {where.nodes}", where="--nodes", remedy="must be at least 1")
    validate.check_processes(cluster, where.nodes, recipe)
    machine = Machine(gpus=cluster.gpus_per_node, cores=cluster.cpus_of_a_node or 1)
    per_node = cluster.processes_per_node or 0
    return plan_processes(recipe, machine, where.nodes, per_node=per_node)


def _one_process(where: Where) -> tuple[Where, Placement]:
    """Return a place for one process, with no more GPUs of a node than it can use."""
    gpus = min(1, where.cluster.gpus_per_node)
    own = {"gpus_per_node": gpus, "processes_per_node": 1}
    where = replace(where, cluster=where.cluster.model_copy(update=own), nodes=1)
    machine = Machine(gpus=gpus, cores=where.cluster.cpus_of_a_node or 1)
    return where, Placement("ddp", 1, 1, machine)
