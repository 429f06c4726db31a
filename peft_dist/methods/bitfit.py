"""BitFit as a method of PEFT: the biases alone are trained.

The method is that of Ben Zaken et al. 2022 (arXiv 2106.10199). A bias b stays frozen and its
change c, zero at the start, is trained: the output has b + c. The gradient of c is that of b, so
AdamW without decay moves b + c exactly as it would have moved b, while the base stays as it was
released and the file holds what was learned.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.method import BitFit
from peft_dist.methods.init import assign
from peft_dist.methods.method import TASKS, BaseAccess, Method, inject
from peft_dist.methods.register import register
from peft_dist.methods.tuner import PlacedTuner
from peft_dist.model.architectures import transformer_blocks
from peft_dist.model.nf4 import FrozenLinear4bit

_LINEAR = (nn.Linear, Conv1D, FrozenLinear4bit)


@dataclass
class BitFitConfig(PeftConfig):
    """Whose bias is trained; the fields are as in the recipe.

    Attributes:
        targets: Parts of the names of layers inside the blocks, or "all".
        add_bias: Whether linears without a bias get one.
        modules_to_save: Modules that are trained whole beside the biases, such as a new head.
    """

    targets: str | list[str] = "all"
    add_bias: bool = False
    modules_to_save: list[str] | None = None

    target_modules: ClassVar[None] = None
    """PEFT asks for it; `targets` takes its place."""

    def __post_init__(self) -> None:
        """Check the targets, which a file may hold."""
        super().__post_init__()  # type: ignore[no-untyped-call]  # it is PEFT's
        self.peft_type = PeftType("BITFIT")
        if isinstance(self.targets, str) and self.targets != "all":
            raise ValueError(f"targets: {self.targets!r} is neither all nor a list of names")


class BitFitLayer(nn.Module, BaseTunerLayer):
    """A layer whose output [..., out] gets the trained change of its bias."""

    adapter_layer_names = ("bitfit_bias",)

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a layer, without any change yet."""
        super().__init__()
        self.base_layer = base_layer
        self.bitfit_bias = nn.ParameterDict()
        self.merged_adapters: list[str] = []

    def add(self, name: str, config: BitFitConfig) -> None:
        """Add a change of zeros, float32 [out]."""
        base: Any = self.get_base_layer()
        if base.bias is not None:
            size = base.bias.shape[0]
        else:
            size = base.nf if isinstance(base, Conv1D) else base.out_features
        self.bitfit_bias[name] = nn.Parameter(torch.zeros(size))
        self._move_adapter_to_device_of_base_layer(name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x as the layer does, and add the changes of the active adapters."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.bitfit_bias:
                y = y + self.bitfit_bias[name].to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse."""
        raise ValueError(
            "trained biases are not merged, as the base may have no place for them; "
            "keep them beside the base"
        )


class BitFitModel(PlacedTuner):
    """A model whose biases are trained, as PEFT makes it from a `BitFitConfig`."""

    prefix = "bitfit_"
    tuner_layer_cls = BitFitLayer

    def find_places(self, config: BitFitConfig, model: PreTrainedModel) -> set[str]:
        """Return the layers whose bias is trained; see the function of this name."""
        return find_places(model, config.targets, add_bias=config.add_bias)

    def add(self, layer: BitFitLayer, adapter_name: str, config: BitFitConfig, key: str) -> None:
        """Add a change to a layer's bias."""
        layer.add(adapter_name, config)


def find_places(model: PreTrainedModel, targets: str | list[str], *, add_bias: bool) -> set[str]:
    """Return the names of the layers inside the blocks whose bias is trained.

    Args:
        model: The base, or one with such layers already.
        targets: Parts of names, one or several joined by dots as in self_attn.q_proj, or "all".
        add_bias: Whether a linear without a bias counts.

    Raises:
        RecipeError: For a target that is part of no name, or of none with a bias.
    """
    looked_at: dict[str, list[tuple[str, bool]]] = {}
    for block_name, block in transformer_blocks(model).items():
        for name, module in block.named_modules():
            layer = module.get_base_layer() if isinstance(module, BitFitLayer) else module
            if isinstance(layer, (*_LINEAR, nn.LayerNorm)) and not name.endswith(".base_layer"):
                trainable = layer.bias is not None or (add_bias and isinstance(layer, _LINEAR))
                looked_at.setdefault(name, []).append((f"{block_name}.{name}", trainable))
    biased: set[str] = set()
    for target in (None,) if isinstance(targets, str) else targets:
        names = [name for name in looked_at if target is None or f".{target}." in f".{name}."]
        if target is not None and not names:
            raise RecipeError(
                f"{target!r} is part of no layer's name inside the blocks of this model",
                where="method.targets",
                remedy=nearest(target, {part for name in looked_at for part in name.split(".")}),
            )
        chosen = {full for name in names for full, trainable in looked_at[name] if trainable}
        if not chosen:
            last_parts = dict.fromkeys(name.rpartition(".")[2] for name in names)
            raise RecipeError(
                f"none of the layers {', '.join(last_parts)} has a bias to train",
                where="method",
                remedy="set method.add_bias: true, which gives the linears one of zeros",
            )
        biased |= chosen
    return biased


class BitFitMethod(Method[BitFit]):
    """The change of every chosen bias inside the blocks."""

    def attach(
        self, model: PreTrainedModel, *, task: str, base_name: str, has_conv1d: bool
    ) -> PeftModel:
        """Inject the changes; see `Method.attach`."""
        targets = self.settings.targets
        config = BitFitConfig(
            task_type=TASKS[task],
            targets=targets if isinstance(targets, str) else list(targets),
            add_bias=self.settings.add_bias,
        )
        return inject(model, config, base_name=base_name)

    def initialise(self, peft: PeftModel, start: BaseAccess) -> None:
        """Fill every change with zeros."""
        for module in peft.modules():
            if isinstance(module, BitFitLayer):
                for change in module.bitfit_bias.values():
                    assign(change, torch.zeros(change.shape))


register("bitfit", BitFitConfig, BitFitModel)
