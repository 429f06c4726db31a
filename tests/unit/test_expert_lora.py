"""A LoRA on experts is PEFT's own: plain PEFT loads it to the same logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_dist.checkpoint.adapter_file import load_adapter
from peft_dist.common.errors import RecipeError
from peft_dist.distributed.world import World
from peft_dist.entrypoints.check_models import _dequantize_into, _ids, _nll, build_tiny
from peft_dist.entrypoints.merge import merge
from peft_dist.model.probe import probe_rows
from peft_dist.model.source import find_base
from peft_dist.model.weights import WeightFiles
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.run.directory import RunDir
from tests.tiny import save_adapter, tiny_recipe

EXPERTS = {"rank": 2, "target_parameters": ["gate_up_proj", "down_proj"]}


def set_up(folder: Path, world: World, model_type: str, **sections: Any) -> ModelSetup:
    if not (folder / "model").is_dir():
        build_tiny(model_type).save_pretrained(folder / "model")
    sections = {"quantization": "none", "method": EXPERTS} | sections
    recipe = tiny_recipe(folder / "model", folder / "none.jsonl", **sections)
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"))


def losses(setup: ModelSetup, *, gradient: bool = False) -> torch.Tensor:
    rows = probe_rows(setup.peft.get_base_model())
    setup.model.eval()
    with torch.set_grad_enabled(gradient):
        return setup.model(setup.pack(rows, np.arange(rows.n_rows))).nll


def plain_losses(folder: Path, adapter: Path, setup: ModelSetup) -> torch.Tensor:
    """Return what transformers and PEFT alone make of the saved adapter."""
    plain = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="eager"
    )
    if setup.recipe.quantization == "nf4":
        _dequantize_into(plain, setup)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    model.config.use_cache = False
    rows = probe_rows(setup.peft.get_base_model())
    with torch.no_grad():
        return torch.cat([_nll(model, ids) for ids in _ids(rows)])


@pytest.mark.parametrize(
    ("model_type", "quantization"),
    [("qwen2_moe", "nf4"), ("gpt_oss", "none"), ("llama4_text", "nf4")],
)
def test_plain_peft_loads_it_to_the_same_losses(
    tmp_path: Path, alone: World, model_type: str, quantization: str
) -> None:
    setup = set_up(tmp_path, alone, model_type, quantization=quantization)
    before = losses(setup)
    torch.manual_seed(1)
    state = {n: torch.randn_like(p) * 0.3 for n, p in setup.adapter.items()}
    setup.engine.load_adapter_state(state)
    assert (
        sum("experts" in name and "shared" not in name for name in state)
        == 4
        * len([n for n in state if n.endswith("0.self_attn.q_proj.lora_A.default.weight")])
        * setup.peft.config.num_hidden_layers
    )
    assert any("shared_expert." in name for name in state) == (model_type != "gpt_oss")
    save_adapter(tmp_path / "adapter", setup.method, setup.peft, state)
    again = load_adapter(tmp_path / "adapter", setup.method, setup.peft, setup.adapter)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    ours = losses(setup)
    assert float((ours - before).abs().max()) > 0.1
    theirs = plain_losses(tmp_path, tmp_path / "adapter", setup)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with setup.peft.disable_adapter():
        torch.testing.assert_close(losses(setup), before)


@pytest.mark.parametrize("model_type", ["qwen2_moe", "gpt_oss"])
def test_it_is_merged_into_the_files_as_they_are(
    tmp_path: Path, alone: World, model_type: str
) -> None:
    setup = set_up(tmp_path, alone, model_type)
    run = RunDir.create(tmp_path / "run", setup.recipe)
    state = {n: torch.randn_like(p) * 0.3 for n, p in setup.adapter.items()}
    setup.engine.load_adapter_state(state)
    save_adapter(run.adapter, setup.method, setup.peft, state)
    merge(run, tmp_path / "merged")
    names = [WeightFiles(tmp_path / folder).tensors.keys() for folder in ("model", "merged")]
    assert names[0] == names[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    rows = probe_rows(merged)
    with torch.no_grad():
        theirs = torch.cat([_nll(merged.eval(), ids) for ids in _ids(rows)])
    torch.testing.assert_close(losses(setup), theirs, atol=1e-4, rtol=1e-4)


def test_blocks_that_are_left_out_keep_their_experts(tmp_path: Path, alone: World) -> None:
    setup = set_up(tmp_path, alone, "qwen2_moe", method=EXPERTS | {"layers_to_transform": [1]})
    assert {name.split(".layers.")[1].split(".")[0] for name in setup.adapter} == {"1"}
    assert any("mlp.experts.base_layer.lora_A" in name for name in setup.adapter)
    assert any("shared_expert" in name for name in setup.adapter)


def test_a_name_that_no_expert_has_is_refused(tmp_path: Path, alone: World) -> None:
    with pytest.raises(RecipeError, match="'w1' is no parameter of experts of this model"):
        set_up(tmp_path, alone, "mixtral", method={"target_parameters": ["w1"]})
