"""BitFit: whose bias is trained, that its change is enough, and that PEFT saves and loads it."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError
from peft_dist.config.method import BitFit
from peft_dist.distributed.world import World
from peft_dist.methods import METHODS
from peft_dist.methods.bitfit import BitFitConfig, BitFitLayer, BitFitMethod
from peft_dist.model.nf4 import FrozenLinear4bit
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from tests.tiny import ARCHITECTURES, tiny_model, tiny_recipe

TOKENS = torch.arange(3, 15)[None]
WITH_BIASES = ("bert", "gpt2", "gpt_neox", "opt", "qwen2")
"""Architectures that have biases of their own inside the blocks."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    made = cache(lambda name: tiny_model(tmp_path_factory.mktemp(name), name))
    return lambda architecture: copy.deepcopy(made(architecture))


def adapted(base: PreTrainedModel, *, moved: bool = False, **settings: Any) -> PeftModel:
    task = "SEQ_CLS" if base.config.model_type == "bert" else "CAUSAL_LM"
    model = get_peft_model(base, BitFitConfig(task_type=task, **settings)).eval()
    if moved:
        torch.manual_seed(1)
        for parameter in trained(model).values():
            parameter.data += torch.randn_like(parameter) * 0.2
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def wrapped(model: nn.Module) -> set[str]:
    """Return the names of the layers of the first block whose bias is trained."""
    return {
        name.split(".0.", 1)[1]
        for name, module in model.named_modules()
        if isinstance(module, BitFitLayer) and ".0." in name
    }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("architecture", "add_bias"),
    [(name, True) for name in ARCHITECTURES] + [(name, False) for name in WITH_BIASES],
)
def test_it_starts_as_the_base_and_reloads_as_it_was_saved(
    bases: Callable[[str], PreTrainedModel], tmp_path: Path, architecture: str, add_bias: bool
) -> None:
    plain = logits(bases(architecture))
    assert torch.equal(logits(adapted(bases(architecture), add_bias=add_bias)), plain)
    model = adapted(bases(architecture), add_bias=add_bias, moved=True)
    found = logits(model)
    assert (found - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)

    model.save_pretrained(tmp_path)
    expected = {
        name.replace(".modules_to_save.default", "").removesuffix(".default"): parameter
        for name, parameter in trained(model).items()
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert any(name.endswith(".bitfit_bias") for name in saved)
    assert all(name.endswith(".bitfit_bias") or "classifier" in name for name in saved)

    again = PeftModel.from_pretrained(bases(architecture), tmp_path).eval()
    torch.testing.assert_close(logits(again), found, atol=1e-6, rtol=1e-6)
    assert not trained(again)


@pytest.mark.parametrize("architecture", WITH_BIASES)
def test_all_is_every_bias_inside_the_blocks(
    bases: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    base = bases(architecture)
    expected = {
        name.split(".0.", 1)[1].removesuffix(".bias")
        for name, _ in base.named_parameters()
        if ".0." in name and name.endswith(".bias")
    }
    assert wrapped(adapted(base)) == expected


@pytest.mark.parametrize(
    ("architecture", "targets", "add_bias", "expected"),
    [
        ("opt", ["q_proj", "fc1"], False, {"self_attn.q_proj", "fc1"}),
        ("opt", ["self_attn.v_proj"], False, {"self_attn.v_proj"}),
        ("opt", ["final_layer_norm"], True, {"final_layer_norm"}),
        ("gpt2", ["mlp"], False, {"mlp.c_fc", "mlp.c_proj"}),
        ("qwen2", ["self_attn"], False, {f"self_attn.{name}_proj" for name in "qkv"}),
        ("qwen2", ["self_attn"], True, {f"self_attn.{name}_proj" for name in "qkvo"}),
        ("llama", ["o_proj", "mlp"], True,
         {"self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
    ],
)  # fmt: skip
def test_targets_are_whole_parts_of_names(
    bases: Callable[[str], PreTrainedModel],
    architecture: str,
    targets: list[str],
    add_bias: bool,
    expected: set[str],
) -> None:
    assert wrapped(adapted(bases(architecture), targets=targets, add_bias=add_bias)) == expected


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_the_change_takes_the_steps_that_the_bias_would_have_taken(
    bases: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    def train(model: nn.Module, parameters: list[nn.Parameter]) -> float:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for _ in range(6):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    # In double precision, as attention takes no notice of a key's bias: its gradient is rounding
    # noise, which Adam would make steps of.
    direct = bases(architecture).requires_grad_(False).double()
    model = adapted(bases(architecture)).double()
    first = direct(input_ids=TOKENS, labels=TOKENS).loss.item()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = [
        name.removeprefix("base_model.model.").removesuffix(".bitfit_bias.default")
        for name in trained(model)
    ]
    biases = [direct.get_submodule(name).bias.requires_grad_() for name in names]
    last = train(direct, biases)
    assert last < 0.95 * first
    assert train(model, list(trained(model).values())) == pytest.approx(last, rel=1e-6)
    for name, bias in zip(names, biases, strict=True):
        layer = model.get_base_model().get_submodule(name)
        moved = layer.base_layer.bias + layer.bitfit_bias["default"]
        torch.testing.assert_close(moved, bias, atol=1e-6, rtol=1e-6, msg=name)
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert still == {name for name in before if "bitfit_bias" not in name}


def test_an_added_bias_alone_lowers_the_loss(bases: Callable[[str], PreTrainedModel]) -> None:
    model = adapted(bases("llama"), add_bias=True)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_a_second_adapter_stands_beside_the_first(
    bases: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    other = adapted(bases("opt"), targets=["fc1", "k_proj"], moved=True)
    other.save_pretrained(tmp_path)
    model = adapted(bases("opt"), targets=["fc1", "fc2"], moved=True)
    first = logits(model)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model), first)
    assert all(name.endswith(".default") for name in trained(model))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(other))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    with pytest.raises(ValueError, match="are not merged"):
        model.merge_and_unload()
    assert torch.equal(logits(model.unload()), logits(bases("opt")))


def test_float32_changes_work_on_a_bfloat16_base_with_autocast_and_without(
    bases: Callable[[str], PreTrainedModel],
) -> None:
    model = adapted(bases("opt").to(torch.bfloat16))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        assert output.logits.dtype == torch.bfloat16
        changes = [p for name, p in trained(model).items() if "k_proj" not in name]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in changes)
        model.zero_grad()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(("architecture", "add_bias"), [("gpt2", False), ("llama", True)])
def test_a_session_starts_it_as_the_base(
    tmp_path: Path, alone: World, architecture: str, add_bias: bool, quantization: str
) -> None:
    tiny_model(tmp_path / "model", architecture)
    recipe = tiny_recipe(
        tmp_path / "model",
        tmp_path / "rows.jsonl",
        method={"kind": "bitfit", "add_bias": add_bias},
        quantization=quantization,
        parallel={"strategy": "ddp"},
    )
    setup = set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
    assert setup.adapter and all(".bitfit_bias." in name for name in setup.adapter)
    assert not any(change.any() for change in setup.adapter.values())
    layers = [m.base_layer for m in setup.peft.modules() if isinstance(m, BitFitLayer)]
    assert any(isinstance(layer, FrozenLinear4bit) for layer in layers) == (quantization == "nf4")
    setup.peft.eval()
    with torch.no_grad():
        found = setup.peft(input_ids=TOKENS, row_lengths=None).logits
        for change in setup.adapter.values():
            change += 0.1
        moved = setup.peft(input_ids=TOKENS, row_lengths=None).logits
        with setup.peft.disable_adapter():
            plain = setup.peft(input_ids=TOKENS, row_lengths=None).logits
    assert torch.equal(found, plain)
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_the_recipe_reaches_the_configuration(bases: Callable[[str], PreTrainedModel]) -> None:
    assert METHODS["bitfit"] is BitFitMethod
    section = BitFit(kind="bitfit", targets=("query", "output"), add_bias=True)
    model = BitFitMethod(section).attach(
        bases("bert").to("meta"),
        task="sequence-classification",
        base_name="org/name",
        has_conv1d=False,
    )
    config = model.peft_config["default"].to_dict()
    assert config["targets"] == ["query", "output"] and config["add_bias"] is True
    assert config["base_model_name_or_path"] == "org/name"
    assert config["modules_to_save"] == ["classifier", "score"]
    assert any("classifier" in name for name in trained(model))


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {}, "method: none of the layers q_proj, k_proj, v_proj, o_proj, gate_proj, "
         "up_proj, down_proj has a bias to train; set method.add_bias: true, which gives the "
         "linears one of zeros"),
        ("qwen2", {"targets": ["q_proj", "mlp"]}, "method: none of the layers gate_proj, up_proj, "
         "down_proj has a bias to train; set method.add_bias: true, which gives the linears one "
         "of zeros"),
        ("opt", {"targets": ["fc1", "q_prj"]}, "method.targets: 'q_prj' is part of no layer's "
         "name inside the blocks of this model; did you mean 'q_proj'?"),
        ("opt", {"targets": ["proj"]}, "method.targets: 'proj' is part of no layer's name inside "
         "the blocks of this model; did you mean 'v_proj'?"),
        ("gpt2", {"targets": ["x"], "add_bias": True}, "method.targets: 'x' is part of no layer's "
         "name inside the blocks of this model; valid: attn, c_attn, c_fc, c_proj, ln_1, ln_2, "
         "mlp"),
    ],
)  # fmt: skip
def test_what_has_no_bias_or_no_such_name_is_refused(
    bases: Callable[[str], PreTrainedModel],
    architecture: str,
    settings: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(RecipeError) as caught:
        adapted(bases(architecture), **settings)
    assert str(caught.value) == message


def test_targets_that_are_no_list_are_refused() -> None:
    with pytest.raises(ValueError, match="targets: 'q_proj' is neither all nor a list of names"):
        BitFitConfig(targets="q_proj")
