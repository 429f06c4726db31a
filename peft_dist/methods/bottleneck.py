"""Bottleneck adapters as a method of PEFT: a small network after, or beside, a sub-layer.

Houlsby et al. 2019 (arXiv 1902.00751) put one after attention and one after the feed-forward,
Pfeiffer et al. 2020 (arXiv 2005.00052) the latter alone, and He et al. 2021 (arXiv 2110.04366) one
beside the feed-forward. All of them act before the skip connection is added. They are not linear,
so they cannot be merged.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import RecipeError
from peft_dist.config.method import Bottleneck
from peft_dist.methods.init import assign, generator_for
from peft_dist.methods.method import TASKS, BaseAccess, Method, inject
from peft_dist.methods.register import register
from peft_dist.methods.tuner import PlacedTuner
from peft_dist.model.architectures import transformer_blocks

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
ATTENTION_OUTPUTS = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "attn.c_proj",
    "attention.output.dense",
    "attention.dense",
)
"""Names inside a block of the linear that ends attention."""
FEED_FORWARDS = {
    "mlp.down_proj": ("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.c_fc",),
    "mlp.dense_4h_to_h": ("mlp.dense_h_to_4h",),
    "fc2": ("fc1",),
    "output.dense": ("intermediate.dense",),
}
"""Names inside a block of the linear that ends the feed-forward, and of those that begin it."""


@dataclass
class BottleneckConfig(PeftConfig):
    """Where bottleneck adapters go and what they are; the fields are as in the recipe.

    Attributes:
        placement: houlsby, pfeiffer or parallel.
        bottleneck_size: Width inside an adapter; None: hidden size / reduction_factor.
        reduction_factor: Hidden size over width.
        activation: relu, gelu, silu or tanh.
        residual: Whether an adapter adds to what it reads, or replaces it.
        dropout: Probability of dropping a value inside the bottleneck.
        modules_to_save: Modules that are trained whole beside the adapters, such as a new head.
    """

    placement: str = "houlsby"
    bottleneck_size: int | None = None
    reduction_factor: int = 16
    activation: str = "relu"
    residual: bool = True
    dropout: float = 0.0
    modules_to_save: list[str] | None = None

    target_modules: ClassVar[None] = None
    """PEFT asks for it; the placement takes its place."""

    def __post_init__(self) -> None:
        """Check the names, which a file may hold."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # it is PEFT's
        self.peft_type = PeftType("BOTTLENECK")
        for field, value, valid in (
            ("placement", self.placement, PLACEMENTS),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in valid:
                raise ValueError(f"{field}: unknown {value!r}; valid: {', '.join(valid)}")
        if self.placement == "parallel" and not self.residual:
            raise ValueError("residual: cannot be off with placement parallel; leave it on")

    def width(self, hidden: int) -> int:
        """Return the width inside an adapter for a hidden size."""
        return self.bottleneck_size or max(1, hidden // self.reduction_factor)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """The linear that ends a sub-layer, with an adapter on its output y [..., hidden].

    The result is y + up(act(down(s))), where s is y itself or, with placement parallel, the input
    of the feed-forward; without residual it is up(act(down(y))).
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_inner", "settings")

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a linear, without any adapter yet."""
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_inner = nn.ModuleDict()
        self.settings: dict[str, BottleneckConfig] = {}
        self.merged_adapters: list[str] = []
        self._entered: torch.Tensor | None = None
        self._hook: Any = None

    def add(self, name: str, config: BottleneckConfig, first: nn.Module | None) -> None:
        """Add an adapter as `start` fills it.

        Args:
            name: The adapter's.
            config: Its settings.
            first: The linear whose input it reads, with placement parallel.
        """
        base: Any = self.get_base_layer()
        hidden = base.nf if isinstance(base, Conv1D) else base.out_features
        width = config.width(hidden)
        self.bottleneck_down[name] = nn.Linear(hidden, width)
        self.bottleneck_up[name] = nn.Linear(width, hidden)
        self.bottleneck_inner[name] = nn.Sequential(
            ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)
        )
        self.settings[name] = config
        self.start(name)
        if first is not None and self._hook is None:
            self._hook = first.register_forward_pre_hook(self._enter)
        self._move_adapter_to_device_of_base_layer(name)

    def start(self, name: str, generator: torch.Generator | None = None) -> None:
        """Fill an adapter: down Kaiming-uniform, up and the biases zero.

        So the first output is the base's or, without residual, nothing but the skip connection.
        """
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        weight = down.get_parameter("weight")
        values = torch.empty(weight.shape)
        assign(weight, nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator))
        # By name, for under ZeRO-3 `up.parameters()` is empty by now.
        for layer, which in ((down, "bias"), (up, "weight"), (up, "bias")):
            parameter = layer.get_parameter(which)
            assign(parameter, torch.zeros(parameter.shape))

    def _enter(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        # Recomputing a checkpointed block passes here again, so both times the adapter reads what
        # its own pass has made.
        self._entered = args[0]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x [..., in] to [..., hidden]; several active adapters act one after the other."""
        entered, self._entered = self._entered, None
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.settings:
                settings = self.settings[name]
                source = entered if settings.placement == "parallel" else y
                assert source is not None, name
                change = self._adapter(name, source).to(y.dtype)
                y = y + change if settings.residual else change
        return y

    def _adapter(self, name: str, source: torch.Tensor) -> torch.Tensor:
        down: Any = self.bottleneck_down[name]  # a linear
        if not torch.is_autocast_enabled(source.device.type):
            source = source.to(down.weight.dtype)
        change: torch.Tensor = self.bottleneck_up[name](self.bottleneck_inner[name](down(source)))
        return change

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse."""
        raise ValueError(
            "a bottleneck adapter is not linear and cannot be merged into the base; "
            "keep it beside the base, or train method lora"
        )

    def unload_and_optionally_merge_module(self, *, merge: bool, **_: Any) -> nn.Module:
        """Return the bare linear; PEFT calls it to take the adapters off."""
        if merge:
            self.merge()
        if self._hook is not None:
            self._hook.remove()
        return self.get_base_layer()


class BottleneckModel(PlacedTuner):
    """A model with bottleneck adapters, as PEFT makes it from a `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    _places: dict[str, str | None]

    def find_places(
        self, config: BottleneckConfig, model: PreTrainedModel
    ) -> dict[str, str | None]:
        """Return the linears that get an adapter; see the function of this name."""
        return find_places(model, config.placement)

    def add(
        self, layer: BottleneckLayer, adapter_name: str, config: BottleneckConfig, key: str
    ) -> None:
        """Add an adapter behind a linear."""
        reads = self._places[key]
        layer.add(adapter_name, config, None if reads is None else self.model.get_submodule(reads))


def find_places(model: PreTrainedModel, placement: str) -> dict[str, str | None]:
    """Return the linears that get an adapter, each with the one whose input the adapter reads.

    That is None for an adapter that reads the output of its own linear.

    Raises:
        RecipeError: For a block without parts of the known names.
    """
    wrapped: dict[str, str | None] = {}
    for block_name, block in transformer_blocks(model).items():
        inside = {name for name, _ in block.named_modules()}
        if placement == "houlsby":
            attention = _present(ATTENTION_OUTPUTS, inside, block_name, "attention output")
            wrapped[f"{block_name}.{attention}"] = None
        last = _present(tuple(FEED_FORWARDS), inside, block_name, "feed-forward output")
        first = None
        if placement == "parallel":
            first = _present(FEED_FORWARDS[last], inside, block_name, "feed-forward input")
        wrapped[f"{block_name}.{last}"] = first and f"{block_name}.{first}"
    return wrapped


def _present(names: tuple[str, ...], inside: set[str], block_name: str, what: str) -> str:
    for name in names:
        if name in inside:
            return name
    raise RecipeError(
        f"no {what} was found in {block_name}, where {', '.join(names)} were looked for",
        where="method.placement",
        remedy="use method lora, which adapts any linear",
    )


class BottleneckMethod(Method[Bottleneck]):
    """Small networks after, or beside, the sub-layers of each block."""

    def attach(
        self, model: PreTrainedModel, *, task: str, base_name: str, has_conv1d: bool
    ) -> PeftModel:
        """Inject the adapters; see `Method.attach`."""
        settings = self.settings
        config = BottleneckConfig(
            task_type=TASKS[task],
            placement=settings.placement,
            bottleneck_size=settings.bottleneck_size,
            reduction_factor=settings.reduction_factor or BottleneckConfig.reduction_factor,
            activation=settings.activation,
            residual=settings.residual,
            dropout=settings.dropout,
        )
        return inject(model, config, base_name=base_name)

    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Fill every adapter from the seed and its name; see `BottleneckLayer.start`."""
        for module_name, module in peft.named_modules():
            if isinstance(module, BottleneckLayer):
                for adapter in module.bottleneck_down:
                    name = f"{module_name}.bottleneck_down"
                    module.start(adapter, generator_for(self.seed, name))


register("bottleneck", BottleneckConfig, BottleneckModel)
