"""The first values of a LoRA's factors: from the seed, from weights, or from training rows."""

import math
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import RecipeError
from peft_dist.config.method import Lora
from peft_dist.methods.init import generator_for
from peft_dist.methods.lora_starts import (
    Factors,
    along_gradient,
    first_of_qr,
    lost_part,
    main_inputs,
    principal_part,
    weighed_part,
)
from peft_dist.methods.method import BaseAccess, base_name_in
from peft_dist.methods.row_statistics import Kind, NamedLayer, over_rows
from peft_dist.model.nf4 import FrozenLinear4bit, dequantize

SEEDED = ("default", "gaussian", "orthogonal")
"""Starts that depend on the seed alone."""
_STATISTICS: dict[str, Kind] = {
    "eva": "covariance",
    "corda": "moment",
    "corda_kpm": "moment",
    "lora_ga": "gradient",
}
"""What each start from rows is computed from."""


class InitialFactors:
    """What A and B of every layer start as."""

    def __init__(self, settings: Lora, seed: int, start: BaseAccess) -> None:
        """Take the recipe's method section, the run's seed and the loaded base."""
        self._settings, self._seed, self._start = settings, seed, start

    def seeded(self, name: str, module: LoraLayer) -> Factors:
        """Return A [r, in] and B [out, r] whose product is zero."""
        a = torch.empty(module.lora_A["default"].get_parameter("weight").shape)
        b = torch.zeros(module.lora_B["default"].get_parameter("weight").shape)
        rank = module.r["default"]  # of experts A has that many rows for each
        source = generator_for(self._seed, f"{name}.lora_A")
        if self._settings.init not in ("gaussian", "orthogonal"):
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=source)
        elif self._settings.init == "gaussian":
            a.normal_(std=1 / rank, generator=source)
        else:
            # Rows of an orthogonal matrix: those A is made of are orthogonal to those of B.
            basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=source))
            a = (torch.randn(a.shape[1], rank // 2, generator=source) @ basis[0::2]).t() / 10
            b = torch.randn(b.shape[0], rank // 2, generator=source) @ basis[1::2] / 10
        return Factors(a, b)

    def computed(self, peft: PeftModel) -> Iterator[tuple[str, LoraLayer, Factors]]:
        """Yield each layer with what `init` computes; nothing where the seed decides. Collective.

        Without training rows, the seed decides what would start from them.
        """
        init, layers, start = self._settings.init, layers_of(peft), self._start
        if init in SEEDED:
            return
        if init not in _STATISTICS:
            for name, module in layers:
                yield name, module, self._of_weight(name, module, base_name_in(peft, name))
        elif start.over_rows is not None:
            (_, first), *_ = layers
            found = over_rows(
                layers,
                _STATISTICS[init],
                start.over_rows,
                rows=self._settings.init_rows,
                device=first.lora_A["default"].get_parameter("weight").device,
            )
            for name, module, statistic in found:
                yield name, module, self._of_rows(name, module, statistic)
        else:
            for name, module in layers:
                yield name, module, self.seeded(name, module)

    def _of_weight(self, name: str, module: LoraLayer, base_name: str) -> Factors:
        """Return a part of a weight, or of what the base lacks of it. Collective."""
        weight, rank = weight_of(module, self._start), module.r["default"]
        scaling, seed = module.scaling["default"], self._seed_of(name)
        if self._settings.init == "olora":
            return first_of_qr(weight, rank)
        if self._settings.init == "pissa":
            return principal_part(weight, rank, scaling, seed)
        if not isinstance(module.get_base_layer(), FrozenLinear4bit):  # no whole blocks in its rows
            return self.seeded(name, module)
        full = self._start.stored_weight(f"{base_name}.weight")
        return lost_part(full - weight, rank, scaling, seed)

    def _of_rows(self, name: str, module: LoraLayer, statistic: torch.Tensor) -> Factors:
        """Return the start that a statistic over rows gives. Collective."""
        init, rank, seed = self._settings.init, module.r["default"], self._seed_of(name)
        if init == "eva":
            b = module.lora_B["default"].get_parameter("weight")
            return Factors(main_inputs(statistic, rank, seed), torch.zeros_like(b))
        if init == "lora_ga":
            return along_gradient(statistic, rank, seed)
        weight, scaling = weight_of(module, self._start), module.scaling["default"]
        least = init == "corda_kpm"
        return weighed_part(weight, statistic, rank, scaling, least=least, name=name)

    def _seed_of(self, name: str) -> int:
        return generator_for(self._seed, name).initial_seed()


def check_ranks(peft: PeftModel, settings: Lora) -> None:
    """Refuse a rank that a layer has not so many directions for as its start takes.

    Raises:
        RecipeError: Naming the layer.
    """
    init = settings.init
    if init in SEEDED:
        return
    times = 2 if init == "lora_ga" else 1
    for name, module in layers_of(peft):
        columns, out = module.in_features, module.out_features
        assert columns is not None and out is not None, name
        most = (columns if init == "eva" else min(columns, out)) // times
        if module.r["default"] > most:
            raise RecipeError(
                f"init: {init} takes a rank of at most {most} for {name}",
                where="method.rank",
                remedy="lower it, or choose another init",
            )


def layers_of(peft: PeftModel) -> list[NamedLayer]:
    """Return the layers that have a LoRA, by name."""
    return [
        (name, module) for name, module in peft.named_modules() if isinstance(module, LoraLayer)
    ]


def weight_of(module: LoraLayer, start: BaseAccess) -> torch.Tensor:
    """Return a linear's weight [out, in], float32. Collective where the layer is sharded."""
    layer = module.get_base_layer()
    if isinstance(layer, FrozenLinear4bit):
        return _dequantized(layer, start, torch.float32)
    stored = start.full_tensor(layer.get_parameter("weight"))
    return (stored.t() if isinstance(layer, Conv1D) else stored).float()


def row_norms(layer: nn.Module, start: BaseAccess) -> torch.Tensor:
    """Return the norm of every weight row. Collective where the layer is sharded."""
    if isinstance(layer, FrozenLinear4bit):
        weight = _dequantized(layer, start, layer.dtype)
    else:
        weight = start.full_tensor(layer.get_parameter("weight"))
    norms: torch.Tensor = weight.float().norm(dim=1)
    return norms


def _dequantized(layer: FrozenLinear4bit, start: BaseAccess, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(
        start.full_tensor(layer.packed),
        start.full_tensor(layer.absmax),
        block_size=layer.block_size,
        dtype=dtype,
    )
