"""The recipe's section about processes: who holds what, and for how long."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from peft_dist.config.section import Section

Reshard: TypeAlias = Literal["forward", "backward", "step"]
"""After what gathered blocks are freed: from the least memory to the fewest gathers."""


class Parallel(Section):
    """How processes share the work."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "zero2", "zero3"] = "auto"
    """ddp: base on every process. fsdp: base sharded over all. hsdp: sharded inside groups,
    groups are replicas. zero2: ddp with the optimizer sharded by DeepSpeed. zero3: base sharded by
    DeepSpeed too. auto: what the launcher says; without one what `peft-dist plan` finds fastest of
    what fits, else fsdp."""
    processes: PositiveInt | None = None
    """Processes in all. Default: what the launcher says, else one per GPU, else 1."""
    shard_size: PositiveInt | None = None
    """Processes per shard group, hsdp only. Default: the processes of one node."""
    max_restarts: Annotated[int, Field(ge=0)] = 3
    """Times the launcher starts all processes again in place after one has crashed."""
    offload: Literal["none", "cpu"] = "none"
    """Where this process's part of the base waits while it is not needed: on the device, or in
    host memory (fsdp, hsdp and zero3)."""
    reshard: Reshard | Literal["auto"] = "auto"
    """When a process frees the blocks that it has gathered from the others (fsdp and hsdp).
    forward: after each use; backward gathers them again. backward: once backward is through with
    them, half of the gathers for memory of the whole base. step: at the end of the step, one gather
    for all of its passes. All give the same losses, to the bit. auto: what `peft-dist plan`
    finds memory for and a step at least 2 % faster by; where nobody has asked it, forward. On a
    CPU what the host has memory for, with rows as long as the longest."""

    dequantized_blocks: NonNegativeInt | Literal["auto"] = "auto"
    """Transformer blocks, the first ones, whose 4-bit weights stay dequantized on every process, in
    the compute dtype: no pass dequantizes or gathers them. All give the same losses, to the bit.
    More than there are: all; not with zero3. auto: as many as `peft-dist plan` finds memory left
    for, where a step is at least 2 % faster by them; where nobody has asked it, 0. On a CPU as many
    as the host has memory for, with rows as long as the longest. 0: off."""

    @model_validator(mode="after")
    def _kept_weights_are_no_pieces(self) -> Self:
        if self.strategy == "zero3" and self.dequantized_blocks not in ("auto", 0):
            raise ValueError(
                f"dequantized_blocks {self.dequantized_blocks} is not for strategy zero3; remove it"
            )
        return self

    @model_validator(mode="after")
    def _offload_needs_shards(self) -> Self:
        if self.offload != "none" and self.strategy in ("ddp", "zero2"):
            raise ValueError(
                f"offload {self.offload} is for a sharded base, not {self.strategy}; remove it"
            )
        return self

    @model_validator(mode="after")
    def _reshard_needs_gathers(self) -> Self:
        if self.reshard != "auto" and self.strategy not in ("auto", "fsdp", "hsdp"):
            raise ValueError(
                f"reshard {self.reshard} is for strategy fsdp or hsdp, not {self.strategy}; "
                "remove it"
            )
        return self

    @model_validator(mode="after")
    def _shard_size_belongs_to_hsdp(self) -> Self:
        if self.shard_size is None:
            return self
        if self.strategy not in ("hsdp", "auto"):
            raise ValueError(f"shard_size is for strategy hsdp, not {self.strategy}; remove it")
        if self.processes is not None and self.processes % self.shard_size:
            raise ValueError(
                f"shard_size {self.shard_size} does not divide processes {self.processes}"
            )
        return self


def least_kept(chosen: Sequence[Parallel]) -> dict[str, Any]:
    """Return the settings by which the least stays gathered and dequantized, where some differ.

    Args:
        chosen: What runs, or processes, would do by themselves; what they leave open is the least.
    """
    least: dict[str, Any] = {}
    if len(reshards := {one.reshard for one in chosen}) > 1:
        first = next(one for one in ("auto", *get_args(Reshard)) if one in reshards)
        least["reshard"] = "forward" if first == "auto" else first
    if len(blocks := {one.dequantized_blocks for one in chosen}) > 1:
        least["dequantized_blocks"] = min(0 if one == "auto" else one for one in blocks)
    return least
