"""Which ways there are to run a recipe on some nodes, what each takes, and which is best."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from peft_dist.config import Recipe
from peft_dist.config.batch_shape import longest_rows_of_step
from peft_dist.config.parallel import Reshard
from peft_dist.plan.candidate import Candidate, candidate_for, may_keep_dequantized
from peft_dist.plan.estimate import Estimate
from peft_dist.plan.hardware import Hardware
from peft_dist.plan.subject import Subject

MOST_NODES = 64
"""Up to which it is looked for nodes on which something would fit."""


SAME_SPEED = 0.98
"""Share of the best speed from which on fewer gathers are not worth a base more in memory, nor is
it to dequantize less often."""
FILLED = 0.9
"""Share of a GPU's memory up to which weights stay dequantized."""


@dataclass(frozen=True)
class Row:
    """One strategy on so many nodes, its base on the GPUs or in the hosts' memory."""

    estimate: Estimate
    remedy: str
    """What would make it fit; empty where it does."""


@dataclass(frozen=True)
class Plan:
    """Every way that was looked at."""

    subject: Subject
    hardware: Hardware
    rows: tuple[Row, ...]
    best: Row | None
    """None where nothing fits."""
    reason: str
    """Why that one."""

    def figures(self) -> dict[str, Any]:
        """Return every figure, as JSON takes it."""
        return {
            "model": self.subject.recipe.model.name,
            "parameters": self.subject.shape.parameters,
            "trained_parameters": self.subject.adapter.parameters,
            "gpu": asdict(self.hardware.gpu),
            "inside_gb_s": self.hardware.inside_gb_s,
            "between_gb_s": self.hardware.between_gb_s,
            "assumed": asdict(self.hardware.assumed),
            "rows": [_as_json(row) for row in self.rows],
            "best": None if self.best is None else _as_json(self.best),
            "reason": self.reason,
        }


def _as_json(row: Row) -> dict[str, Any]:
    found = row.estimate
    values = asdict(found)
    values["bytes"]["allocated"] = found.bytes.allocated
    values["seconds"]["total"] = found.seconds.total
    return {**values, "fits": found.fits, "remedy": row.remedy}


def make_plan(subject: Subject, hardware: Hardware, nodes: Sequence[int]) -> Plan:
    """Look at every strategy on every number of nodes."""
    rows = []
    for count in nodes:
        for strategy in _strategies(subject.recipe, count):
            for offload in _offloads(subject.recipe, strategy):
                found = best_setting(subject, hardware, strategy, count, offload=offload)
                rows.append(Row(found, "" if found.fits else remedy_for(subject, hardware, found)))
    best, reason = _best(rows)
    return Plan(subject, hardware, tuple(rows), best, reason)


def choose(
    subject: Subject, hardware: Hardware, nodes: int, *, strategies: Sequence[str] = ()
) -> Estimate:
    """Return what a run on these nodes should do, where a recipe leaves it open.

    Of what fits the fastest; where nothing does, what comes nearest.
    """
    found = [
        best_setting(subject, hardware, strategy, nodes)
        for strategy in strategies or _strategies(subject.recipe, nodes, only_its_own=True)
    ]
    return min(found, key=_order)


def _strategies(recipe: Recipe, nodes: int, *, only_its_own: bool = False) -> list[str]:
    own = recipe.parallel.strategy
    if only_its_own and own != "auto":
        return [own]
    shards = recipe.parallel.offload != "none" or recipe.parallel.reshard != "auto"
    offers = [] if shards else ["ddp"]
    offers += ["fsdp", *(["hsdp"] if nodes > 1 else [])]
    return offers if own == "auto" or own in offers else [*offers, own]


def _offloads(recipe: Recipe, strategy: str) -> list[bool]:
    """Return whether the base waits in host memory: as the recipe says; under fsdp both ways."""
    own = recipe.parallel.offload == "cpu" and strategy not in ("ddp", "zero2")
    return [own] if own or strategy != "fsdp" else [False, True]


def best_setting(
    subject: Subject, hardware: Hardware, strategy: str, nodes: int, *, offload: bool | None = None
) -> Estimate:
    """Return the best of the settings that the recipe leaves open, under one strategy.

    Blocks stay gathered only where that is worth their memory.

    Args:
        subject: What is planned.
        hardware: Where.
        strategy: Which.
        nodes: On how many nodes.
        offload: Whether the base waits in the hosts' memory; by default as the recipe says.
    """
    candidates = _candidates(subject.recipe, hardware, strategy, nodes)
    if offload is not None:
        candidates = (replace(one, offload=offload) for one in candidates)
    found = [subject.estimate(one, hardware) for one in candidates]
    best = min(found, key=_order)
    enough = SAME_SPEED * best.tokens_per_s
    chosen = next(
        one
        for one in found
        if one.candidate == replace(best.candidate, reshard=one.candidate.reshard)
        and (one is best or (one.fits and one.tokens_per_s >= enough))
    )
    if chosen.fits and may_keep_dequantized(subject.recipe, strategy):
        return _with_dequantized(subject, hardware, chosen)
    return chosen


def _with_dequantized(subject: Subject, hardware: Hardware, found: Estimate) -> Estimate:
    """Return the same with as many blocks dequantized for good as there is room for.

    None where that is not worth its memory.
    """

    def keeping(blocks: int) -> Estimate:
        return subject.estimate(replace(found.candidate, dequantized=blocks), hardware)

    def has_no_room(blocks: int) -> bool:
        one = keeping(blocks)
        return one.device_bytes > FILLED * one.limit_bytes

    layers = range(1, subject.shape.layers + 1)
    more = keeping(bisect_left(layers, True, key=has_no_room))
    return more if SAME_SPEED * more.tokens_per_s >= found.tokens_per_s else found


def _order(found: Estimate) -> tuple[bool, float, int]:
    """What fits comes first, then what is faster; of what does not, what is smaller."""
    worth = -_told(found.tokens_per_s) if found.fits else found.device_bytes
    return not found.fits, worth, found.sent_inside_bytes + found.sent_between_bytes


def _told(speed: float) -> float:
    """Return a speed as exactly as a model of it is worth: three digits."""
    return float(f"{speed:.3g}")


def processes_on(recipe: Recipe, hardware: Hardware, nodes: int) -> int:
    """Return how many processes a recipe has on so many nodes."""
    return recipe.parallel.processes or nodes * hardware.gpus_per_node


def _candidates(
    recipe: Recipe, hardware: Hardware, strategy: str, nodes: int
) -> Iterator[Candidate]:
    processes = processes_on(recipe, hardware, nodes)
    micro, recompute = recipe.train.micro_batch_size, recipe.train.activation_checkpointing
    for rows in (
        [micro] if micro != "auto" else _powers(-(-longest_rows_of_step(recipe) // processes))
    ):
        for again in [recompute] if recompute != "auto" else [False, True]:
            one = candidate_for(
                recipe, strategy, nodes=nodes, processes=processes, rows=rows, recompute=again
            )
            for reshard in reshards_of(recipe, one):
                yield replace(one, reshard=reshard)


def reshards_of(recipe: Recipe, candidate: Candidate) -> tuple[Reshard, ...]:
    """Return when a candidate may free gathered blocks: the least memory first."""
    gathers = candidate.shard_size > 1 and candidate.strategy in ("fsdp", "hsdp")
    is_open = gathers and recipe.parallel.reshard == "auto"
    return get_args(Reshard) if is_open else (candidate.reshard,)


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def remedy_for(subject: Subject, hardware: Hardware, found: Estimate) -> str:
    """Return in a few words what would make a candidate fit: least change first."""
    own = found.candidate
    smaller = [rows for rows in _powers(own.micro_batch) if rows < own.micro_batch][::-1]
    changes: list[tuple[str, Candidate]] = []
    if own.reshard != "forward":
        changes.append(("parallel.reshard: forward", replace(own, reshard="forward")))
    for rows in smaller:
        changes.append((f"train.micro_batch_size: {rows}", replace(own, micro_batch=rows)))
    for rows in [own.micro_batch, *smaller]:
        words = "train.activation_checkpointing: true"
        if rows != own.micro_batch:
            words += f" and train.micro_batch_size: {rows}"
        changes.append((words, replace(own, micro_batch=rows, recompute=True)))
    if own.strategy == "fsdp":
        nodes = own.nodes * 2
        while nodes <= MOST_NODES and subject.recipe.parallel.processes is None:
            more = own.processes // own.nodes * nodes
            wider = replace(
                own, nodes=nodes, processes=more, shard_size=more, recompute=True, micro_batch=1
            )
            words = f"{nodes} nodes, train.activation_checkpointing: true, micro_batch_size: 1"
            changes.append((words, wider))
            nodes *= 2
    if own.strategy not in ("ddp", "zero2"):
        least = replace(own, offload=True, recompute=True, micro_batch=1)
        words = "parallel.offload: cpu, train.activation_checkpointing: true, micro_batch_size: 1"
        changes.append((words, least))
    for words, candidate in changes:
        if candidate != own and subject.estimate(candidate, hardware).fits:
            return f"fits with {words}"
    if own.strategy in ("ddp", "zero2"):
        return "the base is whole on every GPU; shard it (fsdp)"
    return "fits with nothing that was tried; shorten data.max_length, or take larger GPUs"


def _best(rows: Sequence[Row]) -> tuple[Row | None, str]:
    fitting = [row for row in rows if row.estimate.fits]
    if not fitting:
        return None, "nothing fits"

    def per_gpu(row: Row) -> float:
        return row.estimate.tokens_per_s / row.estimate.candidate.processes

    def worth(row: Row) -> tuple[float, bool, int]:
        """What is as fast with its base on the GPUs is better than with it in the hosts."""
        found = row.estimate
        return _told(per_gpu(row)), not found.candidate.offload, -found.device_bytes

    best = max(fitting, key=worth)
    found = best.estimate
    spare = (found.limit_bytes - found.device_bytes) / (1 << 30)
    return best, (
        f"most tokens per second and GPU of what fits ({per_gpu(best):,.0f}), "
        f"{spare:.1f} GiB to spare"
    )
