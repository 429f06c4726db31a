"""DeepSpeed ZeRO: stage 2 shards the optimizer of the adapter, stage 3 the frozen base as well.

The adapter itself stays what it is on every engine: whole, in one flat buffer that DeepSpeed does
not know. `deepspeed` is imported when an engine is made, which costs seconds.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from peft_dist.common.errors import LaunchError, TrainingError
from peft_dist.distributed.collectives import Shard
from peft_dist.distributed.world import World
from peft_dist.model import fill_base
from peft_dist.optim.optimizer import AdapterOptimizer
from peft_dist.sharding.ddp import DDPEngine
from peft_dist.sharding.engine import Engine
from peft_dist.sharding.zero_optimizer import Flat, SharedOptimizer

SUPPORTED = "0.19"
"""The DeepSpeed whose behaviour this module is written for and tested with."""
_REUSE_ELEMENTS = 50_000_000
"""A gathered parameter stays until its next use where that many elements or fewer come between,
as when a block is recomputed and then differentiated; DeepSpeed's default, 1e9, would keep a small
model whole."""


def require_deepspeed() -> None:
    """Refuse a missing or unknown DeepSpeed, without importing it.

    Raises:
        LaunchError: With the command that installs it.
    """
    try:
        found = version("deepspeed")
        problem = f"deepspeed {found} is not {SUPPORTED}, which this version works with"
    except PackageNotFoundError:
        found, problem = "", "deepspeed is not installed"
    if not found.startswith(f"{SUPPORTED}."):
        raise LaunchError(
            problem,
            where="parallel.strategy",
            remedy="pip install 'peft-dist[deepspeed]', or strategy: ddp or fsdp",
        )


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed for this process's device, without a word on standard output."""
    require_deepspeed()
    # DeepSpeed reads its place from the environment, also where no launcher has written one.
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    os.environ["DS_ACCELERATOR"] = world.device.type
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # An all-reduce in shared memory that serves inference alone; compiling it takes half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", verbose=False, dist_init_required=False
    )
    return deepspeed


def _config(zero: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # waits for the device twice a step
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        # Gradients come reduced and clipped (`Engine.clip`), so nothing may act on them again.
        # DeepSpeed's own default is to clip at 1.0.
        "gradient_clipping": 0.0,
        "gradient_accumulation_steps": 1,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
    }


def _initialize(deepspeed: Any, zero: dict[str, Any], **arguments: Any) -> Any:
    engine, *_ = deepspeed.initialize(config=_config(zero), dist_init_required=False, **arguments)
    if "optimizer" in arguments:
        _check_arithmetic(engine, arguments["optimizer"])
    return engine


def _check_arithmetic(engine: Any, optimizer: torch.optim.AdamW) -> None:
    """See that DeepSpeed passes gradients to our optimizer as they are.

    Raises:
        TrainingError: Naming the setting that the engine does not have as `_config` says.
    """
    shared = engine.optimizer
    held = {
        "gradient_clipping": (engine.gradient_clipping(), 0.0),
        "clip_grad": (shared.clip_grad, 0.0),
        "gradient_accumulation_steps": (engine.gradient_accumulation_steps(), 1),
        "prescale_gradients": (not engine.postscale_gradients(), False),
        "gradient_predivide_factor": (shared.gradient_predivide_factor, 1.0),
        "communication_data_type": (shared.communication_data_type, torch.float32),
        "loss_scale": (shared.loss_scale, 1.0),
        "optimizer": (shared.optimizer, optimizer),
    }
    for name, (found, wanted) in held.items():
        if found is not wanted and found != wanted:
            raise TrainingError(
                f"DeepSpeed has {name} {found}, but {wanted} was set",
                where="parallel.strategy",
                remedy="choose ddp or fsdp, and please report this",
            )


class ZeRO2Engine(DDPEngine):
    """The whole base on every process, and the optimizer of the adapter shared by them."""

    def __init__(self, world: World, *, shard_size: int, offload: bool = False) -> None:
        """Start DeepSpeed beside the process group there is."""
        super().__init__(world, shard_size=shard_size, offload=offload)
        self._deepspeed = _import_deepspeed(world)

    def share_optimizer(self, optimizer: torch.optim.AdamW) -> AdapterOptimizer:
        """Give the optimizer to ZeRO stage 2. Collective."""
        return _share_optimizer(self._deepspeed, optimizer, self.world)


class ZeRO3Engine(Engine):
    """The base in equal pieces over all processes, gathered by DeepSpeed module by module.

    A piece is so many elements of the flattened tensor, whatever its rows; the last is padded.
    """

    sharded = True

    def __init__(self, world: World, *, shard_size: int, offload: bool = False) -> None:
        """Start DeepSpeed beside the process group there is."""
        super().__init__(world, shard_size=shard_size, offload=offload)
        self._deepspeed = _import_deepspeed(world)
        self.shard = Shard(world.rank, world.size)
        self._zero: dict[str, Any] = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # small tensors are sharded as well
            "stage3_max_reuse_distance": _REUSE_ELEMENTS,
            "memory_efficient_linear": False,  # it would replace torch's own linear everywhere
        }
        if offload:
            on_gpu = world.device.type == "cuda"
            self._zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}

    def wrap(
        self, model: nn.Module, blocks: Iterable[nn.Module], adapter: Iterable[nn.Parameter]
    ) -> None:
        """Note the blocks; DeepSpeed partitions only parameters that have memory."""
        self._in_blocks = {module for block in blocks for module in block.modules()}

    def materialize(self, model: nn.Module) -> None:
        """Make each parameter of the base whole, part it and free the whole, one at a time."""
        first: list[Any] = []

        def make(parameter: nn.Parameter) -> nn.Parameter:
            empty = torch.empty_like(parameter, device=self.world.device)
            made = nn.Parameter(empty, parameter.requires_grad)
            if made.requires_grad:
                return made
            if first:
                first[0].convert_to_zero_parameters([made])
            else:
                first.append(made)
                config = _config(self._zero)
                self._deepspeed.zero.Init(nn.ParameterList(first), config_dict_or_path=config)
            return made

        fill_base.materialize(model, self.world.device, make)
        _list_frozen_alone(model, self._in_blocks)
        # What stands outside the blocks (embedding, last norm, head) is gathered with the model,
        # as one unit: a rank without work would else miss the exchange for a head it never reads.
        for module in model.modules():
            if module not in self._in_blocks:
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        self._deepspeed.zero.register_external_parameter(model, parameter)
        self._hooks = _initialize(self._deepspeed, self._zero, model=model)
        coordinator = self._hooks.optimizer.get_param_coordinator()
        coordinator.fetch_sub_module = self.compute_timer.gathering()(coordinator.fetch_sub_module)

    def share_optimizer(self, optimizer: torch.optim.AdamW) -> AdapterOptimizer:
        """Give the optimizer to ZeRO stage 2. Collective."""
        return _share_optimizer(self._deepspeed, optimizer, self.world)

    def backward(self, loss: torch.Tensor) -> None:
        """Go back from a loss that is part of no step; nothing is left gathered."""
        super().backward(loss)
        self._hooks.optimizer.release_backward_leftovers()

    def reduce(self, extras: torch.Tensor) -> torch.Tensor:
        """Sum gradients and extras; what backward left gathered is freed. Collective."""
        # DeepSpeed frees a module when the gradient of its input is there; ids have none.
        self._hooks.optimizer.release_backward_leftovers()
        return super().reduce(extras)

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Return the shape of a parameter of the base."""
        return getattr(parameter, "ds_shape", parameter.shape)

    def _partition(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Return this process's piece, padding and all; None for a parameter that is not parted."""
        held: torch.Tensor | None = getattr(parameter, "ds_tensor", None)
        return held

    def is_shard(self, parameter: nn.Parameter) -> bool:
        """Whether DeepSpeed holds a piece of the parameter, and nobody the whole."""
        return self._partition(parameter) is not None and parameter.numel() == 0

    def local_elements(self, parameter: nn.Parameter) -> tuple[torch.Tensor, int]:
        """Return this process's elements of a parameter, without padding, and the first's place."""
        held, size = self._partition(parameter), self.shape(parameter).numel()
        assert held is not None, "the adapter is no part of the base"
        first = min(held.numel() * self.shard.index, size)
        return held.detach()[: size - first], first

    def full_tensor(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter of the base whole, on the device. Collective."""
        held = self._partition(parameter)
        if held is None:
            return parameter.detach()
        flat = self.shard.gather(held.to(self.world.device), held.numel() * self.shard.count)
        shape = self.shape(parameter)
        return flat[: shape.numel()].view(shape)

    def copy_into(self, parameter: nn.Parameter, value: torch.Tensor) -> None:
        """Write a whole tensor into a parameter, or this process's piece of it."""
        if self._partition(parameter) is None:
            super().copy_into(parameter, value)
            return
        mine, first = self.local_elements(parameter)
        mine.copy_(value.reshape(-1)[first : first + mine.numel()])

    def expected_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of the base this process should hold, padding among them."""
        pieces = (-(-self.shape(p).numel() // self.shard.count) for p in parameters.values())
        return sum(n * p.element_size() for n, p in zip(pieces, parameters.values(), strict=True))

    def resident_bytes(self, parameters: dict[str, nn.Parameter]) -> int:
        """Return the bytes of the base this process does hold, padding among them."""
        total = 0
        for parameter in parameters.values():
            held = self._partition(parameter)
            assert held is not None, "the adapter is no part of the base"
            total += (held.numel() + parameter.numel()) * parameter.element_size()
        return total


def _share_optimizer(
    deepspeed: Any, optimizer: torch.optim.AdamW, world: World
) -> AdapterOptimizer:
    """Give an optimizer over flat parameters, which have gradients, to ZeRO stage 2."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    targets, gradients = [p.detach() for p in own], [p.grad for p in own]
    for parameter in own:
        parameter.grad = None  # DeepSpeed's own backward makes one
    flat = Flat(own, gradients)
    # By default gradients pass through a buffer of gigabytes, beside an adapter of megabytes.
    size = sum(parameter.numel() for parameter in own)
    zero: dict[str, Any] = {"stage": 2, "reduce_bucket_size": size}
    if "compute_grad_norm" in deepspeed.runtime.zero.config.DeepSpeedZeroConfig.model_fields:
        zero["compute_grad_norm"] = False  # the host would wait for it, in every step
    engine = _initialize(deepspeed, zero, model=flat, optimizer=optimizer)
    return SharedOptimizer(engine, flat.values, targets, Shard(world.rank, world.size))


def _list_frozen_alone(model: nn.Module, in_blocks: set[nn.Module]) -> None:
    """Let the model and its modules list no parameter that is trained.

    DeepSpeed's hooks ask each module for its parameters at every pass and free them after it; it
    offers no way to leave one out. Walks from elsewhere, such as PEFT's, still find them all.
    """

    def listed(module: nn.Module) -> Callable[..., Iterator[tuple[str, nn.Parameter]]]:
        everything = module.named_parameters

        def named_parameters(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            return (pair for pair in everything(*args, **kwargs) if not pair[1].requires_grad)

        return named_parameters

    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        # It asks a layer with experts for all that is inside (`deepspeed.utils.z3_leaf_module`).
        inside = list(module.parameters()) if module in in_blocks else own
        if module is model or any(parameter.requires_grad for parameter in inside):
            module.named_parameters = listed(module)  # type: ignore[method-assign]
