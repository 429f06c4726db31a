"""The schema of a run's ledger: one class per event, with the meaning and unit of every field.

Each line of `ledger.jsonl` is one event. Whatever writes or reads the ledger does so through these
classes; `docs/ledger.md` is generated from them. A new kind of event is one class here and its name
in `EVENT_TYPES`. Keys and events that this version does not know are kept as they are.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Seconds = Annotated[float, Field(ge=0)]

STAMP = ("attempt", "time", "at_s")
"""Fields that the writer adds to every event, and that every line has."""


class LedgerEvent(BaseModel):
    """What every line has."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,
    )

    event: str
    """Which event this is."""
    step: Count
    """Optimizer steps done when it happened; of a step itself its number, from 1."""
    attempt: Count = 0
    """Which start of the run wrote it, from 1; 0 before it is written."""
    time: Seconds = 0.0
    """Unix time."""
    at_s: Seconds = 0.0
    """Seconds since the process of the attempt started, on the monotonic clock."""

    def fields(self) -> dict[str, Any]:
        """Return the fields that were set, and the event's name: what its line holds."""
        return {"event": self.event, **self.model_dump(exclude_unset=True)}


class StartEvent(LedgerEvent):
    """An attempt begins to train: everything is loaded and verified."""

    event: Literal["start"] = "start"
    steps: Count | None = None
    """Steps of the whole run."""
    world_size: int | None = None
    """Processes."""
    strategy: str | None = None
    """Engine: `ddp`, `fsdp`, `hsdp`, `zero2` or `zero3`."""
    startup_s: Seconds = 0.0
    """Seconds from the start of the process to its first own work: imports."""
    load_s: Seconds = 0.0
    """Seconds after that for data, base, adapter and checkpoint."""
    hosts: list[str] | None = None
    """Host name of each rank."""
    device: str | None = None
    """Name of the device that computes."""
    base_parameters: int | None = None
    """Parameters of the frozen base."""
    base_bytes_per_rank: list[int] | None = None
    """Bytes of the base that each rank holds."""
    trained_turns: int | None = None
    """Answers, completions and texts in the training rows."""
    stop_tokens: int | None = None
    """How many of them are trained to their end; the others are cut to `data.max_length`."""
    versions: dict[str, str] | None = None
    """Versions of the packages in use."""
    slurm_job_id: str | None = None
    """Slurm job; missing outside Slurm."""
    slurm_restart_count: int | None = None
    """How often Slurm has requeued that job."""
    planned_bytes_per_rank: int | None = None
    """Bytes of tensors that a rank was foreseen to need; missing without a plan."""
    planned_step_s: float | None = None
    """Seconds that a step was foreseen to take, of the longest rows."""
    launched: Seconds = 0.0
    """Unix time at which the launcher was started; missing where it is not known."""


class MicroBatchEvent(LedgerEvent):
    """Before step 1 it was measured how many rows fit, where the recipe leaves that open."""

    event: Literal["micro_batch"] = "micro_batch"
    planned: Count | None = None
    """Rows per process and pass that the plan has chosen."""
    chosen: Count
    """Rows per process and pass that the run trains with from now on."""
    tried: list[int] | None = None
    """Numbers of rows that were tried: a forward and a backward pass of the longest rows."""
    peak_memory_bytes: list[int] | None = None
    """Most memory that the fullest process took in each of them, AdamW's moments added."""
    limit_bytes: int | None = None
    """What the process with the least memory may take."""


class StepEvent(LedgerEvent):
    """An optimizer step updated the adapter."""

    event: Literal["step"] = "step"
    lr: float | None = None
    """Learning rate."""
    rows: int | None = None
    """Training examples in its global batch."""
    cursor: int | None = None
    """Training examples used so far, through all epochs."""
    tokens: int | None = None
    """Tokens in its global batch."""
    loss: float
    """Mean loss: nats per trained token, or per example where the objective compares answers."""
    reward_chosen: float | None = None
    """Mean reward of the chosen or desirable answers, as the objective has it; missing without."""
    reward_rejected: float | None = None
    """Mean reward of the rejected or undesirable answers; missing without."""
    reward_margin: float | None = None
    """Chosen reward minus rejected reward; missing where either is."""
    reward_accuracy: float | None = None
    """Share of pairs whose chosen answer has the higher reward, 0 to 1; a tie counts half."""
    kl: float | None = None
    """Objective kto: mean log-ratio to the start on mismatched answers, nats, at least 0."""
    grad_norm: float | None = None
    """Norm of the gradient before clipping."""
    source_loss: list[float | None] | None = None
    """The same of each source in a mixture, in the recipe's order; null for one that the step has
    no row of. Missing where there is one source."""
    rank_step_s: list[float] | None = None
    """Seconds of each rank's own part of the step, without waiting for others; missing until
    every rank has measured one."""
    rank_memory_bytes: list[int] | None = None
    """Peak memory of each rank so far: its GPU's, or the host's where it has none."""
    tokens_per_s: float
    """Tokens per second of all ranks together."""
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1; null where the device's peak is not known."""
    peak_memory_bytes: int | None = None
    """Peak memory of rank 0 so far."""


class EvaluationEvent(LedgerEvent):
    """The eval set was scored."""

    event: Literal["evaluation"] = "evaluation"
    eval_loss: float
    """Mean loss: nats per token, or per example where the objective compares answers."""
    eval_accuracy: float | None = None
    """Share of examples answered right, or of pairs whose chosen answer has the higher reward, 0
    to 1; null without choices, classes or pairs."""
    eval_source_loss: list[float | None] | None = None
    """Loss of each source of the held-out rows, in the recipe's order, as long as the objective is
    sft; null for one that no row of is scored. Missing where there is one source."""
    eval_reward_chosen: float | None = None
    """Mean reward of the chosen or desirable answers; missing where the objective has none."""
    eval_reward_rejected: float | None = None
    """Mean reward of the rejected or undesirable answers; missing where it has none."""
    eval_reward_margin: float | None = None
    """Chosen reward minus rejected reward; missing where either is."""
    eval_kl: float | None = None
    """Objective kto: mean log-ratio to the start on mismatched answers, nats, at least 0."""
    eval_seconds: Seconds | None = None
    """How long it took."""


class SampleEvent(LedgerEvent):
    """What the model answers to one example of the eval set, before or after training."""

    event: Literal["sample"] = "sample"
    row: int
    """Number of the example in the eval set, from 1."""
    prompt: str
    """What the model was asked; long texts are shortened in their middle."""
    expected: str
    """The right answer."""
    predicted: str
    """The model's answer."""


class CheckpointEvent(LedgerEvent):
    """A checkpoint was copied to memory; a thread writes it while training continues."""

    event: Literal["checkpoint"] = "checkpoint"
    stall_s: Seconds | None = None
    """Seconds that training waited."""


class SavedEvent(LedgerEvent):
    """A checkpoint was written and verified; `step` is the checkpoint's."""

    event: Literal["saved"] = "saved"
    bytes: int | None = None
    """Size of the checkpoint."""
    write_s: Seconds | None = None
    """Seconds that writing and verifying took."""


class SaveFailedEvent(LedgerEvent):
    """A checkpoint could not be written; `step` is the checkpoint's."""

    event: Literal["save_failed"] = "save_failed"
    reason: str = ""
    """Why."""
    write_s: Seconds | None = None
    """Seconds until it failed."""


class NonFiniteEvent(LedgerEvent):
    """A step whose loss or gradient was not finite; it left the adapter unchanged."""

    reason: str = ""
    """Its loss and gradient norm."""
    rows: int | None = None
    """Training examples in its global batch."""
    cursor: int | None = None
    """Training examples used so far, through all epochs."""
    tokens: int | None = None
    """Tokens in its global batch."""


class SkippedEvent(NonFiniteEvent):
    """A step whose loss or gradient was not finite; training continued after it."""

    event: Literal["skipped"] = "skipped"


class RollbackEvent(NonFiniteEvent):
    """A step whose loss or gradient was not finite; training returned to a checkpoint."""

    event: Literal["rollback"] = "rollback"
    back_to: Count | None = None
    """Step of that checkpoint, from which training continues."""

    @property
    def last_step(self) -> int:
        """The last step that still counts."""
        return self.step if self.back_to is None else self.back_to


class GpuSample(BaseModel):
    """One GPU of a sample; what NVML does not report is missing."""

    model_config = LedgerEvent.model_config

    utilisation_percent: float | None = None
    """Share of the time since the last sample in which a kernel ran, in percent."""
    memory_used_bytes: int | None = None
    """Memory in use, by all processes."""
    memory_total_bytes: int | None = None
    """Memory of the card."""
    temperature_c: float | None = None
    """Temperature in degrees Celsius."""
    power_w: float | None = None
    """Power draw in watts."""


class GapEvent(LedgerEvent):
    """Steps before the attempt's checkpoint have no lines: these were lost, as with a machine."""

    event: Literal["gap"] = "gap"
    from_step: Count
    """First step that has no line."""
    to_step: Count
    """Last step that has no line."""

    @property
    def missing_steps(self) -> int:
        """How many steps have no line."""
        return max(0, self.to_step - self.from_step + 1)


class SystemEvent(LedgerEvent):
    """A sample of a node, taken by a thread every `tracking.system_every_s` seconds."""

    event: Literal["system"] = "system"
    node: int | None = None
    """First rank of the node; missing for rank 0's own."""
    cpu_percent: float | None = None
    """Processor use since the last sample, all cores together, in percent."""
    memory_used_bytes: int | None = None
    """Memory in use on the host."""
    memory_total_bytes: int | None = None
    """Memory of the host."""
    process_rss_bytes: int | None = None
    """Resident memory of the sampling process."""
    disk_free_bytes: int | None = None
    """Free space on the file system of the run directory."""
    network_sent_bytes: int | None = None
    """Bytes sent by all interfaces since the last sample."""
    network_received_bytes: int | None = None
    """Bytes received by all interfaces since the last sample."""
    gpus: list[GpuSample] | None = None
    """The GPUs of the run on this node."""


class EndEvent(LedgerEvent):
    """An attempt ended and could still write."""

    event: Literal["end"] = "end"
    outcome: str = "ended"
    """`done`, `interrupted` (a signal, after a save), `failed` (an error for a person) or
    `crashed`."""


class UnknownEvent(LedgerEvent):
    """An event of another version; its fields are kept."""


EVENT_TYPES: tuple[type[LedgerEvent], ...] = (
    StartEvent,
    MicroBatchEvent,
    StepEvent,
    EvaluationEvent,
    SampleEvent,
    CheckpointEvent,
    SavedEvent,
    SaveFailedEvent,
    SkippedEvent,
    RollbackEvent,
    GapEvent,
    SystemEvent,
    EndEvent,
)
"""Every event there is; each class defaults `event` to the name that stands in its lines."""


def event_name(kind: type[LedgerEvent]) -> str:
    """Return the name that the lines of a class bear."""
    return str(kind.model_fields["event"].default)
