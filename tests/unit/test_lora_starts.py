"""Starts of a LoRA that are computed: they are those of PEFT, which has the whole base at hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import corda, eva, loraga
from peft.tuners.lora.config import CordaConfig
from peft.utils.loftq_utils import _low_rank_decomposition
from transformers import AutoModelForCausalLM

from peft_dist.checkpoint.adapter_file import load_adapter
from peft_dist.common.errors import RecipeError
from peft_dist.data.order import RowOrder
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.methods import row_statistics
from peft_dist.methods.lora_initial import layers_of
from peft_dist.model.nf4 import FrozenLinear4bit
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import completion_rows, save_adapter, tiny_model, tiny_recipe, write_jsonl

ROWS, RANK = 12, 4
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def started(
    folder: Path, world: World, init: str, quantization: str = "none", **changes: Any
) -> tuple[ModelSetup, TokenizedRows]:
    tiny_model(folder / "llama", "llama")
    texts = [{"text": row["prompt"] + row["completion"]} for row in completion_rows(20)]
    rows_file = write_jsonl(folder / "rows.jsonl", texts)
    method = {"init": init, "rank": RANK, "init_rows": ROWS, "targets": TARGETS, **changes}
    recipe = tiny_recipe(
        folder / "llama",
        rows_file,
        method=method,
        quantization=quantization,
        parallel={"strategy": "ddp"},
    )
    rows = tokenize_rows(recipe, "train", folder / "cache")
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"), rows=rows), rows


def factors(setup: ModelSetup) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of every layer, by its name in the bare model."""
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
        )
        for name, layer in layers_of(setup.peft)
    }


def of_peft(model: Any, config: LoraConfig) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    peft = get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): (
            layer.lora_A["default"].weight.detach(),
            layer.lora_B["default"].weight.detach(),
        )
        for name, layer in layers_of(peft)
    }


def plain_rows(rows: TokenizedRows) -> list[dict[str, torch.Tensor]]:
    """Return the rows that a start looks at, each as transformers takes it."""
    found = []
    for row in RowOrder(rows.n_rows, 0).rows(0, ROWS):
        at = slice(rows.offsets[row], rows.offsets[row + 1])
        ids = torch.from_numpy(np.array(rows.tokens[at], dtype=np.int64))[None]
        trained = torch.from_numpy(np.array(rows.trained[at]))[None]
        trained[0, 0] = False  # nothing predicts it
        found.append({"input_ids": ids, "labels": torch.where(trained, ids, -100)})
    return found


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_part_of_a_weight_that_peft_takes(
    tmp_path: Path, alone: World, mode: Any
) -> None:
    setup, rows = started(tmp_path, alone, "corda" if mode == "ipm" else "corda_kpm")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    config = LoraConfig(
        r=RANK,
        lora_alpha=16,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )

    def run() -> None:
        for row in plain_rows(rows):
            base(input_ids=row["input_ids"])

    corda.preprocess_corda(base, config, run_model=run)
    theirs, ours = of_peft(base, config), factors(setup)
    assert ours.keys() == theirs.keys()
    for name, (a, b) in ours.items():
        torch.testing.assert_close(b @ a, theirs[name][1] @ theirs[name][0], atol=1e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_takes_the_directions_of_the_gradient_that_peft_takes(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one layer at a time, as with a model whose gradients are larger than what is kept at once
    monkeypatch.setattr(row_statistics, "BYTES_AT_ONCE", 1)
    setup, rows = started(tmp_path, alone, "lora_ga")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    config = LoraConfig(
        r=RANK,
        lora_alpha=16,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )

    def run() -> None:
        for row in plain_rows(rows):
            base(**row).loss.backward()

    loraga.preprocess_loraga(base, config, run)
    torch.manual_seed(0)
    theirs, ours = of_peft(base, config), factors(setup)
    for name, (a, b) in ours.items():
        their_a, their_b = theirs[name]
        # A decomposition leaves the sign of every direction open, and A and B have different ones.
        signs = (a * their_a).sum(dim=1).sign(), (b * their_b).sum(dim=0).sign()
        product = their_b * signs[1] @ (their_a * signs[0][:, None])
        torch.testing.assert_close(b @ a, product, atol=0.03 * float(product.abs().max()), rtol=0)
        assert float((b @ a).abs().max()) > 1e-4


def test_eva_takes_the_directions_of_the_inputs_that_peft_takes(
    tmp_path: Path, alone: World
) -> None:
    setup, rows = started(tmp_path, alone, "eva")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    config = LoraConfig(
        r=RANK,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=1.0, tau=0.999),
    )
    longest = max(row["input_ids"].shape[1] for row in plain_rows(rows))

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.cat(
            [
                torch.nn.functional.pad(row[name], (0, longest - row[name].shape[1]), value=value)
                for row in plain_rows(rows)
            ]
        )

    ids, labels = padded("input_ids", -1), padded("labels", -100)
    mask = ids >= 0
    batch = {"input_ids": ids.clamp(min=0), "labels": labels, "attention_mask": mask.long()}
    theirs = eva.get_eva_state_dict(
        base, [batch], config, gather_distributed_inputs=False, show_progress_bar=False
    )
    ours = factors(setup)
    assert ours.keys() == theirs.keys()
    for name, (a, b) in ours.items():
        assert not b.any()
        torch.testing.assert_close(a @ a.t(), torch.eye(RANK), atol=1e-4, rtol=0)
        angles = torch.linalg.svdvals(a @ theirs[name].float().t())
        assert float(angles.min()) > 0.999, (name, angles)


def test_loftq_gives_back_the_largest_part_of_what_four_bits_lose(
    tmp_path: Path, alone: World
) -> None:
    setup, _ = started(tmp_path, alone, "loftq", "nf4")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    ours = factors(setup)
    for name, layer in layers_of(setup.peft):
        base = layer.get_base_layer()
        assert isinstance(base, FrozenLinear4bit)
        a, b = ours[name.removeprefix("base_model.model.")]
        full = stored.get_submodule(name.removeprefix("base_model.model.")).weight.detach()
        lost = full - base.weight
        theirs = _low_rank_decomposition(lost, RANK)
        best = theirs["L"] @ theirs["R"]
        left = float((lost - layer.scaling["default"] * b @ a).norm())
        assert left < 0.95 * float(lost.norm())
        assert left == pytest.approx(float((lost - best).norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("init", "changes", "said"),
    [
        ("lora_ga", {"rank": 17}, "method.rank: init: lora_ga takes a rank of at most 16 for"),
        ("corda", {"rank": 40}, "method.rank: init: corda takes a rank of at most 32 for"),
    ],
)
def test_a_rank_that_a_start_has_no_directions_for_is_refused(
    tmp_path: Path, alone: World, init: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        started(tmp_path, alone, init, **changes)
    assert str(caught.value).startswith(said)


def test_a_layer_that_no_row_passes_is_named(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_statistics, "_hook", lambda *_: lambda *_: None)
    with pytest.raises(RecipeError, match=r"method.init_rows: none of the rows .* passes .*q_proj"):
        started(tmp_path, alone, "eva")


@pytest.mark.parametrize("init", ["corda_kpm", "lora_ga"])
def test_a_saved_adapter_is_read_without_the_rows_that_it_started_from(
    tmp_path: Path, alone: World, init: str
) -> None:
    setup, _ = started(tmp_path, alone, init)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in setup.adapter.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    state = setup.engine.adapter_state()
    save_adapter(tmp_path / "adapter", setup.method, setup.peft, state)
    bare = set_up_model(setup.recipe, alone, find_base(setup.recipe, tmp_path / "cache"))
    found = load_adapter(tmp_path / "adapter", bare.method, bare.peft, bare.adapter)
    bare.note_base()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert bare.base_fingerprint == setup.base_fingerprint
