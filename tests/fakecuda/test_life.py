"""A rank's whole life on a CUDA device: every method on every engine, unquantized and in 4 bits."""

from pathlib import Path
from typing import Any

import pytest

from tests.fakecuda.rank import live, off_device, prepare
from tests.tiny import ARCHITECTURES

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "bottleneck": {"kind": "bottleneck"},
    "prefix": {"kind": "prefix", "virtual_tokens": 5, "text": "the cat and the dog"},
    "prompt": {"kind": "prompt", "virtual_tokens": 5, "text": "the cat and the dog"},
    "bitfit": {"kind": "bitfit", "add_bias": True},
    "ia3": {"kind": "peft", "type": "IA3"},
}
ENGINES = ("ddp", "fsdp", "hsdp", "zero2", "zero3")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("strategy", ENGINES)
@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_lives_on_fsdp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    rank = prepare(tmp_path, monkeypatch, architecture, parallel={"strategy": "fsdp"})
    live(rank)
    assert off_device(rank) == []
