"""Write the two scripts of a job: `job.sbatch` for its first node, `node.sh` for each.

Pure: the same job gives the same bytes. `template` quotes what gets in or refuses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_dist import __version__
from peft_dist.common.durations import duration_text
from peft_dist.common.env import NUMA_BINDING, SHARING
from peft_dist.common.sharing import GROUP
from peft_dist.config.cluster import Cluster, HeadAddress
from peft_dist.config.slurm_options import option_words, static_exclude
from peft_dist.launch.command import Meeting, launch_environment, worker_command
from peft_dist.launch.placement import Placement
from peft_dist.slurm.container import mounts, node_command, srun_options
from peft_dist.slurm.offline import VARIABLES as OFFLINE
from peft_dist.slurm.quoted_template import fill
from peft_dist.slurm.submitting import kept_variables

JOB_SCRIPT = "job.sbatch"
NODE_SCRIPT = "node.sh"
MEETING = Meeting(
    node="$SLURM_NODEID", host="$PEFT_DIST_HEAD", port="$PEFT_DIST_PORT", settings="$rendezvous"
)
SHARE = Path("$share")
"""Where `launch/` is for the interpreter on the nodes: it may be another one's, or an image's."""
BINDING = {"gpu-bind", "gpus-per-task"}
"""Options of srun by which a task sees no GPU but its own."""
FIND_SHARE = "from peft_dist.common import paths; print(paths.root())"


@dataclass(frozen=True)
class Array:
    """A job whose elements are runs of their own."""

    elements: int
    limit: int | None
    """Most elements that run at once."""


@dataclass(frozen=True)
class Job:
    """What is submitted: one run, or every run of an array, on so many nodes."""

    name: str
    folder: Path
    """The run directory, or the folder that holds those of an array."""
    cluster: Cluster
    placement: Placement
    time_s: int | None
    """Time limit; None leaves it to the partition."""
    lead_s: int
    """Seconds before the time limit at which the ranks are asked to save."""
    max_restarts: int
    array: Array | None = None
    singleton: bool = False
    """Whether to wait until no other job of this name runs."""
    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from those a run was trained with."""
    frozen: bool = False
    """Whether a start refuses an environment that is not that of the submission."""
    import_paths: tuple[str, ...] = ()
    """Where Python finds code before it looks at what is installed."""
    command: tuple[str, ...] = ()
    """What each node runs where this job does not train: its folder is that of a command."""

    @property
    def tasks_per_node(self) -> int:
        """Tasks that Slurm starts on a node: one, which starts its ranks, or one for each rank."""
        per_rank = self.cluster.launcher == "srun" and not self.command
        return self.placement.processes_per_node if per_rank else 1

    @property
    def launchers(self) -> Placement:
        """The ranks as their launchers see them: each task is a machine of its own to torchrun."""
        return replace(self.placement, nodes=self.placement.nodes * self.tasks_per_node)

    @property
    def gpus(self) -> int:
        """GPUs that it has in all."""
        return self.placement.nodes * self.cluster.gpus_per_node


def render_job(job: Job) -> str:
    """Return the batch script.

    Raises:
        ClusterError: For a value that no script can hold safely.
    """
    cluster = job.cluster
    head = cluster.head or HeadAddress.model_construct()
    return fill(
        "job.sbatch.j2",
        version=__version__,
        directives=_directives(job),
        array_root=str(job.folder) if job.array else None,
        run=str(job.folder),
        script=str(job.folder / JOB_SCRIPT),
        nodes=job.placement.nodes,
        tasks_per_node=job.tasks_per_node,
        gpus=job.gpus,
        limit=job.array.limit if job.array else None,
        umask="007" if cluster.sharing == GROUP else "077",
        requeue=cluster.requeue.allowed,
        usual="requeue" if cluster.requeue.allowed else "submit",
        kept_variables=kept_variables(option for option, _ in _directives(job)),
        singleton=job.singleton,
        static_exclude=static_exclude(cluster.sbatch),
        head_suffix=head.suffix,
        head_interface=head.interface,
        srun_options=[
            *srun_options(cluster.container, _mounts(job)),
            *option_words(_options_of_tasks(job)),
        ],
    )


def render_node(job: Job, run_dir: Path, *, model: str | None = None) -> str:
    """Return the script that each node runs for one run.

    Args:
        job: The job.
        run_dir: The run; an element's own in an array.
        model: Folder of the model, where it can be copied to the nodes' own disks.

    Raises:
        ClusterError: For a value that no script can hold safely.
    """
    cluster, placement = job.cluster, job.placement
    environment = {
        **launch_environment(job.launchers, {"OMP_NUM_THREADS": ""}),  # each node counts its CPUs
        **(OFFLINE if cluster.offline else {}),
        **({SHARING: GROUP} if cluster.sharing == GROUP else {}),
        **({} if cluster.numa_binding is None else {NUMA_BINDING: cluster.numa_binding}),
        # What is installed in a home must not hide what is in the image.
        **({} if cluster.container is None else {"PYTHONNOUSERSITE": "1"}),
        **{name: str(value) for name, value in cluster.environment.items()},
    }
    interpreter = interpreter_of(cluster)
    changed = [word for name in job.allow_changed for word in ("--allow-changed", name)]
    launcher = job.command or workers(
        cluster,
        job.launchers,
        "train.py",
        [str(run_dir / "recipe.yaml"), *changed],
        max_restarts=job.max_restarts,
        node="$SLURM_PROCID" if job.tasks_per_node > 1 else MEETING.node,
    )
    stage = None
    if cluster.stage is not None and model is not None:
        stage = ["-m", "peft_dist.slurm.stage_model", "--json", model, cluster.stage.folder]
    setup, inside = cluster.setup, "" if cluster.container is None else cluster.container.setup
    if cluster.container is not None and cluster.container.is_started_by_srun:
        setup, inside = f"{setup.rstrip()}\n{inside}".strip("\n"), ""
    return fill(
        "node.sh.j2",
        version=__version__,
        setup=setup,
        inside=inside,
        environment=sorted(environment.items()),
        import_paths=":".join(job.import_paths),
        processes_per_node=placement.processes_per_node,
        several_nodes=job.launchers.nodes > 1,
        node_variable="SLURM_PROCID" if job.tasks_per_node > 1 else "SLURM_NODEID",
        python=[
            *node_command(cluster.container, _mounts(job), on_gpu=placement.on_gpu),
            interpreter,
        ],
        interpreter=cluster.interpreter if interpreter == "$interpreter" else None,
        find_share=FIND_SHARE,
        stage=stage,
        supervisor=_supervisor(job, run_dir),
        launcher=launcher,
    )


def interpreter_of(cluster: Cluster) -> str:
    """Return the interpreter as `node.sh` names it; only a node knows where its own disk is."""
    return "$interpreter" if cluster.interpreter.startswith("$") else cluster.interpreter


def workers(
    cluster: Cluster,
    placement: Placement,
    script: str,
    arguments: Sequence[str],
    *,
    max_restarts: int = 0,
    node: str = MEETING.node,
) -> list[str]:
    """Return the command by which a node starts its share of the workers.

    Args:
        cluster: Where.
        placement: How many there are.
        script: `train.py` or `score.py`.
        arguments: What every worker gets.
        max_restarts: How often all are started again in place.
        node: Which launcher of all this is.
    """
    return worker_command(
        placement,
        script,
        arguments,
        python=interpreter_of(cluster),
        root=SHARE,
        max_restarts=max_restarts,
        meeting=replace(MEETING, node=node) if placement.nodes > 1 else None,
    )


def _directives(job: Job) -> list[tuple[str, str | None]]:
    """Return the options of sbatch, in the order a reader looks for them."""
    cluster, nodes = job.cluster, job.placement.nodes
    cpus = cluster.cpus_of_a_node
    given: list[tuple[str, Any]] = [
        ("job-name", job.name),
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("reservation", cluster.reservation),
        ("constraint", cluster.constraint),
        ("nodes", nodes),
        ("ntasks-per-node", job.tasks_per_node),
        ("cpus-per-task", cpus and max(1, cpus // job.tasks_per_node)),
        ("gres", cluster.gres_request),
        ("mem", cluster.memory_per_node),
        ("time", None if job.time_s is None else duration_text(job.time_s)),
        ("signal", f"USR1@{job.lead_s}"),
        ("array", None if job.array is None else _array(job.array)),
        ("dependency", "singleton" if job.singleton else None),
        ("open-mode", "append"),
        ("output", _log_path(job)),
        # A list of names would have Slurm run the user's profile on the node as well, and hold the
        # job where that is slow: "user env retrieval failed requeued held".
        ("export", "ALL"),
    ]
    flags = ["requeue" if cluster.requeue.allowed else "no-requeue"]
    if cluster.exclusive:
        flags.append("exclusive")
    return [
        *((option, str(value)) for option, value in given if value is not None),
        *((flag, None) for flag in flags),
        *option_words(cluster.sbatch),
    ]


def _options_of_tasks(job: Job) -> dict[str, str | int | bool]:
    """Return the cluster file's options of srun, as far as they fit the tasks of this job."""
    given = job.cluster.srun
    if job.cluster.launcher != "srun" or not job.command:
        return dict(given)
    # They bind ranks; the one task of a command's node needs all that the node has.
    return {name: given[name] for name in given if not name.endswith(("-bind", "-per-task"))}


def _array(array: Array) -> str:
    limit = "" if array.limit is None else f"%{array.limit}"
    return f"0-{array.elements - 1}{limit}"


def _log_path(job: Job) -> str:
    folder = str(job.folder / "logs").replace("%", "%%")
    return f"{folder}/job-%A_%a.log" if job.array else f"{folder}/job-%j.log"


def _mounts(job: Job) -> list[str]:
    if job.cluster.container is None:
        return []
    own = {"--run-dir": str(job.folder), "secrets_file": job.cluster.secrets_file}
    return mounts(job.cluster.container, own)


def _supervisor(job: Job, run_dir: Path) -> list[str]:
    cluster = job.cluster
    per_rank = job.tasks_per_node > 1
    kind = "command_" if job.command else "rank_" if per_rank else ""
    words = ["-m", f"peft_dist.slurm.{kind}supervisor", "--run-dir", str(run_dir)]
    words += ["--max-starts", str(cluster.requeue.max_starts)]
    limit = cluster.requeue.max_starts_without_progress
    words += ["--max-starts-without-progress", str(limit)]
    if cluster.secrets_file is not None:
        words += ["--secrets", cluster.secrets_file]
    if per_rank:
        words += ["--per-rank"]
    if job.frozen:
        words += ["--frozen"]
    interface = cluster.interface or ("auto" if cluster.head is not None else None)
    if interface is not None:
        words += [f"--interface={interface}"]
    if cluster.preflight.enabled and not job.command:
        bound = per_rank and not BINDING.isdisjoint(cluster.srun)
        words += ["--devices", "1" if bound else str(cluster.gpus_per_node)]
        words += ["--preflight-timeout-s", f"{cluster.preflight.timeout_s:.12g}"]
        words += ["--arrival-s", f"{cluster.preflight.arrival_s:.12g}"]
        words += ["--min-free-gb", f"{cluster.preflight.min_free_gb:.12g}"]
        words += ["--max-clock-offset-s", f"{cluster.preflight.max_clock_offset_s:.12g}"]
    else:
        words += ["--no-preflight"]
    return words


def scripts(job: Job, runs: Sequence[tuple[Path, str | None]]) -> dict[Path, str]:
    """Return every file of a job with its text: one batch script, and a node script per run.

    Args:
        job: The job.
        runs: The folder of each run, with that of its model.
    """
    texts = {job.folder / JOB_SCRIPT: render_job(job)}
    for folder, model in runs:
        texts[folder / NODE_SCRIPT] = render_node(job, folder, model=model)
    return texts
