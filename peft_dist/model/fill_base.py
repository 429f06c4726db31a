"""Filling the frozen base row by row, as its plan says.

A rank reads only its own rows and quantizes only those, so no process ever holds the model.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.common.screen import wait
from peft_dist.distributed.collectives import Shard, sum_over
from peft_dist.model.fingerprint import fingerprint_rows
from peft_dist.model.nf4 import quantize_rows
from peft_dist.model.plan import BasePlan, BaseTensor
from peft_dist.model.weights import WeightFiles


def read_rows(
    tensor: BaseTensor, files: WeightFiles, shard: Shard, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Read (and quantize) this shard's rows of one tensor, one result per parameter it fills.

    Unquantized rows keep the dtype of the file.
    """
    start, stop = shard.rows(tensor.shape[0])
    if tensor.block_size is None:
        return (tensor.source.rows(start, stop).to(device),)
    if tensor.packing is not None:
        assert tensor.key is not None
        packed, absmax = files.packed_rows(tensor.key, tensor.packing, start, stop)
        return packed.to(device), absmax.to(device)
    if len(tensor.shape) == 3:
        return _quantized_experts(tensor, start, stop, device)
    rows = tensor.source.rows(start, stop).to(device)
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        rows = rows.float()
    return quantize_rows(rows, tensor.block_size)


def _quantized_experts(
    tensor: BaseTensor, start: int, stop: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Read and quantize experts [start, stop), one at a time."""
    assert tensor.block_size is not None
    _, rows, columns = tensor.shape
    packed = torch.empty(stop - start, rows, columns // 2, dtype=torch.uint8, device=device)
    scales = columns // tensor.block_size * 4
    absmax = torch.empty(stop - start, rows, scales, dtype=torch.uint8, device=device)
    for expert in range(start, stop):
        (weight,) = tensor.source.rows(expert, expert + 1).to(device)
        packed[expert - start], absmax[expert - start] = quantize_rows(weight, tensor.block_size)
    return packed, absmax


def is_columns(parameter: Any) -> bool:
    """Whether this process holds some columns of the parameter, and not some rows."""
    return isinstance(parameter, DTensor) and parameter.placements[0].is_shard(1)


def copy_rows(parameter: nn.Parameter, rows: torch.Tensor) -> None:
    """Write rows into a parameter's own storage, casting to its dtype."""
    with torch.no_grad():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        local.copy_(rows)


CopyInto: TypeAlias = Callable[[nn.Parameter, torch.Tensor], None]
"""Writes a whole tensor into a parameter, of which this process may hold a part."""


class RowSink(Protocol):
    """Somebody who wants every tensor of the base, whole, one after the other."""

    def add(self, tensor: BaseTensor, parts: tuple[torch.Tensor, ...]) -> None:
        """Take the whole tensor."""


def fill_base(
    parameters: dict[str, nn.Parameter],
    plan: BasePlan,
    files: WeightFiles,
    shard: Shard,
    *,
    device: torch.device,
    copy_into: CopyInto = copy_rows,
    sink: RowSink | None = None,
) -> dict[str, int]:
    """Read this shard's rows of every tensor into the parameters of that name. Collective.

    A parameter sharded by rows takes them as they are. Any other is given to `copy_into` with all
    rows, of which each process has read and quantized its share; one tensor stands whole at a time.
    With `parameters` empty, rows go to the sink alone.

    Returns:
        The fingerprint of every tensor part as read, over all shards.
    """
    sums: list[int] = []
    names = [name for tensor in plan.tensors for name in tensor.parameters()]
    quantizes = any(tensor.block_size and tensor.packing is None for tensor in plan.tensors)
    doing = "quantizing the base" if quantizes else "reading the base"
    with wait(doing, total=len(plan.tensors), unit="tensors") as bar:
        for tensor in plan.tensors:
            start, _ = shard.rows(tensor.shape[0])
            parts = read_rows(tensor, files, shard, device)
            wholes: list[torch.Tensor] = []
            for name, rows in zip(tensor.parameters(), parts, strict=True):
                sums.append(fingerprint_rows(rows, start))
                target = parameters.get(name)
                by_rows = target is None or (isinstance(target, DTensor) and not is_columns(target))
                if sink is not None or not by_rows:
                    wholes.append(shard.gather(rows, tensor.shape[0]))
                if target is not None and by_rows:
                    copy_rows(target, rows)
                elif target is not None:
                    copy_into(target, wholes[-1])
            if sink is not None:
                sink.add(tensor, tuple(wholes))
            bar.advance()
    total = sum_over(torch.tensor(sums, dtype=torch.int64, device=device), shard.group)
    return dict(zip(names, total.tolist(), strict=True))


def materialize(
    module: nn.Module,
    device: torch.device,
    make: Callable[[nn.Parameter], nn.Parameter] | None = None,
) -> None:
    """Give every `meta` parameter memory, keeping ties, and move the buffers to the device.

    Args:
        module: The model.
        device: Where.
        make: Returns the parameter that stands for one on `meta`. Default: an empty one there.
    """

    def empty(parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)

    made: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    made[id(parameter)] = (make or empty)(parameter)
                child._parameters[name] = made[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = buffer.to(device)
