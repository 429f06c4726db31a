"""Compare the free space of a disk with what a run will write, before hours depend on it."""

import shutil

import torch

from peft_dist.common.errors import RunDirError
from peft_dist.common.sizes import megabytes
from peft_dist.distributed.collectives import broadcast_object
from peft_dist.model_setup import ModelSetup
from peft_dist.run.directory import RunDir

MOMENTS = 2
"""Of AdamW, for each parameter."""


def require_room(setup: ModelSetup, run: RunDir) -> None:
    """Refuse to train what could not be saved. Collective.

    Raises:
        RunDirError: On every process, with what is free and what is needed.
    """
    problem = _problem(setup, run) if setup.world.is_main else ""
    problem = broadcast_object(problem)
    if problem:
        raise RunDirError(
            problem,
            where=str(run.path),
            remedy="free space, lower checkpoint.keep_last, or name another folder with --run-dir",
        )


def needed_bytes(parameters: int, *, keeps_parameters: bool, checkpoints: int) -> tuple[int, int]:
    """Return the bytes of the adapter and of one checkpoint times how many are kept.

    Args:
        parameters: How many are trained; they are saved in float32.
        keeps_parameters: Whether a checkpoint holds them once more, beside the adapter.
        checkpoints: How many are kept.
    """
    adapter = parameters * torch.float32.itemsize
    return adapter, adapter * (1 + MOMENTS + keeps_parameters) * checkpoints


def _problem(setup: ModelSetup, run: RunDir) -> str:
    settings, method = setup.recipe.checkpoint, setup.method
    by_time = settings.every_steps is not None or settings.every_seconds is not None
    kept = settings.keep_last + settings.keep_best if by_time else 1  # a stop makes one
    adapter, checkpoints = needed_bytes(
        sum(map(torch.numel, setup.adapter.values())),
        keeps_parameters=method.of_saved(method.settings) != method.settings,
        checkpoints=kept,
    )
    try:
        # What is there gives way to what comes.
        there = sum(f.stat().st_size for f in run.checkpoints.rglob("*") if f.is_file())
        free = shutil.disk_usage(run.path).free + there
    except OSError:  # a file system that does not say
        return ""
    if free >= adapter + checkpoints:
        return ""
    many = "1 checkpoint" if kept == 1 else f"{kept} checkpoints"
    return (
        f"{megabytes(free)} are free, and the run writes {megabytes(adapter + checkpoints)}: an "
        f"adapter of {megabytes(adapter)} and {many} of {megabytes(checkpoints // kept)}"
    )
