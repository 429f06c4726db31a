"""Refuse what cannot run on a cluster, before anything is made: limits, paths, files, batches.

Asks Slurm nothing, and makes nothing.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_dist.common.durations import duration_s, duration_text
from peft_dist.common.errors import ClusterError, LaunchError, RecipeError
from peft_dist.config import Recipe
from peft_dist.config.batch_shape import batch_shape
from peft_dist.config.cluster import Cluster
from peft_dist.config.cluster_sites import PLACEHOLDER
from peft_dist.run.directory import RunDir
from peft_dist.slurm.container import node_command
from peft_dist.slurm.job_scripts import Job
from peft_dist.slurm.secrets import read_secrets

IMPORTS = "import peft_dist, torch, transformers, accelerate, peft"
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run")
"""Folders that each node has for itself, nearly everywhere."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made whatever else is so.

    Raises:
        RunDirError: Naming it.
    """
    RunDir(folder).require_writable()


def check_limits(job: Job, *, time_from: str) -> None:
    """Refuse more nodes or time than the cluster file allows, and a time too short to train in.

    Args:
        job: What would be submitted.
        time_from: Where its time limit was given.

    Raises:
        LaunchError: Naming the limit.
    """
    cluster, nodes = job.cluster, job.placement.nodes
    if cluster.max_nodes is not None and nodes > cluster.max_nodes:
        raise LaunchError(
            f"{nodes} is more than the {cluster.max_nodes} that a job may have",
            where="--nodes",
            remedy="ask for fewer, or fix max_nodes in the cluster file",
        )
    if job.time_s is None:
        return
    longest_s = job.time_s if cluster.max_time is None else duration_s(cluster.max_time)
    if job.time_s > longest_s:
        raise LaunchError(
            f"{duration_text(job.time_s)} is more than the {duration_text(longest_s)} "
            "that a job may take",
            where=time_from,
            remedy="ask for less: the run goes on by itself in the next job",
        )
    if job.time_s <= 2 * job.lead_s:
        lead = duration_text(job.lead_s)
        raise LaunchError(
            f"{duration_text(job.time_s)} leaves no time to train: saving begins {lead} before "
            "the end",
            where=time_from,
            remedy=f"ask for more than {duration_text(2 * job.lead_s)}"
            + (
                ", or lower signal_lead_s in the cluster file"
                if job.lead_s == cluster.signal_lead_s
                else ": that is what a step and a save of this run have taken"
            ),
        )


def check_processes(cluster: Cluster, nodes: int, recipe: Recipe) -> None:
    """Refuse more processes than the nodes have GPUs.

    Raises:
        LaunchError: Naming both numbers.
    """
    gpus, processes = nodes * cluster.gpus_per_node, recipe.parallel.processes or 0
    if 0 < gpus < processes:
        raise LaunchError(
            f"{processes} processes for {gpus} GPUs on {nodes} node{'s' * (nodes > 1)}",
            where="parallel.processes",
            remedy=f"set it to {gpus}, or ask for more nodes with --nodes",
        )


def check_paths(cluster: Cluster, nodes: int, folder: Path, recipe: Recipe) -> list[str]:
    """Refuse paths that the nodes surely do not share; return what is only worth a word.

    Raises:
        LaunchError: Naming the path and what gave it.
    """
    paths = {
        "--run-dir": str(folder),
        "model.name": local_model(recipe),
        "method.start_from": recipe.method.start_from,
        **_row_paths(recipe),
    }
    return check_shared(cluster, nodes, paths)


def check_shared(cluster: Cluster, nodes: int, paths: Mapping[str, str | None]) -> list[str]:
    """Refuse paths that the nodes surely do not share; return what is only worth a word.

    Args:
        cluster: Where the nodes are.
        nodes: How many the job has.
        paths: By what gave them; those that are not absolute are left out.

    Raises:
        LaunchError: Naming the path and what gave it.
    """
    not_shared: dict[str, list[str]] = {}
    for field, text in paths.items():
        if text is None or not text.startswith("/"):  # a hub name
            continue
        path = Path(os.path.realpath(text))
        own = next((root for root in NODE_LOCAL if path.is_relative_to(root)), None)
        if cluster.shared:
            if not any(path.is_relative_to(os.path.realpath(root)) for root in cluster.shared):
                raise LaunchError(
                    f"{text} is in none of {', '.join(cluster.shared)}",
                    where=field,
                    remedy="put it in one of them, or fix shared: in the cluster file",
                )
        elif own is not None and nodes > 1:
            raise LaunchError(
                f"{text} is on a disk that each node has for itself",
                where=field,
                remedy="put it elsewhere, or name it under shared: in the cluster file",
            )
        elif own is not None and cluster.max_nodes != 1:
            not_shared.setdefault(own, []).append(field)
    return [
        f"{', '.join(fields)}: in {own}, which the node of the job must share with this machine"
        for own, fields in not_shared.items()
    ]


def _row_paths(recipe: Recipe) -> dict[str, str]:
    """Return the paths, or hub names, of all rows and chat templates by what gave them."""
    data = recipe.data
    named = {"data.train": data.sources("train")}
    if data.held_out is None:
        named["data.eval"] = data.sources("eval")
    return {
        field if len(sources) == 1 else f"{field}[{at}]": source.path
        for field, sources in named.items()
        for at, source in enumerate(sources)
    } | {f"data.template {path}": path for path in data.templates}


def check_cluster_files(cluster: Cluster) -> None:
    """Refuse a secrets file that cannot be used, and set-up lines that bash cannot read.

    Raises:
        ClusterError: Naming the fault.
    """
    if cluster.secrets_file is not None:
        read_secrets(Path(cluster.secrets_file))
    _check_lines("setup", cluster.setup)
    if cluster.container is not None:
        _check_lines("container.setup", cluster.container.setup)


def check_account(cluster: Cluster) -> None:
    """Refuse the account that shipped cluster files name.

    Raises:
        ClusterError: With how to name another one.
    """
    if cluster.account is not None and PLACEHOLDER in cluster.account:
        raise ClusterError(
            f"{cluster.account} stands for yours",
            where="account",
            remedy="give --sbatch account=NAME, or set it in a copy: `peft-dist cluster show`",
        )


def _check_lines(field: str, lines: str) -> None:
    if not lines:
        return
    checked = subprocess.run(
        ["bash", "-n"],
        input=lines.rstrip("\n") + "\n",
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if checked.returncode or checked.stderr:  # of text without an end bash only warns
        message = (checked.stderr.splitlines() or ["cannot be read"])[0]
        raise ClusterError(
            message.removeprefix("bash: "), where=field, remedy="fix it in the cluster file"
        )


def check_cpus(cluster: Cluster) -> list[str]:
    """Return a word where Slurm would give a node's GPUs one CPU, most likely."""
    if not cluster.gpus_per_node or cluster.cpus_of_a_node is not None or cluster.exclusive:
        return []
    return [
        "cpus_per_gpu: not given in the cluster file; Slurm may give all GPUs of a node one CPU"
    ]


def try_set_up(cluster: Cluster) -> None:
    """Run on this machine what each node runs before training: the set-up lines and the imports.

    Raises:
        ClusterError: With the last line of what fails.
    """
    container = cluster.container
    if container is not None and container.is_started_by_srun:
        raise ClusterError(
            "needs an image that only nodes can run", where="--try", remedy="submit without it"
        )
    if cluster.interpreter.startswith("$"):
        raise ClusterError(
            "needs a disk that only nodes have", where="--try", remedy="submit without it"
        )
    inside = "" if container is None else f'set -eo pipefail\n{container.setup}\nexec "$@"'
    words = [*node_command(container, [], on_gpu=False), cluster.interpreter, "-c", IMPORTS]
    line = shlex.join([inside if word == "$inside" else word for word in words])
    tried = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", f"{cluster.setup}\nset -e\nexec {line}\n"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if tried.returncode:
        output = (tried.stderr.strip() or tried.stdout.strip()).splitlines()
        last = output[-1] if output else f"exit code {tried.returncode}"
        raise ClusterError(
            f"fails on this machine: {last}",
            where="setup or python",
            remedy="fix it in the cluster file",
        )


def check_batch(recipe: Recipe, processes: int) -> list[str]:
    """Refuse steps with fewer rows than processes; return what is only worth a word.

    Raises:
        RecipeError: Naming both numbers.
    """
    shape = batch_shape(recipe, processes)
    if shape is None:
        return []
    if shape.rows_per_step < processes:
        raise RecipeError(
            f"{shape.rows_per_step} rows for {processes} processes",
            where="train.global_batch_size",
            remedy=f"set it to {processes} or more, or take fewer nodes",
        )
    if shape.rows_per_step % processes:
        return [
            f"train.global_batch_size: {shape.rows_per_step} rows are not shared out evenly "
            f"over {processes} processes; some wait for others in every step"
        ]
    return []


def check_alike(recipes: Sequence[Recipe]) -> None:
    """Refuse runs of one array that do not start in the same way.

    Raises:
        RecipeError: Where their `parallel` differs.
    """
    if any(recipe.parallel != recipes[0].parallel for recipe in recipes):
        raise RecipeError(
            "the runs of one array differ in parallel",
            where="--array",
            remedy="submit them one by one",
        )


def time_limit(cluster: Cluster, given: str | None) -> tuple[str | None, str]:
    """Return the time limit of a job, and where it was given."""
    if given is not None:
        return given, "--time"
    if cluster.default_time is not None:
        return cluster.default_time, "default_time"
    return cluster.max_time, "max_time"


def job_name(name: str) -> str:
    """Return a name that is safe in a path, in a table and in a script."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".-")[:64] or "run"


def local_model(recipe: Recipe) -> str | None:
    """Return the folder of a recipe's model, or None for one of a hub."""
    return recipe.model.name if Path(recipe.model.name).is_absolute() else None
