"""What may stay in memory on a machine without GPUs, where a rank's memory is the host's.

Read from Linux alone; what is not known counts as no room.
"""

from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from peft_dist.common.errors import PeftDistError
from peft_dist.config import Recipe
from peft_dist.config.batch_shape import longest_rows_of_step, micro_batch_rows
from peft_dist.config.parallel import Parallel, Reshard
from peft_dist.plan.candidate import candidate_for, may_keep_dequantized
from peft_dist.plan.hardware import GIB
from peft_dist.plan.memory import peak_bytes
from peft_dist.plan.setting import Setting
from peft_dist.plan.subject import read_config, subject_of

USABLE = 0.9
"""Share of the free memory that a run may take."""
HEAP_FACTOR = 1.4
"""Resident bytes of a process for each byte of tensors: malloc's gaps were seen to take a third."""
PROCESS_BYTES = GIB
"""Of Python, torch and tables of rows."""


def keep_on_host(
    recipe: Recipe,
    strategy: str,
    *,
    processes: int,
    here: int,
    longest_row: int,
    free_bytes: int | None,
) -> Parallel:
    """Return how to run a recipe, with what memory is there for where it leaves that open.

    First the fewest gathers; then as many dequantized blocks as there is room for.

    Args:
        recipe: Settled in all else.
        strategy: `ddp`, `fsdp`, `hsdp`, `zero2` or `zero3`.
        processes: Of the run.
        here: Of these, on this machine.
        longest_row: Most tokens of a row.
        free_bytes: Of this machine. None: not known.
    """
    own = recipe.parallel
    gathers = own.reshard == "auto" and strategy in ("fsdp", "hsdp") and processes > 1
    dequantizes = may_keep_dequantized(recipe, strategy)
    if free_bytes is None or not (gathers or dequantizes):
        return own
    shortened = recipe.data.model_copy(update={"max_length": longest_row})
    recipe = recipe.model_copy(update={"data": shortened})
    try:
        config = read_config(recipe.model.name, recipe.model.revision, network=False)
        subject = subject_of(recipe, config)
    except PeftDistError:  # no formulas for this model or method
        return own
    rows = min(micro_batch_rows(recipe), -(-longest_rows_of_step(recipe) // processes))
    recompute = recipe.train.activation_checkpointing is True
    one = candidate_for(
        recipe,
        strategy,
        nodes=max(1, processes // here),
        processes=processes,
        rows=rows,
        recompute=recompute,
    )
    width = 2 if recipe.model.dtype in ("bfloat16", "float16") else 4
    setting = Setting(
        sharded=one.shard_size > 1,
        shards=one.shard_size,
        micro_batch=rows * recipe.rows_per_example,
        length=longest_row,
        recompute=recompute,
        quantized=recipe.quantization == "nf4",
        compute_bytes=width,
        stored_bytes=4,
        mask_bytes=width,
        reshard=one.reshard,
        dequantized=one.dequantized,
    )

    def has_no_room(other: Setting) -> bool:
        tensors = peak_bytes(subject.shape, subject.adapter, other).allocated
        return here * (HEAP_FACTOR * tensors + PROCESS_BYTES) > USABLE * free_bytes

    kept: dict[str, Any] = {}
    if gathers:
        choices = [replace(setting, reshard=way) for way in get_args(Reshard)]
        setting = next((way for way in reversed(choices) if not has_no_room(way)), setting)
        kept["reshard"] = setting.reshard
    if dequantizes:
        more = [replace(setting, dequantized=count + 1) for count in range(subject.shape.layers)]
        kept["dequantized_blocks"] = bisect_left(more, True, key=has_no_room)
    return own.model_copy(update=kept)


def free_memory_bytes(
    meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return what the kernel would give to new processes, in a container no more than its limit.

    Args:
        meminfo: The kernel's table.
        cgroup: Where the container's own limits stand (version 2).
    """
    found: list[int] = []
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            used = int((cgroup / "memory.current").read_text(encoding="ascii"))
            found.append(max(0, int(limit) - used))
    except (OSError, ValueError):
        return min(found, default=None)
    return min(found, default=None)
