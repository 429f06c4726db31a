"""What a base computes in, and whether it drops anything."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.checkpoint.run_identity import dtype_of_run
from peft_dist.config.recipe import Model
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model.precision import compute_dtype
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, labelled_rows, tiny_model, tiny_recipe, write_jsonl

DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3},
    "bert": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
}


@pytest.mark.parametrize(
    ("capability", "wanted", "expected", "said"),
    [
        ((7, 0), "auto", torch.float16, "no bfloat16 of its own"),
        ((7, 5), "auto", torch.float16, "no bfloat16 of its own"),
        ((7, 5), "bfloat16", torch.bfloat16, "only emulates it"),
        ((9, 0), "float16", torch.float16, ""),
        ((7, 5), "float32", torch.float32, ""),
        ((8, 0), "auto", torch.bfloat16, ""),
        ((9, 0), "bfloat16", torch.bfloat16, ""),
        (None, "auto", torch.float32, "no bfloat16 of its own"),
        ("avx512_bf16", "auto", torch.bfloat16, "multiplies itself"),
        ("amx_bf16", "auto", torch.bfloat16, "multiplies itself"),
        ("amx_bf16", "float32", torch.float32, ""),
        (None, "bfloat16", torch.bfloat16, ""),
    ],
)
def test_bfloat16_is_chosen_where_the_device_has_it_itself(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | str | None,
    wanted: Any,
    expected: torch.dtype,
    said: str,
) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        """Answer as torch does: a GPU that emulates counts unless asked otherwise."""
        return isinstance(capability, tuple) and (including_emulation or capability >= (8, 0))

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    device = torch.device("cuda" if isinstance(capability, tuple) else "cpu")
    found, why = compute_dtype(Model(name="m", dtype=wanted), device)
    assert found == expected
    assert said in why if said else why == ""


def test_a_run_goes_on_in_what_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, model = torch.device("cpu"), Model(name="m")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert dtype_of_run(tmp_path / "checkpoints", cpu) == ""
    for step, state, expected in (
        (1, {}, torch.float32),  # of a version that took float32 on every CPU
        (2, {"compute_dtype": "bfloat16"}, torch.bfloat16),
        (3, {"compute_dtype": "float32"}, torch.float32),
    ):
        folder = tmp_path / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"format": 1, **state}))
        found, why = compute_dtype(model, cpu, dtype_of_run(tmp_path / "checkpoints", cpu))
        assert (found, why) == (expected, ", in which the run began")
    assert compute_dtype(Model(name="m", dtype="float16"), cpu, "float32")[0] == torch.float16


def opened(folder: Path, world: World, architecture: str, dropout: str) -> tuple[ModelSetup, Any]:
    classify = architecture == "bert"
    task = "sequence-classification" if classify else "causal-lm"
    path = write_jsonl(folder / "rows.jsonl", (labelled_rows if classify else completion_rows)(12))
    recipe = tiny_recipe(
        folder / architecture, path, model={"dropout": dropout, "task": task}, quantization="none"
    )
    rows = tokenize_rows(recipe, "train", folder / "cache")
    setup = set_up_model(
        recipe, world, find_base(recipe, folder / "cache"), label_names=rows.label_names
    )
    return setup, setup.pack(rows, torch.arange(4).numpy())


@pytest.mark.parametrize("architecture", DROPOUT)
def test_the_base_drops_nothing_unless_it_is_asked_to(
    tmp_path: Path, alone: World, architecture: str
) -> None:
    labels = {"num_labels": 3} if architecture == "bert" else {}
    tiny_model(tmp_path / architecture, architecture, **labels, **DROPOUT[architecture])
    for dropout in ("off", "as-configured"):
        setup, batch = opened(tmp_path, alone, architecture, dropout)
        losses = []
        for training in (False, True):
            setup.model.train(training)
            with torch.no_grad():
                losses.append(setup.model(batch).nll)
        assert torch.equal(*losses) == (dropout == "off")
