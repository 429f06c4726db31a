"""The cluster file: where runs are submitted to, and what a job may ask for there.

Every value ends up in a script; `cluster_values.py` says what it may be, and `setup` alone is
shell text. The docstring under a field is its text in the JSON Schema.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from peft_dist.common.durations import duration_s
from peft_dist.common.errors import ClusterError, RecipeError
from peft_dist.config.cluster_container import Container
from peft_dist.config.cluster_sites import find_cluster
from peft_dist.config.cluster_values import (
    AbsolutePath,
    Constraint,
    Duration,
    Gres,
    HostSuffix,
    Interface,
    InterfaceName,
    Memory,
    Name,
    NodeFolder,
    NodeProgram,
    SetUp,
    Variables,
)
from peft_dist.config.explain import describe_failure, refuse_booleans_as_numbers
from peft_dist.config.load import read_mapping, render_yaml
from peft_dist.config.section import NonNegativeFloat, PositiveFloat, Section
from peft_dist.config.slurm_options import SbatchOptions, SrunOptions, with_options


class Requeue(Section):
    """How a run comes back."""

    allowed: bool = True
    """Whether the site lets jobs be requeued. false: each job queues its successor instead."""
    max_starts: PositiveInt = 100
    """Starts of one submission before a person has to look."""
    max_starts_without_progress: PositiveInt = 5
    """Starts in a row that may end at the same checkpoint."""


class HeadAddress(Section):
    """By which address the first node is reached, where its name leads to a slow network."""

    suffix: HostSuffix | None = None
    """What the first node's name gets: i makes jwb0001i of jwb0001."""
    interface: InterfaceName | None = None
    """Or the interface of the first node whose address is taken, such as hsn0."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.suffix is None) == (self.interface is None):
            raise ValueError("takes either suffix or interface; give one of them")
        return self


class Stage(Section):
    """A copy of the model on each node's own disk."""

    folder: NodeFolder
    """Folder on that disk, such as /local/$USER or $SLURM_TMPDIR, expanded on the node. Copies stay
    there for later jobs of yours, and go when no job has used them for two weeks."""


class Links(Section):
    """Speed of the network in collectives; only plans use it."""

    inside_gb_s: PositiveFloat | None = None
    """What a GPU receives from others of its node, in GB/s. Default: about three quarters of what
    its kind of GPU has."""
    between_gb_s: PositiveFloat | None = None
    """What a node receives from others, in GB/s, over the number of its GPUs. Default: 45, as with
    one 400 Gb/s adapter per GPU."""


class Preflight(Section):
    """Checks of every node before training."""

    enabled: bool = True
    """Whether to check."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that all checks together may take, once all nodes are there."""
    arrival_s: PositiveFloat = 1800.0
    """Seconds that the nodes may take for set-up, image and staging until the last one is ready; a
    node that takes longer is not to blame, and the run starts again."""
    min_free_gb: NonNegativeFloat = 1.0
    """Gigabytes that must be free where the run directory is."""
    max_clock_offset_s: PositiveFloat = 60.0
    """Seconds that a node's clock may differ from the first node's."""


class Cluster(Section):
    """One Slurm cluster, or one partition of it."""

    partition: Name | None = None
    """Partition; several with commas. Off: Slurm's default."""
    account: Name | None = None
    """Account that is charged."""
    qos: Name | None = None
    """Quality of service."""
    reservation: Name | None = None
    """Reservation to run in."""
    constraint: Constraint | None = None
    """Features that nodes must have."""
    max_nodes: PositiveInt | None = None
    """Most nodes of one job."""
    gpus_per_node: NonNegativeInt = 0
    """GPUs of a node; 0 trains on CPUs."""
    gpu: Name | None = None
    """Kind of GPU, such as h100-80gb or a100-40gb, by which `plan` knows memory and speed. Off:
    nothing is refused for want of memory."""
    links: Links = Links()
    """Speed of the network, for `plan`."""
    gres: Gres | None = "gpu:{gpus}"
    """How GPUs are asked for, such as gpu:a100:{gpus}. null where a node comes with its GPUs."""
    processes_per_node: PositiveInt | None = None
    """Processes of a node. Default: one per GPU, else one."""
    launcher: Literal["torchrun", "srun"] = "torchrun"
    """Who starts the ranks of a node. torchrun: one task of Slurm does. srun: Slurm does, a task
    for each, and binds them as `srun:` says (cpu-bind, gpu-bind, mem-bind)."""
    numa_binding: Literal["node", "exclusive"] | None = None
    """With torchrun, the CPUs that each process keeps to, as `torchrun --numa-binding`: node: those
    of its GPU's NUMA node; exclusive: whole cores of these that no other process has. On CPUs, the
    processes are shared out over the NUMA nodes. Off: all CPUs of the job."""
    cpus_per_gpu: PositiveInt | None = None
    """CPUs of a node to ask for, per GPU."""
    cpus_per_node: PositiveInt | None = None
    """CPUs of a node to ask for, instead."""
    memory_per_node: Memory | None = None
    """Memory of a node to ask for, such as 480G; "0": all of it. Off: Slurm's default."""
    exclusive: bool = False
    """Whether to share no node with other jobs."""
    max_time: Duration | None = None
    """Longest a job may take, HH:MM:SS or D-HH:MM:SS."""
    default_time: Duration | None = None
    """Time limit where none is given. Default: max_time."""
    requeue: Requeue = Requeue()
    """How a run comes back."""
    signal_lead_s: PositiveInt = 120
    """Least seconds before the time limit at which a run saves; raised by what saving takes."""
    interface: Interface | None = None
    """Network interfaces, as NCCL reads them: names or beginnings of names, or ^ and those to
    leave out. gloo, which takes names alone, gets those of the node that match. auto: the one by
    which a node reaches the first node. Default: auto where head is given, else the libraries'."""
    head: HeadAddress | None = None
    """Another address of the first node than its name."""
    environment: Variables = Field(default_factory=dict)
    """Variables for every process; no secrets."""
    secrets_file: AbsolutePath | None = None
    """File of mode 0600 with NAME=value lines such as WANDB_API_KEY, read on each node. Variables
    of the shell that submits reach the job too, but some sites keep those in their accounting."""
    sharing: Literal["private", "group"] = "private"
    """Who may read, resume and report on runs: you alone, or the group of the folder that they are
    made in as well. Secrets stay yours."""
    setup: SetUp = ""
    """Shell lines that run on each node before Python: modules, conda, a virtual environment."""
    python: NodeProgram | None = None
    """Interpreter on the nodes; one that `setup` makes there may begin with $SLURM_TMPDIR/.
    Default: the one that submits; in a container python3."""
    container: Container | None = None
    """Image that everything runs in."""
    offline: bool = False
    """Whether nodes reach no network: submit refuses what they could not fetch, and
    `peft-dist fetch` brings it. Hugging Face's libraries are told to ask nobody."""
    shared: tuple[AbsolutePath, ...] = ()
    """Folders that all nodes share; recipes and runs must lie in one of them. Empty: not known."""
    stage: Stage | None = None
    """Copy the model to each node's own disk first."""
    preflight: Preflight = Preflight()
    """Checks of every node before training."""
    sbatch: SbatchOptions = Field(default_factory=dict)
    """Any more options of sbatch, such as {mail-type: END, licenses: scratch}; true for one that
    takes no value."""
    srun: SrunOptions = Field(default_factory=dict)
    """Any more options of the srun that starts all nodes, such as {cpu-bind: cores}."""

    @property
    def cpus_of_a_node(self) -> int | None:
        """CPUs of a node to ask for; None leaves it to Slurm."""
        if self.cpus_per_gpu is not None:
            return self.cpus_per_gpu * self.gpus_per_node
        return self.cpus_per_node

    @property
    def interpreter(self) -> str:
        """The interpreter on the nodes."""
        return self.python or ("python3" if self.container is not None else sys.executable)

    @property
    def gres_request(self) -> str | None:
        """What `--gres` asks for; None where there is nothing to ask for."""
        if self.gres is None or not self.gpus_per_node:
            return None
        return self.gres.format(gpus=self.gpus_per_node)

    @model_validator(mode="after")
    def _one_number_of_cpus(self) -> Self:
        if self.cpus_per_gpu is not None and self.cpus_per_node is not None:
            raise ValueError("cpus_per_gpu and cpus_per_node are both given; keep one of them")
        if self.cpus_per_gpu is not None and self.gpus_per_node == 0:
            raise ValueError("cpus_per_gpu is given without gpus_per_node; set that too")
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> Self:
        if 0 < self.gpus_per_node < (self.processes_per_node or 0):
            raise ValueError(
                f"processes_per_node {self.processes_per_node} is more than gpus_per_node "
                f"{self.gpus_per_node}; lower it"
            )
        return self

    @model_validator(mode="after")
    def _one_binds(self) -> Self:
        if self.numa_binding is not None and self.launcher == "srun":
            raise ValueError(
                "numa_binding is for launcher: torchrun; remove it, and set srun: {cpu-bind: cores}"
            )
        return self

    @model_validator(mode="after")
    def _default_time_is_allowed(self) -> Self:
        times = [text for text in (self.default_time, self.max_time) if text is not None]
        if len(times) == 2 and duration_s(times[0]) > duration_s(times[1]):
            raise ValueError(f"default_time {times[0]} is more than max_time {times[1]}; lower it")
        return self

    @model_validator(mode="after")
    def _staged_models_are_seen_inside(self) -> Self:
        if self.stage is None or self.container is None:
            return self
        if self.container.uses_edf and not self.container.mounts:
            return self  # its own file says
        if not any(map(Path(self.stage.folder).is_relative_to, self.container.folders_inside)):
            raise ValueError(
                f"stage.folder {self.stage.folder} is in none of container.mounts; add it there"
            )
        return self


def load_cluster(path: str | Path, *, options: Sequence[str] = ()) -> Cluster:
    """Read and check a cluster file.

    Args:
        path: The file, or the name of one that is shipped.
        options: Of sbatch besides, each `NAME=VALUE` or `NAME`.

    Raises:
        ClusterError: For anything that cannot be used as written, in one line.
    """
    path = find_cluster(path)
    if Path(path).is_dir():
        raise ClusterError("is a folder", where=str(path), remedy="name a cluster file")
    try:
        raw = read_mapping(path, remedy="start with partition: NAME")
    except RecipeError as error:
        raise ClusterError(str(error)) from error
    if {"model", "data"} <= raw.keys():
        raise ClusterError("is a recipe", where=str(path), remedy="name a cluster file")
    return check_cluster(with_options(raw, options), where=str(path))


def check_cluster(raw: dict[str, Any], *, where: str) -> Cluster:
    """Return the cluster that plain values describe.

    Raises:
        ClusterError: For anything that cannot be used as written, in one line.
    """
    try:
        refuse_booleans_as_numbers(raw, where, Cluster)
        return _without_tildes(Cluster.model_validate(raw))
    except ValidationError as failure:
        raise ClusterError(str(describe_failure(failure, raw, where, Cluster))) from failure
    except RecipeError as error:
        raise ClusterError(str(error)) from error
    except RuntimeError as error:  # of `expanduser`
        raise ClusterError(f"{error}", where=where, remedy="write paths without ~") from error


def render_cluster(cluster: Cluster) -> str:
    """Return a cluster file with every default written out; loading it gives the same cluster.

    The interpreter is written out too: whoever submits again may use another one.
    """
    python = cluster.python if cluster.container is not None else cluster.interpreter
    return render_yaml(cluster.model_dump(mode="python") | {"python": python})


def cluster_schema() -> str:
    """Return the JSON Schema of a cluster file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema | Cluster.model_json_schema(), indent=2)


def _without_tildes(cluster: Cluster) -> Cluster:
    """Return the cluster with `~/` replaced: the nodes' home may be another one's."""

    def full(text: str | None) -> str | None:
        return None if text is None else str(Path(text).expanduser())

    def full_image(text: str) -> str:
        return str(Path(text).expanduser()) if text.startswith("~/") else text

    stage, container = cluster.stage, cluster.container
    return cluster.model_copy(
        update={
            "secrets_file": full(cluster.secrets_file),
            "python": full(cluster.python),
            "shared": tuple(map(full, cluster.shared)),
            "container": container
            and container.model_copy(update={"image": full_image(container.image)}),
            "stage": stage and stage.model_copy(update={"folder": full(stage.folder)}),
        }
    )
