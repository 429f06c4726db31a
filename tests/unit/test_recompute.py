"""Recomputed blocks draw the numbers that they drew before, and save no state without any."""

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model.recompute import draws_numbers
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from tests.tiny import completion_rows, tiny_model, tiny_recipe, write_jsonl

CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "nothing drops": ("llama", {}, False),
    "the adapter drops": ("llama", {"method": {"dropout": 0.5}}, True),
    "the base drops": ("gpt2", {"model": {"dropout": "as-configured"}}, True),
    "the base could drop": ("gpt2", {}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_recomputation_restores_random_numbers_where_some_are_drawn(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    architecture, sections, draws = CASES[name]
    rates = {"resid_pdrop": 0.3, "attn_pdrop": 0.3} if architecture == "gpt2" else {}
    tiny_model(tmp_path / "model", architecture, **rates)
    file = write_jsonl(tmp_path / "rows.jsonl", completion_rows(8))
    gradients = []
    saved: list[object] = []
    state = torch.get_rng_state
    for recompute in (False, True):
        recipe = tiny_recipe(
            tmp_path / "model",
            file,
            **{**sections, "train": {"activation_checkpointing": recompute}},
        )
        rows = tokenize_rows(recipe, "train", tmp_path / "cache")
        setup = set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
        assert draws_numbers(setup.peft.get_base_model()) == draws
        setup.model.train()
        batch = setup.pack(rows, torch.arange(4).numpy())
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_rng_state", lambda: saved.append(0) or state())
            torch.manual_seed(0)
            setup.model(batch).nll.sum().backward()
        assert bool(saved) == (recompute and draws)
        gradients.append(setup.engine.gradients.clone())
    assert float(gradients[0].abs().max()) > 0.0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
