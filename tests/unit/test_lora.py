"""LoRA through PEFT: where it goes, how it starts, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from transformers import AutoModelForCausalLM

from peft_dist.checkpoint.adapter_file import load_adapter
from peft_dist.common.errors import RecipeError
from peft_dist.config.method import Lora
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.methods.lora import LoraMethod
from peft_dist.model.architectures import build_skeleton, read_config
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.optim.optimizer import make_adamw
from tests.tiny import completion_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl

ALL_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def opened(folder: Path, world: World, architecture: str = "llama", **sections: Any) -> ModelSetup:
    if not (folder / architecture).is_dir():
        tiny_model(folder / architecture, architecture)
    # ddp leaves plain tensors, with which the PEFT model runs by itself
    sections = {"parallel": {"strategy": "ddp"}, **sections}
    recipe = tiny_recipe(folder / architecture, folder / "rows.jsonl", **sections)
    write_jsonl(folder / "rows.jsonl", completion_rows(8))
    rows = tokenize_rows(recipe, "train", folder / "cache")
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"), rows=rows)


def adapted(setup: ModelSetup) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name in setup.adapter if "_A" in name}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_all_linear_is_every_linear_of_the_blocks(
    tmp_path: Path, alone: World, quantization: str
) -> None:
    setup = opened(tmp_path, alone, quantization=quantization)
    assert adapted(setup) == ALL_LLAMA
    assert not any("lm_head" in name or "embed" in name for name in setup.adapter)


@pytest.mark.parametrize("architecture", ["gpt2", "phi3", "opt"])
def test_all_linear_knows_other_names(tmp_path: Path, alone: World, architecture: str) -> None:
    expected = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    }
    assert adapted(opened(tmp_path, alone, architecture)) == expected[architecture]


def test_named_targets_are_the_only_ones(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone, method={"targets": ["v_proj", "q_proj"]})
    assert adapted(setup) == {"q_proj", "v_proj"}


def test_layers_exclusions_and_patterns_choose_what_is_adapted_and_how(
    tmp_path: Path, alone: World
) -> None:
    chosen = {
        "layers_to_transform": [1],
        "exclude_modules": ["o_proj", "mlp.up_proj"],
        "rank_pattern": {"q_proj": 2, "mlp.down_proj": 16},
        "alpha_pattern": {"q_proj": 6.0},
    }
    setup = opened(tmp_path, alone, quantization="none", method=chosen)
    assert all(".layers.1." in name for name in setup.adapter)
    assert adapted(setup) == ALL_LLAMA - {"o_proj", "up_proj"}
    ranks = {n.split(".")[-4]: len(p) for n, p in setup.adapter.items() if ".lora_A." in n}
    assert ranks == {"q_proj": 2, "k_proj": 8, "v_proj": 8, "gate_proj": 8, "down_proj": 16}
    scales = {
        name.split(".")[-1]: module.scaling["default"]
        for name, module in setup.peft.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert (scales["q_proj"], scales["down_proj"], scales["v_proj"]) == (3.0, 1.0, 2.0)
    for parameter in setup.adapter.values():
        with torch.no_grad():
            parameter.normal_()
    save_adapter(tmp_path / "adapter", setup.method, setup.peft, setup.engine.adapter_state())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        ours = setup.peft.eval()(input_ids=ids, row_lengths=None).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"exclude_modules": ["lm_head"]}, "method.exclude_modules: 'lm_head' is no adapted"),
        ({"rank_pattern": {"q_prj": 4}}, "did you mean 'q_proj'?"),
        ({"rank_pattern": {"q.*": 4}}, "method.rank_pattern: 'q.*' is no adapted linear"),
        ({"targets": ["v_proj"], "alpha_pattern": {"q_proj": 4}}, "method.alpha_pattern: 'q_proj'"),
        ({"layers_to_transform": [0, 2]}, "the model has no block 2; choose from 0 to 1"),
        ({"layers_to_transform": [0], "rank_pattern": {"1.self_attn.q_proj": 4}}, "1.self_attn"),
        ({"init": "orthogonal", "rank_pattern": {"q_proj": 3}}, "method.rank: init: orthogonal"),
    ],
)
def test_a_choice_that_matches_nothing_is_refused(
    tmp_path: Path, alone: World, method: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, alone, quantization="none", method=method)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("llama", {"bias": "all"}),
        ("llama", {"bias": "lora_only"}),
        ("qwen2", {"bias": "lora_only", "targets": ["o_proj"]}),
    ],
)
def test_biases_that_are_not_there_are_refused(
    tmp_path: Path, alone: World, architecture: str, method: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match="^method.bias: has no meaning here: .*; remove it$"):
        opened(tmp_path, alone, architecture, method=method)


@pytest.mark.parametrize(
    ("target", "remedy"),
    [("q_prj", "did you mean 'q_proj'?"), ("lm_head", "valid: down_proj, "), ("x", "valid: ")],
)
def test_a_wrong_target_names_the_nearest(
    tmp_path: Path, alone: World, target: str, remedy: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, alone, method={"targets": ["v_proj", target]})
    expected = f"method.targets: {target!r} is no linear inside the blocks of this model; {remedy}"
    assert str(caught.value).startswith(expected)


def test_the_first_values_depend_on_seed_and_name_alone(tmp_path: Path, alone: World) -> None:
    def values(**sections: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(torch.seed())
        setup = opened(tmp_path, alone, **sections)
        return {name: p.detach().clone() for name, p in setup.adapter.items()}

    one, again = values(), values()
    fewer, other = values(method={"targets": ["v_proj"]}), values(train={"seed": 1})
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert all(torch.equal(one[name], value) for name, value in fewer.items())
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


def test_a_starts_uniform_and_b_at_zero(tmp_path: Path, alone: World) -> None:
    for name, parameter in opened(tmp_path, alone).adapter.items():
        if "lora_B" in name:
            assert not parameter.any()
            continue
        bound = math.sqrt(1 / parameter.shape[1])
        assert 0.8 * bound < parameter.abs().max() <= bound
        assert abs(parameter.mean()) < 0.1 * bound
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_first_output_is_that_of_the_base(
    tmp_path: Path, alone: World, quantization: str, dora: bool
) -> None:
    setup = opened(tmp_path, alone, method={"dora": dora}, quantization=quantization)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        adapted_logits = setup.peft(input_ids=tokens, row_lengths=None).logits
        with setup.peft.disable_adapter():
            plain = setup.peft(input_ids=tokens, row_lengths=None).logits
    torch.testing.assert_close(adapted_logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rslora", "expected"), [(False, 16 / 4), (True, 16 / 2)])
def test_rslora_scales_by_the_root_of_the_rank(
    tmp_path: Path, alone: World, rslora: bool, expected: float
) -> None:
    setup = opened(tmp_path, alone, method={"rank": 4, "alpha": 16.0, "rslora": rslora})
    layers = [m for m in setup.peft.modules() if isinstance(m, LoraLayer)]
    scalings = {layer.scaling["default"] for layer in layers}
    assert scalings == {expected}


def test_dora_on_an_unquantized_transposed_base_is_refused(tmp_path: Path, alone: World) -> None:
    with pytest.raises(RecipeError, match=r"method\.dora: .*; set quantization: nf4"):
        opened(tmp_path, alone, "gpt2", quantization="none", method={"dora": True})


def test_adapters_are_float32_on_a_bfloat16_base(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone, model={"dtype": "bfloat16"}, quantization="none")
    assert {p.dtype for p in setup.adapter.values()} == {torch.float32}
    assert {p.dtype for p in setup.base.values()} == {torch.bfloat16}


def test_the_adapter_names_its_base_as_the_recipe_does(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "llama")
    config = read_config(tmp_path / "model", task="causal-lm")
    skeleton = build_skeleton(config, task="causal-lm", dtype=torch.float32, attention="auto")
    # A hub id stays one, whatever folder the model was built from.
    adapter = LoraMethod(Lora()).attach(
        skeleton, task="causal-lm", base_name="org/name", has_conv1d=False
    )
    assert adapter.peft_config["default"].base_model_name_or_path == "org/name"


STARTS = ["default", "gaussian", "orthogonal", "pissa", "olora"]
STARTS += ["eva", "corda", "corda_kpm", "lora_ga"]


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_start_leaves_the_output_of_the_base(
    tmp_path: Path, alone: World, architecture: str, init: str
) -> None:
    setup = opened(tmp_path, alone, architecture, quantization="none", method={"init": init})
    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / architecture)
    with torch.no_grad():
        ours = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
        torch.testing.assert_close(ours, base(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    zero = [n for n, t in setup.engine.adapter_state().items() if not t.any()]
    assert bool(zero) == (init in ("default", "gaussian", "eva"))


@pytest.mark.parametrize(
    ("init", "rslora"), [("pissa", False), ("pissa", True), ("corda", False), ("lora_ga", True)]
)
def test_an_adapter_split_off_the_base_is_a_plain_one_of_twice_the_rank_on_disk(
    tmp_path: Path, alone: World, init: str, rslora: bool
) -> None:
    setup = opened(
        tmp_path, alone, quantization="none", method={"init": init, "rank": 4, "rslora": rslora}
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in setup.adapter.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "adapter"
    state = setup.engine.adapter_state()
    save_adapter(folder, setup.method, setup.peft, state)
    back = load_adapter(folder, setup.method, setup.peft, setup.adapter)
    assert all(torch.equal(back[name], state[name]) for name in state)
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), folder
    )
    assert plain.peft_config["default"].r == 8
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, ours, atol=3e-5, rtol=1e-5)


def test_lora_plus_gives_b_its_own_rate(tmp_path: Path, alone: World) -> None:
    setup = opened(tmp_path, alone, method={"learning_rate_ratio": 16})
    optimizer = make_adamw(setup.engine.flat_parameters(), setup.recipe.train)
    factors = {group["rate_factor"]: group for group in optimizer.param_groups}
    assert factors.keys() == {1.0, 16.0}
    sizes = [sum(t.numel() for n, t in setup.adapter.items() if f"lora_{x}" in n) for x in "AB"]
    assert [factors[f]["params"][0].numel() for f in (1.0, 16.0)] == sizes


def test_an_odd_rank_cannot_be_orthogonal(tmp_path: Path, alone: World) -> None:
    with pytest.raises(RecipeError, match="method.rank: init: orthogonal halves the rank, and 3"):
        opened(tmp_path, alone, method={"init": "orthogonal", "rank": 3})
