"""Seeded initial values that do not depend on rank, world size or the order of parameters."""

import hashlib

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from peft_dist.dist import Shard


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on the run's seed and the parameter's name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def assign(parameter: nn.Parameter, full: torch.Tensor, shard: Shard) -> None:
    """Write a full tensor, or this shard's rows of it, into a parameter."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            start, stop = shard.rows(full.shape[0])
            parameter.to_local().copy_(full[start:stop])
        else:
            parameter.copy_(full)
