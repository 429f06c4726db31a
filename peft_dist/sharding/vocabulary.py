"""The embedding and the head as sharded units of their own, whole only while they are used.

A unit that stays gathered through the pass would hold the vocabulary twice: 2 GiB of an 8B.
"""

from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule

from peft_dist.data.pack import Batch
from peft_dist.distributed.collectives import Shard
from peft_dist.model.architectures import bare_model
from peft_dist.model.gathered import (
    bytes_of_position,
    gather_for_use,
    score_in_slices,
    scorer_of,
)
from peft_dist.model.loss import CausalLM
from peft_dist.model.sliced_cross_entropy import can_be_slices
from peft_dist.sharding.compute_timer import ComputeTimer
from peft_dist.sharding.lookup import ColumnLookup, can_be_columns
from peft_dist.sharding.slices import SlicedHead


class VocabularyUnit(nn.Module):
    """Holds an embedding, a head, or both where they are one matrix; `fully_shard` takes it.

    Stands outside the model: nobody calls it, so that FSDP2 gathers nothing by itself.

    Attributes:
        keeps: Whether what is gathered stays until the engine frees it.
        is_head: Whether it is a head alone.
        by_columns: Whether it is sharded by columns: an embedding alone, of which few rows are
            used in a pass.
        in_slices: Whether it is a head alone, against whose parts positions can be scored.
    """

    def __init__(
        self, modules: list[nn.Module], *, keeps: bool, by_columns: bool, in_slices: bool
    ) -> None:
        """Take modules whose parameters are frozen and in no other module."""
        super().__init__()
        self.modules_of = nn.ModuleList(modules)
        self.keeps = keeps
        self.by_columns, self.in_slices = by_columns, in_slices
        self.is_head = len(modules) == 1 and isinstance(modules[0], nn.Linear)
        self._is_asked_for = False

    def watch_for(self, model: nn.Module, block: nn.Module) -> None:
        """Ask for the parameters before a block runs in a pass of the model, for use after it."""
        wanted: list[Batch] = []

        def begins(_model: nn.Module, inputs: tuple[Batch]) -> None:
            wanted[:] = inputs[:1]

        def asks(_block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            assert isinstance(self, FSDPModule)
            if not wanted:  # the block runs again in backward
                return
            everyone, scorer = wanted.pop().everyone, scorer_of(self.modules_of[0])
            if scorer and everyone and scorer.pays(everyone, bytes_of_position(inputs[0])):
                return
            self._is_asked_for = True
            self.unshard(async_op=True)

        model.register_forward_pre_hook(begins)
        block.register_forward_pre_hook(asks)

    @property
    def exchanges_rows(self) -> bool:
        """Whether passes may exchange rows or positions, for which their numbers must be known."""
        return self.by_columns or self.in_slices

    def watch(self, model: nn.Module, shard: Shard, timer: ComputeTimer) -> None:
        """Gather for each use of the modules from now on; call it once the unit is sharded.

        Args:
            model: As an engine wraps it.
            shard: Who holds which part.
            timer: Times this process's own part of a step.
        """
        self._timer = timer
        embedding, *head = self.modules_of
        if self.by_columns:
            assert isinstance(embedding, nn.Embedding)
            ColumnLookup(embedding, self, shard, timer).watch(model, keeps=self.keeps)
            return
        if self.in_slices:
            assert isinstance(embedding, nn.Linear)
            score_in_slices(embedding, SlicedHead(embedding, shard, timer))
        # Of one matrix, the loss at the end of the pass frees what the embedding has gathered.
        gather_for_use(embedding, self, free=not head)
        for module in head:
            gather_for_use(module, self)

    def gather(self) -> None:
        """Make the parameters whole, where they are not. Collective."""
        assert isinstance(self, FSDPModule)
        if not self._is_asked_for:
            self.unshard()
            return
        with self._timer.gathering():  # that is, waiting for it
            self._is_asked_for = False
            self.unshard()

    def free(self) -> None:
        """Keep this process's part alone."""
        assert isinstance(self, FSDPModule)
        if not self.keeps:
            self.reshard()


def vocabulary_units(model: nn.Module, *, keeps: bool, shards: int) -> list[VocabularyUnit]:
    """Return the units of a wrapped model, on `meta`; none of what is trained in part or odd.

    What is left out is gathered with the rest of the model, and stays so through the pass.

    Args:
        model: As an engine wraps it.
        keeps: See `VocabularyUnit`.
        shards: Processes that hold one copy of the base, each its part on its device; 1 where
            parts wait in host memory.
    """
    bare: Any = bare_model(model.peft)  # type: ignore[arg-type]
    embedding = _base_of(bare.get_input_embeddings(), nn.Embedding)
    # Other losses than a causal language model's call their heads, which are small.
    own_head = bare.get_output_embeddings() if isinstance(model, CausalLM) else None
    head = _base_of(own_head, nn.Linear)
    if embedding is not None and own_head is not None and _is_tied(bare, embedding):
        groups = [] if head is None or head.weight is not embedding.weight else [[embedding, head]]
    else:
        groups = [[one] for one in (embedding, head) if one is not None]
    return [
        VocabularyUnit(
            group,
            keeps=keeps,
            by_columns=_may_be_columns(group, shards),
            in_slices=_may_be_slices(group, shards),
        )
        for group in groups
        if _owners(bare, *_parameters(*group)) == {id(module) for module in group}
    ]


def _may_be_columns(group: list[Any], shards: int) -> bool:
    """Whether the modules of a unit are an embedding alone that has columns for so many shards."""
    return (
        len(group) == 1 and isinstance(group[0], nn.Embedding) and can_be_columns(group[0], shards)
    )


def _may_be_slices(group: list[Any], shards: int) -> bool:
    """Whether the modules of a unit are a head alone that has a row for each of so many shards."""
    is_head = len(group) == 1 and isinstance(group[0], nn.Linear)
    return is_head and can_be_slices(group[0].weight.shape[0], shards)


def _parameters(*modules: Any) -> list[nn.Parameter]:
    """Return what modules hold, a bias that the model has in another place too among it."""
    return [p for module in modules for p in module._parameters.values() if p is not None]


def _is_tied(bare: nn.Module, embedding: Any) -> bool:
    return len(_owners(bare, embedding.weight)) > 1


def _owners(bare: nn.Module, *parameters: nn.Parameter) -> set[int]:
    """Return the modules that hold one of some parameters."""
    some = {id(parameter) for parameter in parameters}
    return {id(m) for m in bare.modules() if some & {id(p) for p in _parameters(m)}}


def _base_of(module: Any, kind: type[nn.Module]) -> Any:
    """Return the frozen module of a kind, taken out of what PEFT trains beside it; or None."""
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    is_one = isinstance(module, kind) and not list(module.children())
    return module if is_one and not any(p.requires_grad for p in module.parameters()) else None
