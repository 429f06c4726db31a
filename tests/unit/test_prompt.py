"""Prompt tuning: what trains is what plain PEFT reads, whatever the layout and recomputation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peft_dist.checkpoint.adapter_file import ADAPTER_FILE, load_adapter
from peft_dist.common.errors import DataError, RecipeError
from peft_dist.config.models import TESTED
from peft_dist.config.recipe import Recipe
from peft_dist.distributed.world import World
from peft_dist.methods import BaseAccess
from tests.tiny import ARCHITECTURES
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


def prompt(folder: Path, architecture: str, /, **sections: Any) -> Recipe:
    method = {"kind": "prompt", "virtual_tokens": P, **sections.pop("method", {})}
    return learned(folder, architecture, method=method, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [P, 11])  # the tiny windows are 8 tokens
def test_plain_peft_gives_the_logits_of_the_trained_model(
    tmp_path: Path, alone: World, architecture: str, tokens: int
) -> None:
    recipe = prompt(tmp_path, architecture, method={"virtual_tokens": tokens}, **STEPS)
    setup, rows = opened(recipe, alone)
    before = setup.engine.adapter_state()
    trained(setup, rows)
    setup.check_integrity()
    after = setup.engine.adapter_state()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    found = ours(setup, rows)
    base = bare(tmp_path / architecture)
    without = plain(base, rows)
    assert_alike(found, plain(reloaded(setup, tmp_path, base), rows))
    assert not torch.allclose(found[0], without[0], atol=1e-2)
    saved = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    assert saved["prompt_embeddings"].shape == (tokens, 64)
    assert len(saved) == (3 if architecture == "bert" else 1)
    back = load_adapter(tmp_path / "adapter", setup.method, setup.peft, setup.adapter)
    assert all(torch.equal(back[name], value) for name, value in after.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_on_a_4_bit_base_too(tmp_path: Path, alone: World, architecture: str) -> None:
    setup, rows = opened(prompt(tmp_path, architecture, quantization="nf4", **STEPS), alone)
    trained(setup, rows)
    peft = reloaded(setup, tmp_path, dequantized(setup))
    assert_alike(ours(setup, rows), plain(peft, rows), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layout_and_recomputation_change_no_gradient(
    tmp_path: Path, alone: World, architecture: str
) -> None:
    gradients = []
    for packing in (True, False) if architecture in TESTED else (False,):
        for recompute in (False, True):
            recipe = prompt(
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
def test_a_text_starts_as_its_own_tokens(tmp_path: Path, alone: World, architecture: str) -> None:
    setup, rows = opened(prompt(tmp_path, architecture, method={"text": TEXT}), alone)
    base = bare(tmp_path / architecture)
    words = torch.tensor([tokens_of(tmp_path / architecture, TEXT)[:P]])

    def after_the_words(input_ids: torch.Tensor) -> Any:
        return base(input_ids=torch.cat([words, input_ids], dim=1))

    assert_alike(ours(setup, rows), plain(after_the_words, rows))


def test_a_short_text_is_repeated(tmp_path: Path, alone: World) -> None:
    setup, _ = opened(prompt(tmp_path, "llama", method={"text": "cat"}), alone)
    ids = (tokens_of(tmp_path / "llama", "cat") * P)[:P]
    expected = bare(tmp_path / "llama").get_input_embeddings().weight[ids]
    torch.testing.assert_close(setup.engine.adapter_state()[ENCODER], expected.detach())


def test_the_start_follows_the_seed_and_the_recipe(tmp_path: Path, alone: World) -> None:
    def start(seed: int, **method: Any) -> torch.Tensor:
        recipe = prompt(tmp_path, "llama", method=method, train={"seed": seed})
        return opened(recipe, alone)[0].engine.adapter_state()[ENCODER]

    first = start(0)
    words = bare(tmp_path / "llama").get_input_embeddings().weight
    assert all((words == row).all(dim=1).any() for row in first)
    assert torch.equal(first, start(0, init="vocabulary"))
    assert not torch.equal(first, start(1))
    noise = start(0, init="random")
    assert 0.015 < float(noise.std()) < 0.025
    assert not torch.equal(noise, start(1, init="random"))


def test_an_embedding_stored_narrower_is_read_as_it_computes(tmp_path: Path, alone: World) -> None:
    recipe = prompt(tmp_path, "llama", method={"text": TEXT}, model={"dtype": "bfloat16"}, **STEPS)
    setup, rows = opened(recipe, alone)
    before = setup.adapter[ENCODER].detach().clone()
    ids = tokens_of(tmp_path / "llama", TEXT)[:P]
    expected = bare(tmp_path / "llama").get_input_embeddings().weight[ids].bfloat16().float()
    assert torch.equal(before, expected)
    trained(setup, rows)
    assert setup.adapter[ENCODER].dtype == torch.float32
    assert not torch.equal(before, setup.adapter[ENCODER])


def test_a_text_without_tokens_is_refused(tmp_path: Path, alone: World) -> None:
    setup, _ = opened(prompt(tmp_path, "llama", method={"text": TEXT}), alone)
    start = BaseAccess(
        full_tensor=lambda p: p,
        copy_into=lambda p, v: None,
        release=lambda p: None,
        tokenize=lambda text: [],
        read=lambda ids: None,
        stored_weight=lambda name: torch.empty(0),
        over_rows=None,
    )
    with pytest.raises(RecipeError, match=r"method\.text: '.*' has no token; add words"):
        setup.method.initialise(setup.peft, start)


def test_more_tokens_than_positions_are_refused(tmp_path: Path, alone: World) -> None:
    recipe = prompt(tmp_path, "llama", method={"virtual_tokens": 256})
    with pytest.raises(RecipeError, match=r"method\.virtual_tokens: 256 leave no place"):
        opened(recipe, alone)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_rows_past_the_table_of_positions_are_refused(
    tmp_path: Path, alone: World, architecture: str
) -> None:
    setup, rows = opened(prompt(tmp_path, architecture, method={"virtual_tokens": 250}), alone)
    longest = int(rows.lengths.max())
    assert longest > 6
    if architecture == "llama":
        setup.check_rows(rows)  # rotary positions go on
        return
    said = f"a row has {longest} tokens, but gpt2 has places for 6 behind 250 learned ones"
    with pytest.raises(DataError, match=said):
        setup.check_rows(rows)
