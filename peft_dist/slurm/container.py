"""The command line that runs something in an image, or the options by which srun does."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_dist.common.errors import ClusterError
from peft_dist.config.cluster_container import Container

INSIDE = ["bash", "-c", "$inside", "bash"]
"""Runs what follows after the set-up lines inside; each node fills in the lines."""


def node_command(container: Container | None, mounts: Sequence[str], *, on_gpu: bool) -> list[str]:
    """Return what a node puts before a command that runs in the image.

    Args:
        container: The image.
        mounts: What it sees of the node, each `OUTSIDE:INSIDE` or `OUTSIDE:INSIDE:MODE`.
        on_gpu: Whether it needs GPUs.
    """
    if container is None or container.is_started_by_srun:
        return []
    gpu = container.gpu or ("nv" if on_gpu else "none")
    if container.runtime == "shifter":
        flags = ["--module=gpu"] if gpu == "nv" else []
        volumes = [f"--volume={';'.join(mounts)}"] if mounts else []
        command = ["shifter", f"--image={container.image}", *flags, *volumes]
    else:
        flags = [] if gpu == "none" else [f"--{gpu}"]
        binds = [word for mount in mounts for word in ("--bind", mount)]
        start = container.start or "exec"
        command = [container.runtime, start, *flags, *binds, container.image]
    return [*command, *(INSIDE if container.setup else [])]


def srun_options(
    container: Container | None, mounts: Sequence[str]
) -> list[tuple[str, str | None]]:
    """Return the options by which srun starts a node's script in the image."""
    if container is None or not container.is_started_by_srun:
        return []
    if container.uses_edf:
        return [("environment", container.image)]
    return [("container-image", container.image), ("container-mounts", ",".join(mounts))]


def mounts(container: Container, own: Mapping[str, str | None]) -> list[str]:
    """Return what the image sees of the node, as `OUTSIDE:INSIDE` or `OUTSIDE:INSIDE:MODE`.

    Args:
        container: The image.
        own: What it must see in any case, by the setting that named it.

    Raises:
        ClusterError: For a path that no mount can name, or that an EDF does not mount.
    """
    found = []
    for mount in container.mounts:
        folder, *rest = mount.split(":")
        inside = [] if rest and rest[0].startswith("/") else [folder]
        found.append(":".join([folder, *inside, *rest]))
    for where, path in own.items():
        if path is None:
            continue
        if container.uses_edf:
            if container.mounts and not any(
                Path(path).is_relative_to(folder) for folder in container.folders_inside
            ):
                raise ClusterError(
                    f"{path!r} is in none of container.mounts",
                    where=where,
                    remedy="have the environment definition file mount it, and name it there",
                )
            continue
        if re.search("[:,]", path):
            raise ClusterError(
                f"{path!r} cannot be seen in a container",
                where=where,
                remedy="choose a name without : and ,",
            )
        found.append(f"{path}:{path}")
    split = [mount for mount in found if ";" in mount]
    if container.runtime == "shifter" and split:
        raise ClusterError(
            f"shifter would take {split[0]!r} for several mounts",
            where="container.mounts or --run-dir",
            remedy="choose a name without ;",
        )
    return found
