"""What is trained has the losses of transformers, whatever the architecture, or is not trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_dist.common.errors import ModelError, RecipeError
from peft_dist.config.models import known_to_transformers
from peft_dist.distributed.world import World
from peft_dist.entrypoints.check_models import build_tiny, check
from peft_dist.methods.method import base_name_in
from peft_dist.model import attention, proof, ways
from peft_dist.model import experts as experts_module
from peft_dist.model.head import Head
from peft_dist.model.proof import ProofRun, Way, prove
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.faults.long import only_long
from tests.tiny import tiny_model, tiny_recipe

WAYS = {
    "cohere": "packed, peft_dist_rows",  # scales its logits
    "granite": "packed, peft_dist_rows",  # divides them
    "gpt_oss": "padded, eager",  # learned sinks; mixes packed rows
    "bloom": "padded, eager",  # a bias by distance in place of positions
    "qwen3_moe": "packed, peft_dist_rows",  # stores experts one by one
    "phi3": "packed, peft_dist_rows",
    "inkling_text": "padded, sdpa",  # short convolutions, which run from row to row
    "doge": "packed, sdpa",  # learns a bias that it adds to its mask
}
"""Types whose losses, gradients or weights were other than transformers', and how they are computed
now."""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WAYS)
def test_losses_and_gradients_are_those_of_transformers(
    tmp_path: Path, alone: World, model_type: str
) -> None:
    found = check(model_type, tmp_path, alone)
    assert (found.kind, found.detail) == ("equal", WAYS[model_type])


@pytest.mark.parametrize("model_type", ["roberta", "llama"])
def test_logits_of_classifiers_and_gradients_are_those_of_transformers(
    tmp_path: Path, alone: World, model_type: str
) -> None:
    found = check(model_type, tmp_path, alone, classify=True)
    assert (found.kind, found.detail) == ("equal", "padded, sdpa")


def test_a_classifier_that_reads_padding_is_refused(tmp_path: Path, alone: World) -> None:
    found = check("fnet", tmp_path, alone, classify=True)
    assert found.kind == "refused"
    assert "padded rows and attention eager: a logit differs" in found.detail


@pytest.mark.parametrize("model_type", ["gpt_oss", "mixtral"])
def test_experts_in_4_bits_compute_what_their_values_do_in_full(
    tmp_path: Path, alone: World, model_type: str
) -> None:
    found = check(model_type, tmp_path, alone, quantization="nf4")
    assert found.kind == "equal", found.detail


def test_experts_are_sharded_as_they_are_quantized_and_only_those_hit_are_dequantized(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddp = {"strategy": "ddp"}
    setup = set_up(tmp_path, alone, "mixtral", quantization="nf4", parallel=ddp)
    name = next(n for n in setup.base if n.endswith("gate_up_proj_packed"))
    assert setup.base[name].shape == (4, 256, 32)
    experts = setup.peft.get_submodule(name.rpartition(".")[0])
    used: list[int] = []
    weight_of = experts_module.expert_weight

    def noted(packed: torch.Tensor, absmax: torch.Tensor, expert: int, **more: Any) -> torch.Tensor:
        used.append(expert)
        return weight_of(packed, absmax, expert, **more)

    monkeypatch.setattr(experts_module, "expert_weight", noted)
    hidden, index = torch.randn(3, 64), torch.tensor([[1, 3], [3, 1], [1, 3]])
    experts_module.experts_forward(experts, hidden, index, torch.ones(3, 2))
    assert used == [1, 3, 1, 3]


def set_up(folder: Path, world: World, model_type: str, **sections: Any) -> ModelSetup:
    build_tiny(model_type).save_pretrained(folder / "model")
    sections = {"quantization": "none"} | sections
    recipe = tiny_recipe(folder / "model", folder / "none.jsonl", **sections)
    return set_up_model(recipe, world, find_base(recipe, folder / "cache"))


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("cohere", "float32"), ("granite", "float32"), ("gemma2", "float32"), ("granite", "bfloat16")],
)
def test_a_head_that_drops_what_the_model_does_to_its_logits_is_refused(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, model_type: str, dtype: str
) -> None:
    whole = Head.__init__

    def broken(head: Head, model: Any) -> None:
        whole(head, model)
        head.after = None

    monkeypatch.setattr(Head, "__init__", broken)
    with pytest.raises(ModelError, match="the head is the first to differ") as caught:
        set_up(tmp_path, alone, model_type, model={"dtype": dtype})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("told", [True, False])
def test_a_model_that_rounds_coarsely_is_not_taken_for_a_wrong_attention(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """As SmolLM2 does in bfloat16, whose losses of made-up rows differ by 0.1 between kernels."""
    if not told:
        monkeypatch.setattr(proof, "rounding_of", lambda *_: 0.0)
    model = tiny_model(tmp_path / "model", "llama", num_hidden_layers=6)
    with torch.no_grad():
        model.lm_head.weight.mul_(40.0)
    model.save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(
        tmp_path / "model", tmp_path / "none", quantization="none", model={"dtype": "bfloat16"}
    )
    found = []
    set_up_model(
        recipe,
        alone,
        find_base(recipe, tmp_path / "cache"),
        prover=lambda run, tried, *_: found.append(prove(run, tried)) or tried[0],
    )
    ((way, problems),) = found
    assert (str(way), problems == []) == (
        ("packed rows and attention peft_dist_rows", True)
        if told
        else ("packed rows and attention eager", False)
    )


def test_learned_sinks_that_an_attention_leaves_out_are_found(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attention, "_HARMLESS", (*attention._HARMLESS, "s_aux"))
    with caplog.at_level("INFO"):
        set_up(tmp_path, alone, "gpt_oss")
    for rows in ("packed", "padded"):
        assert f"not used: {rows} rows and attention peft_dist_rows: the loss of a" in caplog.text


def test_a_bias_by_distance_that_knows_no_rows_is_found(tmp_path: Path, alone: World) -> None:
    with pytest.raises(ModelError, match="bloom is not computed as .*: packed rows and attention"):
        set_up(tmp_path, alone, "bloom", data={"packing": True})


def test_an_attention_that_is_wrong_in_one_layer_is_not_used_and_the_layer_is_named(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = attention._row_attention

    def wrong(module: Any, query: torch.Tensor, *args: Any, **more: Any) -> Any:
        return right(module, query * (1.5 if module.layer_idx == 1 else 1.0), *args, **more)

    monkeypatch.setattr(attention, "_row_attention", wrong)
    with caplog.at_level("INFO"):
        setup = set_up(tmp_path, alone, "llama")
    assert setup.packing
    assert "not used: packed rows and attention peft_dist_rows" in caplog.text
    assert "model.layers.1 is the first to differ" in caplog.text


def test_rows_that_a_model_mixes_are_not_packed_and_asking_for_it_is_refused(
    tmp_path: Path, alone: World
) -> None:
    assert not set_up(tmp_path, alone, "rwkv").packing
    with pytest.raises(
        ModelError, match="rwkv is not computed as transformers computes it: packed"
    ):
        set_up(tmp_path, alone, "rwkv", data={"packing": True})


def test_a_proof_is_made_once_for_a_base_and_again_for_another(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []

    def counted(run: ProofRun, wanted: list[Way]) -> object:
        made.append(wanted)
        return prove(run, wanted)

    monkeypatch.setattr(ways, "prove", counted)
    first = set_up(tmp_path, alone, "rwkv")
    again = set_up(tmp_path, alone, "rwkv")
    assert len(made) == 1
    assert first.packing == again.packing is False
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["head.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "none.jsonl", quantization="none")
    set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
    assert len(made) == 2


def test_matrices_that_are_stored_with_different_values_are_not_tied(
    tmp_path: Path, alone: World
) -> None:
    model = build_tiny("qwen2")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)
    model.save_pretrained(tmp_path / "model")
    config = tmp_path / "model/config.json"
    text = config.read_text(encoding="utf-8").replace(
        '"tie_word_embeddings": false', '"tie_word_embeddings": true'
    )
    config.write_text(text, encoding="utf-8")
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "none.jsonl", quantization="none")
    setup = set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
    whole = {
        base_name_in(setup.peft, n): setup.engine.full_tensor(p) for n, p in setup.base.items()
    }
    torch.testing.assert_close(whole["lm_head.weight"], model.lm_head.weight.detach())
    assert not torch.equal(whole["lm_head.weight"], whole["model.embed_tokens.weight"])


def test_a_model_that_looks_ahead_is_no_causal_one(tmp_path: Path, alone: World) -> None:
    model = build_tiny("bert")
    model.config.is_decoder = False
    model.save_pretrained(tmp_path / "model")
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "none.jsonl", quantization="none")
    with pytest.raises(ModelError, match="bert is no causal language model as it is configured"):
        set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))


@only_long
def test_no_classifier_of_transformers_is_silently_different(tmp_path: Path, alone: World) -> None:
    names = known_to_transformers(classify=True)
    found = {name: check(name, tmp_path / name, alone, classify=True) for name in names}
    kinds = [result.kind for result in found.values()]
    assert not {n: r for n, r in found.items() if r.kind not in ("equal", "refused", "not built")}
    assert kinds.count("equal") > len(kinds) / 2


@only_long
def test_no_decoder_of_transformers_is_silently_different(tmp_path: Path, alone: World) -> None:
    names = known_to_transformers()
    found = {name: check(name, tmp_path / name, alone) for name in names}
    kinds = [result.kind for result in found.values()]
    wrong = {n: r for n, r in found.items() if r.kind not in ("equal", "refused", "not built")}
    assert not wrong
    assert kinds.count("equal") > len(kinds) / 2
    dense = [result.kind == "equal" for result in found.values() if result.dense]
    assert sum(dense) >= 0.9 * len(dense)


def test_layers_that_share_weights_are_not_sharded_each_by_itself(
    tmp_path: Path, alone: World
) -> None:
    with pytest.raises(RecipeError, match="of zamba2 shares weights with .* set it to ddp"):
        set_up(tmp_path, alone, "zamba2", parallel={"strategy": "fsdp"})
    ddp = {"strategy": "ddp"}
    assert set_up(tmp_path, alone, "zamba2", parallel=ddp).adapter
    # In 4 bits the second place of a shared linear was never filled.
    assert set_up(tmp_path, alone, "zamba2", parallel=ddp, quantization="nf4").adapter
