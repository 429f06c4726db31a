"""The trainings that the tests of DeepSpeed and of offload compare, and the worker that runs them.

`python zero_cases.py FOLDER`, alone or under torchrun; nothing is asserted here.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.collectives import gather_objects
from peft_dist.distributed.world import World, read_world
from peft_dist.model import fill_base
from peft_dist.model.architectures import transformer_blocks
from peft_dist.model.nf4 import FrozenLinear4bit
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.sharding import deepspeed_zero
from peft_dist.trainer import Trainer
from tests.equivalence.cases import DDP, FSDP, SINGLE, ZERO2, ZERO3, Case, run_cases
from tests.tiny import tiny_recipe

NF4, NONE = {"quantization": "nf4"}, {"quantization": "none"}
EVERYWHERE = (SINGLE, DDP, FSDP, ZERO2, ZERO3)
# AdamW divides a gradient by its size, and so hides a factor that all gradients have. With an
# epsilon of one the update is near the gradient, and the factor shows.
LINEAR = {"epsilon": 1.0, "learning_rate": 1.0, "warmup_fraction": 0.0, "schedule": "constant"}
CLIPPED_AT = (0.0, 0.01, 100.0)


def _decayed(method: dict[str, Any]) -> dict[str, Any]:
    return NF4 | {"method": method, "train": {"weight_decay": 0.1}}


CASES = {
    "kept-nf4": Case("llama", (DDP, FSDP, ZERO3), NF4, steps=10),
    "dora-nf4": Case("qwen2", (DDP, ZERO3), NF4 | {"method": {"dora": True, "bias": "all"}}),
    "conv1d": Case("gpt2", (DDP, ZERO3), NONE),
    "head": Case("bert", (DDP, ZERO2, ZERO3), NF4),
    "odd": Case("odd", (FSDP, ZERO2, ZERO3), NF4 | {"method": {"rank": 3}}),
    "bfloat16": Case("llama", (DDP, ZERO3), NF4 | {"model": {"dtype": "bfloat16"}}),
    "idle-rank": Case("llama", (DDP, ZERO3), NF4 | {"train": {"global_batch_size": 1}}),
    "accumulated": Case("llama", (DDP, ZERO3), NF4 | {"train": {"micro_batch_size": 2}}),
    "matrices-decay": Case("llama", (DDP, ZERO2, ZERO3), _decayed({"kind": "lora"})),
    "vectors-decay": Case(
        "gpt2", (DDP, ZERO2, ZERO3), _decayed({"kind": "bitfit", "targets": ["mlp"]})
    ),
    **{
        f"clipped-at-{norm:g}": Case(
            "llama", EVERYWHERE, NONE | {"train": LINEAR | {"max_grad_norm": norm}}, steps=1
        )
        for norm in CLIPPED_AT
    },
    "offloaded": Case("llama", (FSDP, ZERO3), NF4 | {"parallel": {"offload": "cpu"}}, steps=10),
}


def main(folder: Path) -> None:
    """Run every case that belongs to this number of processes."""
    world = read_world()
    process_group.start(world)
    saved = {(name, engine) for name, case in CASES.items() for engine in case.engines}
    run_cases(folder, CASES, world, saved)
    if world.size > 1:
        for what, watch in (("load", watch_a_load), ("training", watch_a_training)):
            facts = gather_objects(watch(folder, world))
            if world.is_main:
                (folder / f"{what}.json").write_text(json.dumps(facts), encoding="utf-8")
    process_group.stop()


def watch_a_load(folder: Path, world: World) -> dict[str, Any]:
    """Load a base under zero3; return what stood whole meanwhile, and what the engine gives."""
    most = {"made": 0, "filled": 0}
    parameters: list[nn.Parameter] = []
    materialize, copy_into = fill_base.materialize, deepspeed_zero.ZeRO3Engine.copy_into

    def whole_bytes() -> int:
        return sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)

    def watched_materialize(
        model: nn.Module, device: torch.device, make: Callable[[nn.Parameter], nn.Parameter]
    ) -> None:
        def watched(parameter: nn.Parameter) -> nn.Parameter:
            parameters.append(make(parameter))
            most["made"] = max(most["made"], whole_bytes())
            return parameters[-1]

        materialize(model, device, watched)

    def watched_put(
        engine: deepspeed_zero.ZeRO3Engine, parameter: nn.Parameter, value: torch.Tensor
    ) -> None:
        copy_into(engine, parameter, value)
        most["filled"] = max(most["filled"], whole_bytes())

    fill_base.materialize, deepspeed_zero.ZeRO3Engine.copy_into = watched_materialize, watched_put  # type: ignore
    try:
        recipe = tiny_recipe(
            folder / "models" / "odd", folder / "completion.jsonl", parallel={"strategy": "zero3"}
        )
        setup = set_up_model(recipe, world, find_base(recipe, folder / "cache-load"))
    finally:
        fill_base.materialize, deepspeed_zero.ZeRO3Engine.copy_into = materialize, copy_into  # type: ignore[method-assign]
    returned = {}
    for name, parameter in setup.base.items():
        whole = setup.engine.full_tensor(parameter).clone()
        setup.engine.copy_into(parameter, whole.flip(0))
        returned[name] = torch.equal(setup.engine.full_tensor(parameter).flip(0), whole)
    return {
        **most,
        "tensors": len(parameters),
        "returned": all(returned.values()),
        "adapter_is_whole": all(p.numel() > 0 for p in setup.adapter.values()),
        "listed_by_peft": sum(p.requires_grad for p in setup.peft.parameters()),
        "trained": len(setup.adapter),
    }


def watch_a_training(folder: Path, world: World) -> dict[str, Any]:
    """Train under zero3 as on a model too large to keep; return what stood whole in each block."""
    config = deepspeed_zero._config
    at_once = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    deepspeed_zero._config = lambda section: config(
        section | (at_once if section["stage"] == 3 else {})
    )
    try:
        recipe = tiny_recipe(
            folder / "models" / "llama",
            folder / "completion.jsonl",
            parallel={"strategy": "zero3"},
            train={"steps": 4, "global_batch_size": 8, "micro_batch_size": 2},
        )
        setup = set_up_model(recipe, world, find_base(recipe, folder / "cache-load"))
        blocks = list(transformer_blocks(setup.peft.get_base_model()).values())
        elsewhere: list[int] = []
        here: list[int] = []

        def whole_bytes(block: nn.Module) -> int:
            frozen = (p for p in block.parameters() if not p.requires_grad)
            return sum(p.numel() * p.element_size() for p in frozen)

        def look(block: nn.Module) -> None:
            elsewhere.append(sum(whole_bytes(other) for other in blocks if other is not block))

        def look_inside(layer: FrozenLinear4bit) -> None:
            here.append(layer.packed.numel())

        for block in blocks:
            block.register_forward_hook(lambda block, *_: look(block))
            block.register_full_backward_hook(lambda block, *_: look(block))
            for layer in block.modules():
                if isinstance(layer, FrozenLinear4bit):
                    layer.register_forward_hook(lambda layer, *_: look_inside(layer), prepend=True)
        rows = tokenize_rows(recipe, "train", folder / "cache-load" / "rows")
        Trainer(setup, rows, None).run()
    finally:
        deepspeed_zero._config = config
    left = sum(p.numel() for p in setup.base.values())
    return {"looks": len(elsewhere), "elsewhere": max(elsewhere), "here": min(here), "left": left}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a worker ends: gloo can abort in the interpreter's teardown
