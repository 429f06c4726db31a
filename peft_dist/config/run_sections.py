"""The sections of a recipe about the run itself: checkpoints, watchdog, where progress shows."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from peft_dist.config.section import NonNegativeFloat, PositiveFloat, Section, Text


class Checkpoint(Section):
    """What an interrupted run goes on from: adapter, optimizer and place in the rows."""

    every_steps: PositiveInt | None = None
    """Steps between checkpoints. Off: as `every_seconds` says."""
    every_seconds: PositiveFloat | None = 600.0
    """Seconds after which the next step is followed by a checkpoint, besides `every_steps`.
    null: off. A run that is asked to stop always makes one."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Checkpoints with the lowest held-out loss to keep besides; where above 0, every evaluation
    is followed by a checkpoint."""
    background: bool = True
    """Write while training goes on; the steps wait for the copy to host memory alone."""
    max_failed_saves: PositiveInt = 3
    """Checkpoints in a row that cannot be written before the run ends."""


class Watchdog(Section):
    """How long a phase may take before the process is taken to hang, and ends to be restarted."""

    min_s: PositiveFloat = 300.0
    """Seconds for a step, or five times its 99th percentile where that is more."""
    setup_s: PositiveFloat = 3600.0
    """Seconds for everything before the first step, and for that."""
    evaluation_s: PositiveFloat = 900.0
    """Seconds for a micro-batch of an evaluation."""
    save_s: PositiveFloat = 900.0
    """Seconds that the steps may wait for a checkpoint, or for the final adapter."""


class Wandb(Section):
    """Weights & Biases, a view of the ledger that a process beside training sends."""

    mode: Literal["disabled", "auto", "offline", "online"] = "disabled"
    """Whether and how to log. auto: online where there is a key and the server answers, else into
    files in the run directory. offline: into files. `peft-dist sync` sends what W&B lacks."""
    project: Text = "peft-dist"
    """W&B project."""
    entity: Text | None = None
    """W&B team or user. Off: the account's default."""
    group: Text | None = None
    """Group of runs. Default: the array that the run belongs to, if it does."""
    tags: tuple[Text, ...] = ()
    """Words to find the run by."""
    wait_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    """Seconds that the end of training waits for W&B to take the last rows."""


class Profile(Section):
    """A trace of a few steps: every kernel, copy and call, in the run's folder `profile`."""

    steps: tuple[PositiveInt, PositiveInt] | None = None
    """The first and the last step to trace, such as [10, 12]. They take longer, and the trace of a
    step may be 100 MB. Open it at https://ui.perfetto.dev or chrome://tracing. Off: none."""
    ranks: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Which processes write a trace."""

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> Self:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(f"steps must be the first and the last, got {list(self.steps)}")
        return self


class Tracking(Section):
    """Where progress is shown besides the ledger in the run directory."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""
    system_every_s: NonNegativeFloat | None = 15.0
    """Seconds between the ledger's records of rank 0's machine: processor, memory, disk, network,
    GPUs. 0 or null: off."""
    system_nodes: bool = False
    """Whether the ledger also holds samples of every other node, not only rank 0's."""
