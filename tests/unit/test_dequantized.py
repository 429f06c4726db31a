"""Weights of 4 bits that stay dequantized: the same bits, and nothing dequantized in a pass."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.common.errors import TrainingError
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model import nf4
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.sharding.dequantized import linears_of
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

CASES: dict[str, dict[str, Any]] = {
    "lora": {"model": {"dtype": "float32"}},
    "recomputed dora in bfloat16": {
        "model": {"dtype": "bfloat16"},
        "method": {"dora": True},
        "train": {"activation_checkpointing": True},
    },
}


def opened(folder: Path, alone: World, blocks: int, **sections: Any) -> ModelSetup:
    if not (folder / "model").exists():
        tiny_model(folder / "model", "llama")  # of two blocks
        write_jsonl(folder / "rows.jsonl", completion_rows(12))
    parallel = {"strategy": "ddp", "dequantized_blocks": blocks}
    recipe = tiny_recipe(folder / "model", folder / "rows.jsonl", parallel=parallel, **sections)
    return set_up_model(recipe, alone, find_base(recipe, folder / "cache"))


@pytest.mark.parametrize("name", CASES)
def test_weights_that_stay_dequantized_change_no_bit(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    dequantize = nf4.dequantize
    made: list[torch.Size] = []

    def counts(packed: torch.Tensor, *arguments: Any, **settings: Any) -> torch.Tensor:
        made.append(packed.shape)
        return dequantize(packed, *arguments, **settings)

    def learn(setup: ModelSetup) -> tuple[torch.Tensor, torch.Tensor]:
        rows = tokenize_rows(setup.recipe, "train", tmp_path / "cache")
        setup.model.train()
        made.clear()
        with setup.autocast(), setup.engine.disturbed_adapter():
            nll = setup.model(setup.pack(rows, np.array([0, 1, 2]))).nll
            return nll.detach(), setup.engine.gradient_of(nll.sum())

    setups = [opened(tmp_path, alone, blocks, **CASES[name]) for blocks in (0, 1, 99)]
    monkeypatch.setattr(nf4, "dequantize", counts)
    losses, gradients = learn(setups[0])
    anew = len(made)
    assert anew >= 2 * 14 - 3, "the first q, k and v need no gradient"
    for setup, most in zip(setups[1:], (0.6 * anew, 0), strict=True):
        found = learn(setup)
        assert torch.equal(found[0], losses) and torch.equal(found[1], gradients)
        assert len(made) <= most
        setup.check_integrity()


def test_a_dequantized_weight_that_changes_is_found(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone, 1)
    linear = linears_of([setup.peft])[3]
    assert linear.kept is not None
    linear.kept[2, 3] += 2.0**-10
    with pytest.raises(TrainingError, match=r"dequantized weight of .*layers.0.* changed"):
        setup.check_integrity()
