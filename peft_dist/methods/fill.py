"""Give every parameter of a sharded model its values: from the files, or by the run's seed."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from peft_dist.methods.base_access import HoldsBase
from peft_dist.methods.init import generator_for
from peft_dist.methods.method import base_name_in
from peft_dist.model import architectures, fill_base
from peft_dist.model.plan import BasePlan
from peft_dist.model.source import BaseSource


def frozen_and_trained(
    peft: PeftModel,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Return a model's parameters by name: those of the base, and those that are trained."""
    frozen: dict[str, nn.Parameter] = {}
    trained: dict[str, nn.Parameter] = {}
    for name, parameter in peft.named_parameters():
        (trained if parameter.requires_grad else frozen)[name] = parameter
    return frozen, trained


def fill_from_files(
    peft: PeftModel,
    frozen: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    plan: BasePlan,
    source: BaseSource,
    engine: HoldsBase,
    of_base: set[str],
) -> Path | None:
    """Fill every parameter that the files hold; return the cache entry that holds them, if any.

    Of these some may be trained: biases, and the trained copy of a head. Collective.
    """
    # Of a head and its trained copy, both have one name in the files; the frozen one is filled.
    by_name = {base_name_in(peft, name): p for name, p in {**trained, **frozen}.items()}
    packed = source.fill(
        by_name, plan, engine.shard, world=engine.world, copy_into=engine.copy_into
    )
    filled = {name for tensor in plan.tensors for name in tensor.parameters()} | set(plan.fresh)
    if unfilled := sorted(of_base.intersection(by_name) - filled):
        raise AssertionError(f"{unfilled[0]} is what was in memory: a tie is lost")
    for name, parameter in trained.items():
        twin = by_name.get(base_name_in(peft, name))
        if twin is not None and twin is not parameter:
            fill_base.copy_rows(parameter, engine.full_tensor(twin))
    return packed


def fill_fresh_heads(
    parameters: dict[str, nn.Parameter],
    plan: BasePlan,
    peft: PeftModel,
    engine: HoldsBase,
    *,
    seed: int,
) -> None:
    """Fill the heads that the checkpoint lacks. Collective."""
    std = getattr(architectures.bare_model(peft).config, "initializer_range", 0.02)
    for name, parameter in parameters.items():
        plain = base_name_in(peft, name)
        if plain in plan.fresh:
            full = torch.zeros(engine.shape(parameter))
            if full.dim() > 1:
                full.normal_(std=std, generator=generator_for(seed, plain))
            engine.copy_into(parameter, full)
