"""The optimizer that a recipe names, over the flat adapter of an engine."""

from peft_dist.common.errors import RecipeError
from peft_dist.config.recipe import Train
from peft_dist.optim.muon import MuonOptimizer
from peft_dist.optim.optimizer import AdapterOptimizer, make_adamw
from peft_dist.sharding.engine import Engine


def make_optimizer(engine: Engine, train: Train) -> AdapterOptimizer:
    """Return what updates the adapter from its gradients. Collective."""
    flat = engine.flat_parameters()
    if train.optimizer == "muon":
        return MuonOptimizer(flat, engine.group_shapes(), train)
    return engine.share_optimizer(make_adamw(flat, train))


def refuse_muon(train: Train, strategy: str) -> None:
    """Refuse Muon where DeepSpeed shares the optimizer out.

    Raises:
        RecipeError: Naming the strategy, which may be the launcher's.
    """
    if train.optimizer == "muon" and strategy in ("zero2", "zero3"):
        raise RecipeError(
            f"muon needs whole matrices, which {strategy} shares out in pieces",
            where="train.optimizer",
            remedy="set parallel.strategy: ddp or fsdp, or optimizer: adamw",
        )
