"""Bottleneck adapters: where they go, what they compute, and that PEFT saves and loads them."""

import copy
import math
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
from peft_dist.config.method import Bottleneck
from peft_dist.distributed.world import World
from peft_dist.methods import METHODS
from peft_dist.methods.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckMethod
from peft_dist.model.nf4 import FrozenLinear4bit
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from tests.tiny import ARCHITECTURES, tiny_model, tiny_recipe

TOKENS = torch.arange(3, 15)[None]
PLACES = [(architecture, "houlsby") for architecture in ARCHITECTURES] + [
    (architecture, placement)
    for architecture in ("llama", "phi3", "gpt2", "gpt_neox", "opt", "bert")
    for placement in ("pfeiffer", "parallel")
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PreTrainedModel]:
    made = cache(lambda name: tiny_model(tmp_path_factory.mktemp(name), name))
    return lambda architecture: copy.deepcopy(made(architecture))


def adapted(base: PreTrainedModel, *, moved: bool = False, **settings: Any) -> PeftModel:
    task = "SEQ_CLS" if base.config.model_type == "bert" else "CAUSAL_LM"
    model = get_peft_model(base, BottleneckConfig(task_type=task, **settings)).eval()
    if moved:
        torch.manual_seed(1)
        for parameter in trained(model).values():
            parameter.data += torch.randn_like(parameter) * 0.2
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def layers(model: nn.Module) -> dict[str, BottleneckLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, BottleneckLayer)}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize(("architecture", "placement"), PLACES)
def test_it_starts_as_the_base_and_reloads_as_it_was_saved(
    bases: Callable[[str], PreTrainedModel], tmp_path: Path, architecture: str, placement: str
) -> None:
    plain = logits(bases(architecture))
    assert torch.equal(logits(adapted(bases(architecture), placement=placement)), plain)
    model = adapted(bases(architecture), placement=placement, moved=True)
    found = logits(model)
    assert (found - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)

    model.save_pretrained(tmp_path)
    expected = {
        name.replace(".modules_to_save.default", "").replace(".default", ""): parameter
        for name, parameter in trained(model).items()
    }
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    assert any(name.endswith(".bottleneck_down.weight") for name in saved)
    assert all("bottleneck_" in name or "classifier" in name for name in saved)

    again = PeftModel.from_pretrained(bases(architecture), tmp_path).eval()
    torch.testing.assert_close(logits(again), found, atol=1e-6, rtol=1e-6)
    assert not trained(again)


@pytest.mark.parametrize(
    ("architecture", "attention", "feed_forward"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
        ("gpt_neox", "attention.dense", "mlp.dense_4h_to_h"),
        ("opt", "self_attn.out_proj", "fc2"),
        ("bert", "attention.output.dense", "output.dense"),
    ],
)
def test_the_placement_says_which_sub_layers(
    bases: Callable[[str], PreTrainedModel], architecture: str, attention: str, feed_forward: str
) -> None:
    for placement, names in (
        ("houlsby", [attention, feed_forward]),
        ("pfeiffer", [feed_forward]),
        ("parallel", [feed_forward]),
    ):
        found = layers(adapted(bases(architecture), placement=placement))
        assert [name.split(f".{index}.")[1] for index in (0, 1) for name in found
                if f".{index}." in name] == names * 2  # fmt: skip


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_an_adapter_adds_its_network_of_what_it_reads(
    bases: Callable[[str], PreTrainedModel], activation: str
) -> None:
    x = torch.randn(1, 5, 64)
    act = getattr(torch, activation, None) or getattr(nn.functional, activation)
    mlp = bases("llama").model.layers[1].mlp
    with torch.no_grad():
        plain = mlp(x)
        for placement, residual in (("pfeiffer", True), ("pfeiffer", False), ("parallel", True)):
            settings = {"placement": placement, "residual": residual, "activation": activation}
            model = adapted(bases("llama"), moved=True, **settings)
            (name,) = [name for name in layers(model) if ".1." in name]
            layer = layers(model)[name]
            down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
            source = x if placement == "parallel" else plain
            expected = up(act(down(source))) + (plain if residual else 0)
            found = model.get_base_model().model.layers[1].mlp(x)
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("settings", "width"),
    [({}, 4), ({"reduction_factor": 2}, 32), ({"bottleneck_size": 5}, 5),
     ({"reduction_factor": 1000}, 1)],
)  # fmt: skip
def test_the_width_is_given_or_follows_from_the_hidden_size(
    bases: Callable[[str], PreTrainedModel], settings: dict[str, int], width: int
) -> None:
    found = {m.bottleneck_down["default"].weight.shape for m in layers(
        adapted(bases("gpt2"), **settings)).values()}  # fmt: skip
    assert found == {(width, 64)}


def test_dropout_acts_inside_and_in_training_alone(
    bases: Callable[[str], PreTrainedModel],
) -> None:
    model = adapted(bases("llama"), moved=True, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_a_second_adapter_of_another_placement_stands_beside_the_first(
    bases: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    other = adapted(bases("llama"), placement="parallel", reduction_factor=4, moved=True)
    other.save_pretrained(tmp_path)
    model = adapted(bases("llama"), placement="houlsby", moved=True)
    first = logits(model)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model), first)
    assert all(".default." in name for name in trained(model))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(other))
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    assert not any("second" in name for name, _ in model.named_modules())


def test_unloading_leaves_the_bare_base_and_merging_is_refused(
    bases: Callable[[str], PreTrainedModel],
) -> None:
    base = bases("opt")
    names = [name for name, _ in base.named_parameters()]
    model = adapted(base, placement="parallel", moved=True)
    with pytest.raises(ValueError, match="not linear and cannot be merged"):
        model.merge_and_unload()
    bare = model.unload()
    assert [name for name, _ in bare.named_parameters()] == names
    assert not any(module._forward_pre_hooks for module in bare.modules())
    assert torch.equal(logits(bare), logits(bases("opt")))


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_checkpointing_changes_no_gradient_of_a_parallel_adapter(
    bases: Callable[[str], PreTrainedModel], architecture: str
) -> None:
    def gradients(*, checkpointed: bool) -> dict[str, torch.Tensor]:
        base = bases(architecture)
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model = adapted(base, placement="parallel", moved=True).train()
        # Two passes before one backward: what is recomputed must not be taken from the other.
        tokens = (TOKENS, TOKENS.flip(1))
        sum(model(input_ids=t, labels=t, use_cache=False).loss for t in tokens).backward()
        assert all(layer._entered is None for layer in layers(model).values())
        return {name: parameter.grad for name, parameter in trained(model).items()}

    plain, recomputed = gradients(checkpointed=False), gradients(checkpointed=True)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_a_few_steps_lower_the_loss_and_move_the_adapters_alone(
    bases: Callable[[str], PreTrainedModel], placement: str
) -> None:
    model = adapted(bases("llama"), placement=placement)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in before if "bottleneck_" in name}


def test_float32_adapters_work_on_a_bfloat16_base_with_autocast_and_without(
    bases: Callable[[str], PreTrainedModel],
) -> None:
    model = adapted(bases("llama").to(torch.bfloat16), placement="parallel")
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(input_ids=TOKENS, labels=TOKENS)
        output.loss.backward()
        assert output.logits.dtype == torch.bfloat16
        up = [p for name, p in trained(model).items() if "_up." in name]
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in up)
        model.zero_grad()


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_session_starts_it_as_the_4_bit_base_whatever_the_process_drew_before(
    tmp_path: Path, alone: World, architecture: str, placement: str
) -> None:
    tiny_model(tmp_path / "model", architecture)
    method = {"kind": "bottleneck", "placement": placement, "bottleneck_size": 7}
    recipe = tiny_recipe(
        tmp_path / "model",
        tmp_path / "rows.jsonl",
        method=method,
        quantization="nf4",
        parallel={"strategy": "ddp"},
    )
    values = []
    for _ in range(2):
        torch.manual_seed(torch.seed())
        setup = set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
        values.append({name: p.detach().clone() for name, p in setup.adapter.items()})
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    downs = [p for name, p in values[0].items() if "_down.default.weight" in name]
    assert all(0.8 < p.abs().max() * math.sqrt(64) <= 1 for p in downs)
    assert not any(torch.equal(downs[0], other) for other in downs[1:])
    assert not any(p.any() for name, p in values[0].items() if "_up." in name or "bias" in name)

    wrapped = layers(setup.peft).values()
    assert all(isinstance(layer.base_layer, FrozenLinear4bit) for layer in wrapped)
    setup.peft.eval()
    with torch.no_grad():
        found = setup.peft(input_ids=TOKENS, row_lengths=None).logits
        with setup.peft.disable_adapter():
            plain = setup.peft(input_ids=TOKENS, row_lengths=None).logits
    assert torch.equal(found, plain)


def test_the_recipe_reaches_the_configuration(bases: Callable[[str], PreTrainedModel]) -> None:
    assert METHODS["bottleneck"] is BottleneckMethod
    section = Bottleneck(
        kind="bottleneck",
        placement="pfeiffer",
        reduction_factor=8,
        activation="tanh",
        residual=False,
        dropout=0.1,
    )
    meta = bases("bert").to("meta")
    model = BottleneckMethod(section).attach(
        meta, task="sequence-classification", base_name="org/name", has_conv1d=False
    )
    config = model.peft_config["default"].to_dict()
    asked = section.model_dump(exclude={"kind", "start_from"})
    assert {name: config[name] for name in asked} == asked
    assert config["base_model_name_or_path"] == "org/name"
    assert config["modules_to_save"] == ["classifier", "score"]


def test_a_block_of_unknown_parts_is_refused_with_what_was_looked_for(
    bases: Callable[[str], PreTrainedModel],
) -> None:
    model = bases("llama")
    for block in model.model.layers:
        block.feed, block.mlp = block.mlp, None
    with pytest.raises(RecipeError) as caught:
        adapted(model)
    assert str(caught.value) == (
        "method.placement: no feed-forward output was found in model.layers.0, where "
        "mlp.down_proj, mlp.c_proj, mlp.dense_4h_to_h, fc2, output.dense were looked for; "
        "use method lora, which adapts any linear"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placement": "pfeifer"}, "placement: unknown 'pfeifer'; valid: houlsby, pfeiffer, par"),
        ({"activation": "swish"}, "activation: unknown 'swish'; valid: relu, gelu, silu, tanh"),
        ({"placement": "parallel", "residual": False}, "residual: cannot be off with placement"),
    ],
)
def test_a_configuration_with_unknown_values_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**settings)
