"""Replace `auto` in a recipe by what the plan chooses, so that a run can be repeated.

Done on the control plane, before a run is made: its resolved recipe holds the choice.
"""

import math
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_dist.common.errors import LaunchError, PeftDistError
from peft_dist.config import Recipe
from peft_dist.config.batch_shape import micro_batch_rows
from peft_dist.config.cluster import Cluster
from peft_dist.config.parallel import Reshard, least_kept
from peft_dist.launch.placement import this_machine
from peft_dist.plan.estimate import Estimate
from peft_dist.plan.hardware import GIB, Hardware, find_gpu, hardware_of, recognise_gpu
from peft_dist.plan.plan import MOST_NODES, choose, remedy_for
from peft_dist.plan.subject import read_config, subject_of
from peft_dist.run.prediction import MEASURES_ROWS, Prediction

QUERY = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
QUERY_LIMIT_S = 20.0
TIME_MARGIN = 2.0
"""Times the planned hours: what no GPU has confirmed must not end a job early."""
AROUND_TRAINING_S = 1800.0
"""For nodes to come, checks, evaluations and the last save."""


@dataclass(frozen=True)
class Settled:
    """A recipe that leaves nothing open, and what is foreseen of it."""

    recipe: Recipe
    estimate: Estimate | None
    remedy: str = ""
    """What would make it fit, where it does not."""
    unknown: str = ""
    """Why nothing is foreseen."""
    measures_rows: bool = False
    """Whether the rows of a pass were left open: a start on a GPU may correct the choice."""

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.estimate is None or self.estimate.fits

    def prediction(self) -> Prediction | None:
        """Return what the run's plan file holds; None where nothing is foreseen or to be found."""
        found = self.estimate
        is_open = {MEASURES_ROWS: True} if self.measures_rows else {}
        if found is None:
            rows = self.recipe.train.micro_batch_size
            return {"micro_batch_size": rows, **is_open} if is_open else None
        return {
            **is_open,
            "bytes_per_rank": found.bytes.allocated,
            "reserved_bytes_per_rank": found.reserved_bytes,
            "step_s": found.seconds.total,
            "tokens_per_s": found.tokens_per_s,
            "hours": found.hours,
            "first_start_s": found.first_start_s,
            "save_s": found.save_s,
            "strategy": found.candidate.strategy,
            "micro_batch_size": found.candidate.micro_batch,
            "activation_checkpointing": found.candidate.recompute,
            "reshard": found.candidate.reshard,
            "dequantized_blocks": found.candidate.dequantized,
        }


def settle(
    recipe: Recipe, hardware: Hardware | None, nodes: int, *, strategies: Sequence[str] = ()
) -> Settled:
    """Return the recipe with every `auto` of it replaced, as far as GPUs are known.

    Args:
        recipe: What to train.
        hardware: The nodes. None: no GPUs, or of an unknown kind; then `auto` is the default.
        nodes: How many.
        strategies: Those to choose from. Default: as the recipe says.

    Raises:
        PeftDistError: Where a field is `auto` and the model cannot be looked at.
    """
    is_open = recipe.train.micro_batch_size == "auto"
    if hardware is None:
        recompute = recipe.train.activation_checkpointing is True
        return Settled(
            _with(recipe, micro_batch_size=micro_batch_rows(recipe), recompute=recompute),
            None,
            unknown="the kind of GPU is not known",
            measures_rows=is_open,
        )
    try:
        # A submission waits for no network: the model of a job is there, or the job cannot start.
        config = read_config(recipe.model.name, recipe.model.revision, network=False)
        subject = subject_of(recipe, config)
    except PeftDistError as error:
        train = recipe.train
        if "auto" in (train.micro_batch_size, train.activation_checkpointing):
            raise
        return Settled(recipe, None, unknown=str(error))
    if recipe.parallel.strategy == "auto" and recipe.parallel.shard_size is not None:
        strategies = ["hsdp"]
    found = choose(subject, hardware, nodes, strategies=strategies)
    one = found.candidate
    settled = _with(
        recipe,
        micro_batch_size=one.micro_batch,
        recompute=one.recompute,
        strategy=one.strategy,
        reshard=one.reshard,
        dequantized=one.dequantized,
    )
    remedy = "" if found.fits else remedy_for(subject, hardware, found)
    return Settled(settled, found, remedy, measures_rows=is_open)


def time_limit_s(foreseen: Sequence[Prediction | None]) -> int | None:
    """Return seconds in which each of some runs is done, with room to spare; None: nobody knows.

    Whatever takes longer goes on in the next job.
    """
    limits = []
    for one in foreseen:
        if one is None or one.get("hours") is None:
            return None
        needed_s = TIME_MARGIN * one["hours"] * 3600 + one["first_start_s"] + AROUND_TRAINING_S
        limits.append(math.ceil(needed_s / 600) * 600)
    return max(limits, default=None)


def fewest_nodes(recipes: Sequence[Recipe], hardware: Hardware | None, most: int | None) -> int:
    """Return the fewest nodes, 1, 2, 4 and so on, on which recipes fit; 1 where none suffice.

    Args:
        recipes: Those of one submission.
        hardware: The nodes. None: not known.
        most: Nodes that a job may have.

    Raises:
        PeftDistError: Where a field is `auto` and the model cannot be looked at.
    """
    if hardware is None or any(recipe.parallel.processes is not None for recipe in recipes):
        return 1
    count = 1
    while count <= min(most or MOST_NODES, MOST_NODES):
        if all(settle(recipe, hardware, count).fits for recipe in recipes):
            return count
        count *= 2
    return 1


def _with(
    recipe: Recipe,
    *,
    micro_batch_size: int,
    recompute: bool,
    strategy: str | None = None,
    reshard: Reshard = "forward",
    dequantized: int = 0,
) -> Recipe:
    train = recipe.train.model_copy(
        update={"micro_batch_size": micro_batch_size, "activation_checkpointing": recompute}
    )
    parallel = recipe.parallel
    if strategy is not None:
        chosen = {"reshard": reshard} if strategy in ("fsdp", "hsdp") else {}
        kept = {"dequantized_blocks": dequantized}
        parallel = parallel.model_copy(update={"strategy": strategy, **kept, **chosen})
    return recipe.model_copy(update={"train": train, "parallel": parallel})


def cluster_hardware(cluster: Cluster) -> Hardware | None:
    """Return the nodes of a cluster; None where its file does not say which GPUs they have."""
    if cluster.gpu is None:
        return None
    hardware = hardware_of(cluster, find_gpu(cluster.gpu, where="gpu"), gpus_per_node=None)
    if cluster.processes_per_node is None:
        return hardware
    return replace(hardware, gpus_per_node=cluster.processes_per_node)


def settle_here(recipe: Recipe) -> Settled:
    """Return a recipe settled for this machine."""
    return settle(recipe, own_hardware(this_machine().gpus), 1)


def own_hardware(gpus: int) -> Hardware | None:
    """Return this machine as the plan takes it; None without GPUs of a kind that is known."""
    if not gpus:
        return None
    try:
        done = subprocess.run(
            QUERY, capture_output=True, text=True, check=True, timeout=QUERY_LIMIT_S
        )
        name, _, memory_mib = done.stdout.splitlines()[0].rpartition(", ")
        gpu = recognise_gpu(name, float(memory_mib) / 1024)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return None if gpu is None else hardware_of(None, gpu, gpus_per_node=gpus)


def check_memory(settled: Settled, *, anyway: bool) -> list[str]:
    """Return a warning where a run may not fit.

    Raises:
        LaunchError: Where its tensors alone are more than a GPU has.
    """
    found = settled.estimate
    if found is None or settled.fits:
        return []
    own, limit = found.bytes.allocated / GIB, found.limit_bytes / GIB
    if found.cannot_fit and not anyway:
        raise LaunchError(
            f"{own:.1f} GiB of tensors do not fit into a GPU's {limit:.1f} GiB "
            f"({found.candidate.strategy}, {found.candidate.processes} processes)",
            where="train.micro_batch_size",
            remedy=f"{settled.remedy}; `peft-dist plan` shows more, --anyway submits it as it is",
        )
    return [
        f"may run out of memory: {own:.1f} GiB of tensors, {found.device_bytes / GIB:.1f} with all "
        f"else, in {limit:.1f} GiB; {settled.remedy}"
    ]


def settle_alike(recipes: Sequence[Recipe], hardware: Hardware | None, nodes: int) -> list[Settled]:
    """Return every recipe of an array settled, all under one strategy: one that suits them all.

    With gathered blocks and dequantized weights all do what takes the least memory.
    """
    found = _under_one_strategy(recipes, hardware, nodes)
    chosen = [one.recipe.parallel for one in found]
    least = least_kept(chosen)
    if not least:
        return found
    pinned = [
        recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=least)})
        for recipe in recipes
    ]
    strategies = [chosen[0].strategy]
    return [settle(recipe, hardware, nodes, strategies=strategies) for recipe in pinned]


def _under_one_strategy(
    recipes: Sequence[Recipe], hardware: Hardware | None, nodes: int
) -> list[Settled]:
    own = [settle(recipe, hardware, nodes) for recipe in recipes]
    chosen = dict.fromkeys(one.recipe.parallel.strategy for one in own)
    if len(chosen) == 1:
        return own
    tried = [
        [settle(recipe, hardware, nodes, strategies=[strategy]) for recipe in recipes]
        for strategy in chosen
    ]
    return next((all_ for all_ in tried if all(one.fits for one in all_)), tried[0])
