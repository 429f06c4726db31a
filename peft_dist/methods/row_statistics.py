"""What a few training rows make of the layers that get a LoRA: sums that starts are computed from.

A hook adds up what passes a layer, on whichever process a row is computed; then all add up theirs.
Sums are float64, so that they hardly depend on how many processes there are. As they can be larger
than the layer itself, only so many layers are looked at in one pass over the rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from peft_dist.common.errors import RecipeError
from peft_dist.data.pack import Batch
from peft_dist.distributed.collectives import sum_over
from peft_dist.methods.method import RowPasses

BYTES_AT_ONCE = 2 << 30
"""Of sums on each process, in one pass over the rows; a layer that has more comes alone."""

Kind = Literal["covariance", "moment", "gradient"]
"""covariance: of the inputs at trained tokens. moment: mean over rows of the products of all of a
row's inputs, over its largest. gradient: mean over rows of that of the weight."""
NamedLayer = tuple[str, LoraLayer]


@dataclass
class _Sums:
    """What has passed one layer so far, float64 on its device."""

    products: torch.Tensor
    """[in, in], or [out, in] of gradients."""
    inputs: torch.Tensor
    """[in]; of a covariance alone."""
    count: torch.Tensor
    """[]: tokens, or rows."""

    def add_together(self) -> None:
        """Add what other processes have. Collective."""
        for part in (self.products, self.inputs, self.count):
            sum_over(part)


def over_rows(
    layers: Sequence[NamedLayer], kind: Kind, passes: RowPasses, *, rows: int, device: torch.device
) -> Iterator[tuple[str, LoraLayer, torch.Tensor]]:
    """Yield each layer with its statistic, float64, the same on every process. Collective.

    Args:
        layers: By name. A layer is looked at as it is when its turn comes.
        kind: Of statistic.
        passes: Runs the model over training rows.
        rows: How many.
        device: Where it runs.

    Raises:
        RecipeError: For a layer that no row passes.
    """
    for group in _groups(layers, kind):
        found = _passed(group, kind, passes, rows, device)
        for (name, layer), sums in zip(group, found, strict=True):
            sums.add_together()
            if not int(sums.count):
                raise RecipeError(
                    f"none of the rows that method.init looks at passes {name}",
                    where="method.init_rows",
                    remedy="raise it, or leave the layer out with method.exclude_modules",
                )
            mean = sums.products / sums.count
            if kind == "covariance":
                inputs = sums.inputs / sums.count
                mean -= inputs[:, None] * inputs
            yield name, layer, mean


def _shape(layer: LoraLayer, kind: Kind) -> tuple[int, int]:
    columns, out = layer.in_features, layer.out_features
    assert columns is not None and out is not None, layer
    return (out if kind == "gradient" else columns), columns


def _groups(layers: Sequence[NamedLayer], kind: Kind) -> Iterator[list[NamedLayer]]:
    """Yield layers that are looked at together."""
    group: list[NamedLayer] = []
    held = 0
    for name, layer in layers:
        rows, columns = _shape(layer, kind)
        size = rows * columns * torch.float64.itemsize
        if group and held + size > BYTES_AT_ONCE:
            yield group
            group, held = [], 0
        group.append((name, layer))
        held += size
    if group:
        yield group


def _passed(
    layers: Sequence[NamedLayer], kind: Kind, passes: RowPasses, rows: int, device: torch.device
) -> list[_Sums]:
    """Return what this process's share of the rows makes of each layer. Collective."""
    now: list[Batch] = []

    def begin(batch: Batch) -> None:
        now[:] = [batch]

    found, handles = [], []
    for _, layer in layers:
        zeros = {"dtype": torch.float64, "device": device}
        sums = _Sums(
            torch.zeros(_shape(layer, kind), **zeros),  # type: ignore[call-overload]
            torch.zeros(layer.in_features, **zeros),  # type: ignore[call-overload]
            torch.zeros((), **zeros),  # type: ignore[call-overload]
        )
        found.append(sums)
        handles.append(_module(layer).register_forward_hook(_hook(sums, kind, now)))
    try:
        passes(rows, begin, gradients=kind == "gradient")
    finally:
        for handle in handles:
            handle.remove()
    return found


def _module(layer: Any) -> nn.Module:
    """Return a layer as what it is besides: PEFT's class alone does not say so."""
    module: nn.Module = layer
    return module


def _hook(sums: _Sums, kind: Kind, now: list[Batch]) -> Callable[..., None]:
    """Return a forward hook that adds what passes to sums."""

    def hook(_layer: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        (batch,) = now
        if not batch.n_rows:  # it stands in for a row, that others need not wait
            return
        inputs = arguments[0].detach().flatten(0, -2)
        if kind == "gradient":
            if output.requires_grad:  # not where the layer is computed once more
                output.register_hook(lambda gradient: _add_gradient(sums, gradient, inputs))
            return
        inputs = inputs.float()
        if kind == "moment":
            if len(inputs):
                inputs = inputs / inputs.max().abs()
                sums.products += inputs.t() @ inputs
                sums.count += 1
            return
        # Where a layer reads all tokens, those that are trained count; they come after what
        # predicts them.
        if batch.label_positions.numel() and len(inputs) == batch.input_ids.numel():
            inputs = inputs[batch.label_positions + 1]
        sums.products += inputs.t() @ inputs
        sums.inputs += inputs.sum(dim=0)
        sums.count += len(inputs)

    return hook


def _add_gradient(sums: _Sums, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
    sums.products += gradient.flatten(0, -2).float().t() @ inputs.float()
    sums.count += 1
