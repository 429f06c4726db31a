"""What an adapter may ask of the loaded base to start from: weights, words, training rows."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import nn

from peft_dist.common.errors import RecipeError
from peft_dist.common.screen import wait
from peft_dist.config import Recipe
from peft_dist.data.encode import load_tokenizer
from peft_dist.data.mixture import source_shares
from peft_dist.data.order import RowOrder, assign
from peft_dist.data.pack import Batch, pack, unlabelled
from peft_dist.data.stream import TrainingRows
from peft_dist.distributed.collectives import Shard
from peft_dist.distributed.world import World
from peft_dist.methods.method import BaseAccess
from peft_dist.model import architectures
from peft_dist.model.plan import BasePlan
from peft_dist.model.precision import autocast
from peft_dist.model.source import BaseSource


class HoldsBase(Protocol):
    """What of an engine is used here."""

    world: World
    shard: Shard

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return a parameter's shape as a whole, whatever shards it."""

    def full_tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter whole, whatever shards it. Collective."""

    def copy_into(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Write a whole tensor into a parameter. Collective."""

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients. Collective."""


@dataclass(frozen=True)
class LoadedBase:
    """A base in its shards, and all that it was made from."""

    recipe: Recipe
    source: BaseSource
    plan: BasePlan
    by_name: dict[str, nn.Parameter]
    """Its parameters, by their names in the bare model."""
    engine: HoldsBase
    model: nn.Module
    """As the engine wraps it."""
    peft: PeftModel
    compute_dtype: torch.dtype
    rows: TrainingRows | None
    """Training rows; None where what starts is replaced by what is saved."""

    def access(self) -> BaseAccess:
        """Return what a method may use to fill its adapter."""
        engine = self.engine
        return BaseAccess(
            engine.full_tensor,
            engine.copy_into,
            self._release,
            self._tokenize,
            self._read,
            self._stored_weight,
            None if self.rows is None else self._over_rows,
        )

    def _release(self, parameters: Collection[nn.Parameter]) -> None:
        wanted = {id(parameter) for parameter in parameters}
        few = {name: p for name, p in self.by_name.items() if id(p) in wanted}
        engine = self.engine
        plan = self.plan.of(few)
        self.source.fill(few, plan, engine.shard, world=engine.world, copy_into=engine.copy_into)

    def _tokenize(self, text: str) -> list[int]:
        tokenizer = load_tokenizer(self.recipe)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def _read(self, ids: list[int]) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(unlabelled(ids).to(self.engine.world.device))

    def _stored_weight(self, name: str) -> torch.Tensor:
        (tensor,) = self.plan.of([name]).tensors
        if tensor.packing is not None:
            raise RecipeError(
                f"init: loftq needs {name} in full, and the model's files have it in 4 bits",
                where="method.init",
                remedy="name the full-precision model, or choose another init",
            )
        shard, device = self.engine.shard, self.engine.world.device
        rows = tensor.source.rows(*shard.rows(tensor.shape[0])).to(device).float()
        return shard.gather(rows, tensor.shape[0])

    def _over_rows(self, count: int, begin: Callable[[Batch], None], *, gradients: bool) -> None:
        rows, world, model = self.rows, self.engine.world, self.model
        assert rows is not None
        shares = source_shares(self.recipe.data, [source.rows for source in rows.sources])
        order = RowOrder(rows.n_examples, self.recipe.train.seed, shares)
        rows, examples = rows.at(order.rows(0, min(count, order.epoch_rows)))
        ids = rows.rows_of(examples)
        # One at a time: what a row makes of a layer then depends on no other row.
        mine = assign(ids, rows.lengths, world_size=world.size, micro_batch_size=1)[world.rank]
        config: Any = architectures.bare_model(self.peft).config
        pad_id = None if rows.class_ids is None else architectures.pad_id(config)
        trained = [one for one in self.peft.parameters() if one.requires_grad]
        model.eval()
        if gradients:
            for module in model.modules():  # these compute again in training mode alone
                module.training = bool(getattr(module, "gradient_checkpointing", False))
        with wait("reading rows for the start of the adapters", total=len(mine)) as bar:
            for some in mine:
                batch = pack(rows, some, packing=False, pad_id=pad_id).to(world.device)
                begin(batch)
                with torch.set_grad_enabled(gradients):
                    with autocast(world.device, self.compute_dtype):
                        nll = model(batch).nll
                    if gradients:
                        self.engine.backward(nll.sum() / max(1, batch.targets.numel()))
                for parameter in trained:
                    parameter.grad = None
                bar.advance()
        model.eval()
