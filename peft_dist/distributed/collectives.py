"""The collectives of this project: rows of the base, sums, and small values as JSON."""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as torch_dist


def row_share(rows: int, *, index: int, count: int) -> tuple[int, int]:
    """Return the rows [start, stop) that shard `index` of `count` holds of a tensor.

    The same rule as `torch.chunk`, which FSDP2 shards by: equal chunks of ceil(rows / count),
    the last ones shorter or empty.
    """
    chunk = -(-rows // count)
    start = min(index * chunk, rows)
    return start, min(start + chunk, rows)


@dataclass(frozen=True)
class Shard:
    """The part of every base tensor that one process reads: rows `index` of `count`."""

    index: int
    count: int
    group: torch_dist.ProcessGroup | None = None

    def rows(self, rows: int) -> tuple[int, int]:
        """Return this shard's [start, stop) of a tensor with so many rows."""
        return row_share(rows, index=self.index, count=self.count)

    def gather(self, local: torch.Tensor, rows: int) -> torch.Tensor:
        """Return all rows of a tensor of which each shard holds its share. Collective."""
        if self.count == 1:
            return local
        chunk = -(-rows // self.count)
        padded = local.new_zeros(chunk, *local.shape[1:])
        padded[: local.shape[0]] = local
        out = local.new_empty(chunk * self.count, *local.shape[1:])
        torch_dist.all_gather_into_tensor(out, padded, group=self.group)
        return out[:rows]


def sum_over(value: torch.Tensor, group: torch_dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum a tensor over the processes, in place. Collective."""
    if torch_dist.get_world_size(group) > 1:
        torch_dist.all_reduce(value, group=group)
    return value


def first_of_all(value: torch.Tensor) -> torch.Tensor:
    """Return rank 0's tensor on every process. Collective."""
    value = value.contiguous()
    if torch_dist.get_world_size() > 1:
        torch_dist.broadcast(value, src=0)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Return every process's value, in rank order. Collective.

    Values travel as JSON: torch's own object collectives unpickle what a peer sends.
    """
    if torch_dist.get_backend() == "fake":  # of a simulation: this process stands for all
        return [value] * torch_dist.get_world_size()
    on_gpu = torch_dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    world_size = torch_dist.get_world_size()
    sizes = torch.zeros(world_size, dtype=torch.int64, device=device)
    sizes[torch_dist.get_rank()] = text.numel()
    longest = int(sum_over(sizes).max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: text.numel()] = text
    out = torch.empty(world_size * longest, dtype=torch.uint8, device=device)
    torch_dist.all_gather_into_tensor(out, padded)
    parts = out.cpu().split(longest)
    return [
        json.loads(bytes(part[:size].tolist()))
        for part, size in zip(parts, sizes.tolist(), strict=True)
    ]


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every process. Collective; the value travels as JSON."""
    return gather_objects(value if torch_dist.get_rank() == 0 else None)[0]


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any process. Collective."""
    return bool(sum_over(torch.tensor(float(flag), device=device)) > 0)


def barrier() -> None:
    """Wait until every process is here."""
    if torch_dist.get_world_size() > 1:
        torch_dist.barrier()
