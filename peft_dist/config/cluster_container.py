"""The image of a cluster file: what runs it, and what it sees of a node."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from peft_dist.config.cluster_values import Image, Mount, SetUp
from peft_dist.config.section import Section


class Container(Section):
    """An image that holds Python and peft-dist."""

    runtime: Literal["apptainer", "singularity", "shifter", "pyxis", "edf"]
    """apptainer, singularity, shifter: each node runs the image. pyxis: srun does, by its plugin.
    edf: srun does, with the image that an environment definition file describes."""
    image: Image
    """Image file, or reference such as docker://... (pyxis: registry#name; shifter:
    docker:name:tag). One that ends with .toml is an environment definition file."""
    mounts: tuple[Mount, ...] = ()
    """Folders to see inside besides the run directory, such as those of models, rows and caches:
    /scratch, or /here:/there. With edf, those that its file mounts: nothing is added to them."""
    gpu: Literal["nv", "rocm", "none"] | None = None
    """How GPUs get inside: --nv, --rocm, or no flag where the site's set-up sees to it. shifter's
    flag for nv is --module=gpu. Default: nv where there are GPUs."""
    start: Literal["exec", "run"] | None = None
    """Subcommand of apptainer and singularity: run goes by the image's own run script. Default:
    exec."""
    setup: SetUp = ""
    """Shell lines that run inside the image before Python. With pyxis and edf, the cluster file's
    own `setup` runs inside as well."""

    @property
    def uses_edf(self) -> bool:
        """Whether an environment definition file describes the image."""
        return self.runtime == "edf" or (self.runtime == "pyxis" and self.image.endswith(".toml"))

    @property
    def is_started_by_srun(self) -> bool:
        """Whether all that a node runs is in the image."""
        return self.runtime in ("pyxis", "edf")

    @property
    def folders_inside(self) -> tuple[Path, ...]:
        """What the mounts are called inside."""
        parts = [mount.removesuffix(":ro").removesuffix(":rw").split(":") for mount in self.mounts]
        return tuple(Path(names[-1]) for names in parts)

    @model_validator(mode="after")
    def _settings_fit_the_runtime(self) -> Self:
        if self.start is not None and self.runtime not in ("apptainer", "singularity"):
            raise ValueError(f"start is not for {self.runtime}; remove it")
        if self.gpu is not None and self.is_started_by_srun:
            raise ValueError(f"gpu is not for {self.runtime}, which sees to GPUs; remove it")
        if self.gpu == "rocm" and self.runtime == "shifter":
            raise ValueError("gpu: rocm is not for shifter; remove it")
        return self
