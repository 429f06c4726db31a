"""Seeded initial values that do not depend on rank, world size or the order of parameters."""

import hashlib

import torch
from torch import nn


def generator_for(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on the run's seed and the parameter's name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Write a whole tensor into a parameter of the adapter, casting to its dtype."""
    with torch.no_grad():
        parameter.copy_(value)
