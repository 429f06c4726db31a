"""Submit a run, or the unfinished runs of an array, once more as they were submitted before."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RunDirError
from peft_dist.config.cluster import load_cluster
from peft_dist.run import job_events
from peft_dist.run.directory import RunDir
from peft_dist.run.paths import ARRAY_FILE
from peft_dist.run.sweep import array_elements, array_limit
from peft_dist.slurm.submit import Request


def again(
    folder: Path,
    overrides: Sequence[str],
    *,
    nodes: int | None = None,
    time_limit: str | None = None,
    cluster: str | None = None,
    allow_changed: Sequence[str] = (),
) -> Request:
    """Return the request that submits a run, or an array's unfinished runs, once more.

    Args:
        folder: What was submitted.
        overrides: Settings that replace those of the run's own recipe.
        nodes: Another number of nodes.
        time_limit: Another time limit.
        cluster: Another cluster file.
        allow_changed: Settings that may differ from those a run was trained with.

    Raises:
        RunDirError: Where the folder holds no run, or was never submitted.
    """
    elements = array_elements(folder)
    first = RunDir.open(folder / elements[0]["run_dir"] if elements else folder).path
    before = [event for event in job_events.events(first) if "nodes" in event and "by" in event]
    own_cluster = first / "slurm" / "cluster.yaml"
    if cluster is None and not own_cluster.is_file():
        raise RunDirError(
            "was not submitted to Slurm", where=str(folder), remedy="name a cluster with --cluster"
        )
    last: Mapping[str, Any] = before[-1] if before else {}
    # Another cluster has limits of its own.
    return Request(
        recipe=str(first / "recipe.yaml"),
        overrides=overrides,
        folder=folder,
        cluster=load_cluster(cluster or own_cluster),
        nodes=nodes or int(last.get("nodes", 1)),
        time=time_limit or (None if cluster else last.get("time_limit")),
        limit=array_limit(folder) if elements else None,
        singleton=bool(last.get("singleton", False)),
        frozen=bool(last.get("frozen", False)),
        elements=elements,
        allow_changed=allow_changed,
    )


def was_submitted(folder: Path) -> bool:
    """Whether a folder holds a run, or an array of runs, that was submitted to Slurm."""
    return (folder / ARRAY_FILE).is_file() or (folder / "slurm" / "cluster.yaml").is_file()
