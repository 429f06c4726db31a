"""A rank's whole life on a CUDA device: every method on every engine, unquantized and in 4 bits."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as torch_dist
from torch.distributed.distributed_c10d import _world

from tests.fakecuda.rank import RANKS_OF_A_NODE, live, off_device, prepare
from tests.tiny import ARCHITECTURES

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "bottleneck": {"kind": "bottleneck"},
    "prefix": {"kind": "prefix", "virtual_tokens": 5, "text": "the cat and the dog"},
    "prompt": {"kind": "prompt", "virtual_tokens": 5, "text": "the cat and the dog"},
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "olora": {"kind": "lora", "rank": 4, "init": "olora"},
    "bitfit": {"kind": "bitfit", "add_bias": True},
    "ia3": {"kind": "peft", "type": "IA3"},
}
ENGINES = ("ddp", "fsdp", "hsdp", "zero2", "zero3")


FACTORED = ("pissa", "olora")
"""They factor the base, which has to be there unquantized; and are then as any other LoRA."""
CASES = [
    (method, strategy, quantization)
    for method in METHODS
    for strategy in (("fsdp", "zero3") if method in FACTORED else ENGINES)
    for quantization in (("none",) if method in FACTORED else ("nf4", "none"))
]


@pytest.mark.parametrize(("method", "strategy", "quantization"), CASES)
def test_every_method_lives_on_every_engine(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    strategy: str,
    quantization: str,
) -> None:
    rank = prepare(
        tmp_path,
        monkeypatch,
        method=METHODS[method],
        parallel={"strategy": strategy},
        quantization=quantization,
    )
    live(rank)
    assert off_device(rank) == []


def test_replicas_have_a_communicator_with_nobody_but_their_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = prepare(tmp_path, monkeypatch, parallel={"strategy": "hsdp"})
    groups = {tuple(torch_dist.get_process_group_ranks(group)) for group in _world.pg_map}
    assert (0, 1) in groups
    assert (0, 2) not in groups
    assert rank.setup.engine.shard.count == RANKS_OF_A_NODE


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_lives_on_fsdp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    rank = prepare(tmp_path, monkeypatch, architecture, parallel={"strategy": "fsdp"})
    live(rank)
    assert off_device(rank) == []
