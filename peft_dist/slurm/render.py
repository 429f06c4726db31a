"""Write the two scripts of a job: `job.sbatch` for its first node, `node.sh` for each.

Pure: the same job gives the same bytes. Nothing reaches a script but through a filter that quotes
it or refuses it; the set-up lines of the cluster file alone are shell text.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from peft_dist import __version__, resources
from peft_dist.config.cluster import Cluster, duration_text
from peft_dist.errors import ClusterError
from peft_dist.launch.command import Meeting, launch_environment, worker_command
from peft_dist.launch.placement import Placement

JOB_SCRIPT = "job.sbatch"
NODE_SCRIPT = "node.sh"
PASSED_ON = (
    "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN", "HOME", "LANG", "LC_ALL", "LOGNAME", "MODULEPATH",
    "PATH", "PEFT_DIST_AFTER", "PEFT_DIST_CACHE", "SHELL", "USER", "WANDB_API_KEY",
    "WANDB_BASE_URL",
)  # fmt: skip
"""What a job takes along from the shell that submits it; the cluster file names everything else."""
MEETING = Meeting(
    node="$SLURM_NODEID", host="$PEFT_DIST_HEAD", port="$PEFT_DIST_PORT", settings="$rendezvous"
)
VARIABLES = {MEETING.node, MEETING.host, MEETING.port, MEETING.settings}
"""Arguments that each node fills in; every other one is text."""


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
    """Seconds before the time limit at which the ranks are told to save."""
    max_restarts: int
    array: Array | None = None
    singleton: bool = False
    """Whether to wait until no other job of this name runs."""


def render_job(job: Job) -> str:
    """Return the batch script.

    Raises:
        ClusterError: For a value that no script can hold safely.
    """
    container = job.cluster.container
    srun_options = []
    if container is not None and container.runtime == "pyxis":
        mounts = [_mount(folder) for folder in (*container.mounts, str(job.folder))]
        srun_options = [
            ("container-image", container.image),
            ("container-mounts", ",".join(mounts)),
        ]
    return _render(
        "job.sbatch.j2",
        directives=_directives(job),
        array_root=str(job.folder) if job.array else None,
        run=str(job.folder),
        script=str(job.folder / JOB_SCRIPT),
        nodes=job.placement.nodes,
        requeue=job.cluster.requeue.allowed,
        srun_options=srun_options,
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
        **launch_environment(placement, {"OMP_NUM_THREADS": ""}),
        **_interfaces(cluster),
        **cluster.environment,
    }
    launcher = worker_command(
        placement,
        "train.py",
        [str(run_dir / "recipe.yaml")],
        python=cluster.interpreter,
        max_restarts=job.max_restarts,
        meeting=MEETING if placement.nodes > 1 else None,
    )
    stage = None
    if cluster.stage is not None and model is not None:
        stage = [cluster.interpreter, "-m", "peft_dist.slurm.stage", model, cluster.stage.folder]
    return _render(
        "node.sh.j2",
        setup=cluster.setup,
        environment=sorted(environment.items()),
        processes_per_node=placement.processes_per_node,
        several_nodes=placement.nodes > 1,
        stage=stage,
        supervisor=[*_container(job), *_supervisor(job, run_dir)],
        launcher=launcher,
    )


def _directives(job: Job) -> list[tuple[str, str | None]]:
    """Return the options of sbatch, in the order a reader looks for them."""
    cluster, nodes = job.cluster, job.placement.nodes
    given: list[tuple[str, Any]] = [
        ("job-name", job.name),
        ("partition", cluster.partition),
        ("account", cluster.account),
        ("qos", cluster.qos),
        ("reservation", cluster.reservation),
        ("constraint", cluster.constraint),
        ("nodes", nodes),
        ("ntasks-per-node", 1),
        ("cpus-per-task", cluster.cpus_of_a_node),
        ("gres", cluster.gres_request),
        ("mem", cluster.memory_per_node),
        ("time", None if job.time_s is None else duration_text(job.time_s)),
        ("signal", f"USR1@{job.lead_s}"),
        ("array", None if job.array is None else _array(job.array)),
        ("dependency", "singleton" if job.singleton else None),
        ("open-mode", "append"),
        ("output", _log_path(job)),
        ("export", ",".join(PASSED_ON)),
    ]
    flags = ["requeue" if cluster.requeue.allowed else "no-requeue"]
    if cluster.exclusive:
        flags.append("exclusive")
    return [
        *((option, str(value)) for option, value in given if value is not None),
        *((flag, None) for flag in flags),
    ]


def _array(array: Array) -> str:
    limit = "" if array.limit is None else f"%{array.limit}"
    return f"0-{array.elements - 1}{limit}"


def _log_path(job: Job) -> str:
    folder = str(job.folder / "logs").replace("%", "%%")
    return f"{folder}/job-%A_%a.log" if job.array else f"{folder}/job-%j.log"


def _interfaces(cluster: Cluster) -> dict[str, str]:
    if cluster.interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": cluster.interface, "NCCL_SOCKET_IFNAME": cluster.interface}


def _container(job: Job) -> list[str]:
    container = job.cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    mounts = [word for folder in container.mounts for word in ("--bind", folder)]
    gpus = ["--nv"] if job.placement.on_gpu else []
    return ["apptainer", "exec", *gpus, *mounts, "--bind", str(job.folder), container.image]


def _supervisor(job: Job, run_dir: Path) -> list[str]:
    cluster = job.cluster
    words = [cluster.interpreter, "-m", "peft_dist.slurm.node", "--run-dir", str(run_dir)]
    words += ["--max-starts", str(cluster.requeue.max_starts)]
    limit = cluster.requeue.max_starts_without_progress
    words += ["--max-starts-without-progress", str(limit)]
    if cluster.secrets_file is not None:
        words += ["--secrets", cluster.secrets_file]
    if cluster.preflight.enabled:
        words += ["--devices", str(cluster.gpus_per_node)]
        words += ["--preflight-timeout-s", f"{cluster.preflight.timeout_s:g}"]
        words += ["--min-free-gb", f"{cluster.preflight.min_free_gb:g}"]
        words += ["--max-clock-offset-s", f"{cluster.preflight.max_clock_offset_s:g}"]
    else:
        words += ["--no-preflight"]
    return words


def _mount(folder: str) -> str:
    return folder if ":" in folder else f"{folder}:{folder}"


class _Safe(str):
    """Text that has passed a filter."""

    __slots__ = ()


def _render(template: str, **values: Any) -> str:
    templates = resources.root() / "slurm" / "templates"
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        autoescape=False,  # no HTML; `_only_safe` sees that everything is quoted for the shell
        finalize=_only_safe,
        trim_blocks=True,
        lstrip_blocks=True,
        comment_start_string="<#",  # for {# is bash's
        comment_end_string="#>",
        keep_trailing_newline=True,
    )
    environment.filters.update(
        command=_command,
        comment=lambda text: _Safe(_printable(text)),
        directive=_directive,
        lines=lambda text: _Safe(text.strip("\n")),
        number=lambda number: _Safe(int(number)),
        sh=_shell,
        word=_word,
    )
    return environment.get_template(template).render(version=__version__, **values)


def _only_safe(value: Any) -> Any:
    # What stands in a template itself comes as plain text too, and is no output of an expression.
    assert isinstance(value, _Safe), f"{value!r} is put into a script unquoted"
    return value


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ClusterError(
            f"{text!r} holds a control character",
            where="job script",
            remedy="choose names without it",
        )
    return text


def _shell(text: str) -> _Safe:
    return _Safe(shlex.quote(_printable(text)))


def _command(words: Sequence[str]) -> _Safe:
    """Quote an argv, a line for each option."""
    quoted = [f'"{word}"' if word in VARIABLES else _shell(word) for word in words]
    starts_line = [word.startswith("--") or word.endswith(".py") for word in words]
    return _Safe(
        "".join(
            (" \\\n  " if starts else " ") + text
            for text, starts in zip(quoted, starts_line, strict=True)
        ).lstrip()
    )


def _word(text: str) -> _Safe:
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", text), text
    return _Safe(text)


def _directive(text: str) -> _Safe:
    """Quote a value as sbatch reads it: double quotes, in which a backslash escapes."""
    if "\\" in _printable(text):  # Slurm takes one in a path as "expand no %"
        raise ClusterError(
            f"{text!r} holds a backslash", where="job script", remedy="choose a name without it"
        )
    if re.fullmatch(r"[A-Za-z0-9_.,:@%/+=-]+", text):
        return _Safe(text)
    return _Safe('"' + text.replace('"', '\\"') + '"')


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
