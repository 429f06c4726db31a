"""The cluster file: where runs are submitted to, and what a job may ask for there.

Every value ends up in a script, so each has a pattern of what it may be; `setup` alone is shell
text. The docstring under a field is its text in the JSON Schema.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from peft_dist.config.explain import describe_failure, quote, refuse_booleans_as_numbers
from peft_dist.config.load import read_mapping, render_yaml
from peft_dist.config.section import NonNegativeFloat, PositiveFloat, Section
from peft_dist.errors import ClusterError, RecipeError

SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW", re.IGNORECASE)
"""What the name of a variable that is nobody else's business holds."""
TIME = re.compile(
    r"(?:(?P<days>\d{1,4})-)?(?P<hours>\d{1,4})(?::(?P<minutes>[0-5]?\d):(?P<seconds>[0-5]?\d))?"
)


def _allow(pattern: str, words: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"got {quote(text)}; must be {words}")
        return text

    return AfterValidator(check)


def duration_s(text: str, *, where: str = "") -> int:
    """Return the seconds of `HH:MM:SS`, `D-HH:MM:SS` or `D-HH`.

    Raises:
        ClusterError: For anything else; a bare number would be minutes to Slurm, and seconds to
            many readers.
    """
    found = TIME.fullmatch(text)
    if found is None or (found["days"] is None and found["minutes"] is None):
        raise ClusterError(
            f"{quote(text)} is no time", where=where, remedy="write HH:MM:SS or D-HH:MM:SS"
        )
    days, hours, minutes, seconds = (
        int(found[name] or 0) for name in ("days", "hours", "minutes", "seconds")
    )
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ClusterError(f"{quote(text)} is no time", where=where, remedy="write more than 0")
    return total


def duration_text(seconds: int) -> str:
    """Return seconds as Slurm reads them: HH:MM:SS, or D-HH:MM:SS."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02d}:{minutes:02d}:{rest:02d}"
    return f"{days}-{clock}" if days else clock


def _check_duration(text: str) -> str:
    try:
        duration_s(text)
    except ClusterError as error:
        raise ValueError(str(error)) from None
    return text


def _check_path(text: str) -> str:
    if not text.isprintable():
        raise ValueError(f"got {quote(text)}; must be a path without control characters")
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise ValueError(f"got {quote(text)}; must be an absolute path")
    return str(path)


Name = Annotated[str, _allow(r"[A-Za-z0-9_.,+-]{1,128}", "letters, digits and _ . , + -")]
Constraint = Annotated[
    str,
    _allow(r"[A-Za-z0-9_.,:*&|()\[\]-]{1,128}", "features joined by & | * ( ) [ ]"),
]
Gres = Annotated[
    str,
    _allow(r"[A-Za-z0-9_.,:=-]*(\{gpus\}[A-Za-z0-9_.,:=-]*)?", "a request like gpu:a100:{gpus}"),
]
Memory = Annotated[str, _allow(r"\d{1,12}[KMGT]?", "a size like 480G, or 0 for all of a node")]
Interface = Annotated[str, _allow(r"[A-Za-z0-9_.:^=,-]{1,64}", "an interface name like ib0")]
VariableName = Annotated[str, _allow(r"[A-Za-z_][A-Za-z0-9_]{0,127}", "a variable's name")]
Value = Annotated[
    str, _allow(r"[^\x00-\x1f\x7f-\x9f\u2028\u2029]*", "text without control characters")
]
Duration = Annotated[str, AfterValidator(_check_duration)]
AbsolutePath = Annotated[str, AfterValidator(_check_path)]
Image = Annotated[str, _allow(r"[A-Za-z0-9_./:@#+-]{1,512}", "a path or reference of an image")]
Mount = Annotated[
    str,
    _allow(r"/[^\s:,\x00-\x1f]*(:/[^\s:,\x00-\x1f]*)?(:ro|:rw)?", "/folder or /here:/there"),
]


class Requeue(Section):
    """How a run comes back."""

    allowed: bool = True
    """Whether the site lets jobs be requeued. false: each job queues its successor instead."""
    max_starts: PositiveInt = 100
    """Starts of one submission before a person has to look."""
    max_starts_without_progress: PositiveInt = 5
    """Starts in a row that may end at the same checkpoint."""


class Container(Section):
    """An image that holds Python and peft-dist."""

    runtime: Literal["apptainer", "pyxis"]
    """apptainer: each node runs the image. pyxis: srun does, by its plugin."""
    image: Image
    """Image file, or reference such as docker://... (pyxis: registry#name)."""
    mounts: tuple[Mount, ...] = ()
    """Folders to see inside besides the run directory: /scratch, or /here:/there."""


class Stage(Section):
    """A copy of the model on each node's own disk."""

    folder: AbsolutePath
    """Folder on that disk; copies stay there for later jobs."""


class Preflight(Section):
    """Checks of every node before training."""

    enabled: bool = True
    """Whether to check."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that all checks together may take."""
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
    gres: Gres = "gpu:{gpus}"
    """How GPUs are asked for, such as gpu:a100:{gpus}."""
    processes_per_node: PositiveInt | None = None
    """Processes of a node. Default: one per GPU, else one."""
    cpus_per_gpu: PositiveInt | None = None
    """CPUs of a node to ask for, per GPU."""
    cpus_per_node: PositiveInt | None = None
    """CPUs of a node to ask for, instead."""
    memory_per_node: Memory | None = None
    """Memory of a node to ask for, such as 480G; 0: all of it. Off: Slurm's default."""
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
    """Network interface for NCCL and gloo."""
    environment: dict[VariableName, Value] = Field(default_factory=dict)
    """Variables for every process; no secrets."""
    secrets_file: AbsolutePath | None = None
    """File of mode 0600 with NAME=value lines such as WANDB_API_KEY, read on each node."""
    setup: str = ""
    """Shell lines that run on each node before Python: modules, conda, a virtual environment."""
    python: AbsolutePath = ""
    """Interpreter on the nodes. Default: the one that submits; in a container python3."""
    container: Container | None = None
    """Image that everything runs in."""
    shared: tuple[AbsolutePath, ...] = ()
    """Folders that all nodes share; recipes and runs must lie in one of them. Empty: not known."""
    stage: Stage | None = None
    """Copy the model to each node's own disk first."""
    preflight: Preflight = Preflight()
    """Checks of every node before training."""

    @property
    def cpus_of_a_node(self) -> int | None:
        """CPUs of a node to ask for; None leaves it to Slurm."""
        if self.cpus_per_node is not None or self.cpus_per_gpu is None:
            return self.cpus_per_node
        return self.cpus_per_gpu * max(1, self.gpus_per_node)

    @property
    def interpreter(self) -> str:
        """The interpreter on the nodes."""
        if self.python:
            return self.python
        return "python3" if self.container is not None else sys.executable

    @property
    def gres_request(self) -> str | None:
        """What `--gres` asks for; None without GPUs."""
        return self.gres.format(gpus=self.gpus_per_node) if self.gpus_per_node else None

    @model_validator(mode="after")
    def _no_secrets_in_the_open(self) -> Self:
        for name in self.environment:
            if SECRET_NAMES.search(name):
                raise ValueError(
                    f"environment.{name} looks like a secret, and would stand in a script; "
                    "put it in secrets_file"
                )
        return self

    @model_validator(mode="after")
    def _setup_is_text(self) -> Self:
        if "\x00" in self.setup:
            raise ValueError("setup holds a NUL character; remove it")
        return self


def load_cluster(path: str | Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ClusterError: For anything that cannot be used as written, in one line.
    """
    where = str(path)
    try:
        raw = read_mapping(path, remedy="start with partition: NAME")
        refuse_booleans_as_numbers(raw, where, Cluster)
        return Cluster.model_validate(raw)
    except ValidationError as failure:
        raise ClusterError(str(describe_failure(failure, raw, where, Cluster))) from failure
    except RecipeError as error:
        raise ClusterError(str(error)) from error


def render_cluster(cluster: Cluster) -> str:
    """Return a cluster file with every default written out; loading it gives the same cluster."""
    return render_yaml(cluster.model_dump(mode="python") | {"python": cluster.interpreter})
