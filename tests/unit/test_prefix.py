"""Prefix tuning: what trains is what plain PEFT reads, whatever the layout and recomputation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_text
from safetensors.torch import load_file
from transformers import AutoTokenizer

from peft_dist.checkpoint.adapter_file import ADAPTER_FILE, load_adapter
from peft_dist.common.errors import RecipeError, RunDirError
from peft_dist.config.method import Prefix
from peft_dist.config.models import TESTED
from peft_dist.config.recipe import Recipe
from peft_dist.distributed.world import World
from peft_dist.methods.prefix import PrefixMethod
from tests.virtual import (
    ENCODER,
    STEPS,
    TEXT,
    assert_alike,
    bare,
    dequantized,
    gradient,
    learned,
    opened,
    ours,
    plain,
    reloaded,
    tokens_of,
    trained,
)

P = 5


def prefix(folder: Path, architecture: str, /, **sections: Any) -> Recipe:
    method = {"kind": "prefix", "virtual_tokens": P, **sections.pop("method", {})}
    return learned(folder, architecture, method=method, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TESTED)
@pytest.mark.parametrize("tokens", [P, 11])  # the tiny windows are 8 tokens
def test_plain_peft_gives_the_logits_of_the_trained_model(
    tmp_path: Path, alone: World, architecture: str, tokens: int
) -> None:
    recipe = prefix(tmp_path, architecture, method={"virtual_tokens": tokens}, **STEPS)
    setup, rows = opened(recipe, alone)
    before = setup.engine.adapter_state()[ENCODER]
    trained(setup, rows)
    setup.check_integrity()
    assert not torch.equal(before, setup.engine.adapter_state()[ENCODER])
    found = ours(setup, rows)
    base = bare(tmp_path / architecture)
    without = plain(base, rows)
    assert_alike(found, plain(reloaded(setup, tmp_path, base), rows))
    assert not torch.allclose(found[0], without[0], atol=1e-2)
    assert load_file(tmp_path / "adapter" / ADAPTER_FILE).keys() == {"prompt_embeddings"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_on_a_4_bit_base_too(tmp_path: Path, alone: World, architecture: str) -> None:
    setup, rows = opened(prefix(tmp_path, architecture, quantization="nf4", **STEPS), alone)
    trained(setup, rows)
    peft = reloaded(setup, tmp_path, dequantized(setup))
    assert_alike(ours(setup, rows), plain(peft, rows), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TESTED)
def test_layout_and_recomputation_change_no_gradient(
    tmp_path: Path, alone: World, architecture: str
) -> None:
    gradients = []
    for packing in (True, False):
        for recompute in (False, True):
            recipe = prefix(
                tmp_path,
                architecture,
                data={"packing": packing},
                train={"activation_checkpointing": recompute},
            )
            setup, rows = opened(recipe, alone)
            assert setup.peft.get_base_model().is_gradient_checkpointing == recompute
            gradients.append(gradient(setup, rows))
    assert float(gradients[0].abs().max()) > 1e-3
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", TESTED)
def test_a_text_starts_as_the_keys_and_values_of_its_tokens(
    tmp_path: Path, alone: World, architecture: str
) -> None:
    recipe = prefix(tmp_path, architecture, method={"text": TEXT})
    setup, rows = opened(recipe, alone)
    base = bare(tmp_path / architecture)
    words = torch.tensor([tokens_of(tmp_path / architecture, TEXT)[:P]])

    def after_the_words(input_ids: torch.Tensor) -> Any:
        return base(input_ids=torch.cat([words, input_ids], dim=1))

    assert_alike(ours(setup, rows), plain(after_the_words, rows))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "qwen3"])
def test_a_text_starts_as_in_peft(tmp_path: Path, alone: World, architecture: str) -> None:
    recipe = prefix(tmp_path, architecture, method={"text": TEXT})
    setup, _ = opened(recipe, alone)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    expected = initialize_kv_prefix_from_text(
        get_peft_model(bare(tmp_path / architecture), config),
        AutoTokenizer.from_pretrained(tmp_path / architecture),
        text=TEXT,
        use_chat_template=False,
    )
    found = setup.engine.adapter_state()[ENCODER]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_start_follows_the_seed_and_the_recipe(tmp_path: Path, alone: World) -> None:
    def start(seed: int, **method: Any) -> torch.Tensor:
        recipe = prefix(tmp_path, "llama", method=method, train={"seed": seed})
        return opened(recipe, alone)[0].engine.adapter_state()[ENCODER]

    assert torch.equal(start(0), start(0))
    assert torch.equal(start(0), start(0, init="vocabulary"))
    assert not torch.equal(start(0), start(1))
    assert torch.equal(start(0, text=TEXT), start(1, text=TEXT))
    noise = start(0, init="random")
    assert 0.015 < float(noise.std()) < 0.025
    assert not torch.equal(noise, start(1, init="random"))


def test_a_projected_prefix_is_saved_as_a_plain_one(tmp_path: Path, alone: World) -> None:
    recipe = prefix(tmp_path, "qwen3", method={"projection": True, "projection_size": 24}, **STEPS)
    setup, rows = opened(recipe, alone)
    assert len(setup.adapter) == 5
    assert setup.adapter["prompt_encoder.default.transform.0.weight"].shape[0] == 24
    before = setup.engine.adapter_state()
    trained(setup, rows)
    after = setup.engine.adapter_state()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    found = ours(setup, rows)
    assert_alike(found, plain(reloaded(setup, tmp_path, bare(tmp_path / "qwen3")), rows))
    assert not PeftConfig.from_pretrained(str(tmp_path / "adapter")).prefix_projection
    with pytest.raises(RunDirError, match=r"method\.projection: .* is not saved; load it with"):
        load_adapter(tmp_path / "adapter", setup.method, setup.peft, setup.adapter)

    assert isinstance(recipe.method, Prefix)
    settings = PrefixMethod.of_saved(recipe.method)
    again, _ = opened(recipe.model_copy(update={"method": settings}), alone)
    state = load_adapter(tmp_path / "adapter", again.method, again.peft, again.adapter)
    again.engine.load_adapter_state(state)
    assert_alike(ours(again, rows), found)


def test_a_projection_has_one_gradient_with_and_without_recomputation(
    tmp_path: Path, alone: World
) -> None:
    gradients = []
    for recompute in (False, True):
        train = {"activation_checkpointing": recompute}
        recipe = prefix(tmp_path, "llama", method={"projection": True}, train=train)
        setup, rows = opened(recipe, alone)
        gradients.append(gradient(setup, rows))
        for parameter in setup.adapter.values():
            assert parameter.grad is not None
            assert bool(parameter.grad.any())
    torch.testing.assert_close(*gradients)


def test_bfloat16_trains_a_float32_prefix(tmp_path: Path, alone: World) -> None:
    model = {"dtype": "bfloat16"}
    setup, rows = opened(prefix(tmp_path, "llama", quantization="nf4", model=model, **STEPS), alone)
    before = setup.engine.adapter_state()[ENCODER]
    trained(setup, rows)
    after = setup.adapter[ENCODER].detach()
    assert after.dtype == torch.float32
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(before, after)


def test_another_kernel_is_refused(tmp_path: Path, alone: World) -> None:
    recipe = prefix(tmp_path, "llama", model={"attention": "eager"})
    with pytest.raises(RecipeError, match=r"model\.attention: eager has no place .*; set it to au"):
        opened(recipe, alone)


def test_more_tokens_than_positions_are_refused(tmp_path: Path, alone: World) -> None:
    recipe = prefix(tmp_path, "llama", method={"virtual_tokens": 256})
    with pytest.raises(RecipeError, match=r"method\.virtual_tokens: 256 leave no place"):
        opened(recipe, alone)
