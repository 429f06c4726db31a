"""Modules and tokens trained beside a LoRA: what trains, what is saved, what is refused."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.common.errors import RecipeError
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model.source import find_base
from peft_dist.model.vocabulary import untrained_rows
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.trainer import Trainer
from tests.tiny import VOCABULARY, completion_rows, tiny_model, tiny_recipe, write_jsonl

WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}
CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied, both": ("llama", WHOLE),
    "untied, head": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied, both": ("qwen2", WHOLE),
    "tied, named once": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "tied, GPT-2": ("gpt2", {"modules_to_save": ["lm_head"]}),
    "norms": ("llama", {"modules_to_save": ["norm", "input_layernorm"]}),
    "tokens, untied": ("llama", {"trainable_tokens": [267, "Ġon"]}),
    "tokens, tied": ("qwen2", {"trainable_tokens": [270, "Ġon"]}),
    "tokens, scaled embedding and capped head": ("gemma2", {"trainable_tokens": [270, 1]}),
}


def opened(
    folder: Path, world: World, architecture: str, method: dict[str, Any], **sections: Any
) -> tuple[ModelSetup, TokenizedRows]:
    if not (folder / architecture).exists():
        tiny_model(folder / architecture, architecture)
        write_jsonl(folder / "rows.jsonl", completion_rows(16))
    sections = {"quantization": "none", "parallel": {"strategy": "ddp"}, **sections}
    recipe = tiny_recipe(folder / architecture, folder / "rows.jsonl", method=method, **sections)
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    return setup, tokenize_rows(recipe, "train", folder / "cache")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "strategy"),
    [(name, "ddp") for name in CHOICES]
    + [(name, "fsdp") for name in ("untied, both", "tied, both", "tokens, untied", "tokens, tied")],
)
def test_what_is_trained_comes_back_through_plain_peft(
    tmp_path: Path, alone: World, name: str, strategy: str
) -> None:
    architecture, method = CHOICES[name]
    train = {"steps": 2, "global_batch_size": 4, "learning_rate": 1e-2}
    setup, rows = opened(
        tmp_path, alone, architecture, method, train=train, parallel={"strategy": strategy}
    )
    before = setup.engine.adapter_state()
    parts = [one for one in before if ".lora_" not in one]
    saver = AdapterSaver(setup, rows)
    saver.prove()
    Trainer(setup, rows, None).run()
    setup.check_integrity()
    after = setup.engine.adapter_state()
    assert parts
    assert all(not torch.equal(before[one], after[one]) for one in parts)
    saver.save(tmp_path / "adapter")

    base = AutoModelForCausalLM.from_pretrained(tmp_path / architecture)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = setup.pack(rows, np.array([0]))
    ids = torch.tensor([[*rows.tokens[: rows.offsets[1]].tolist(), 270, 1]])
    setup.model.eval()
    with torch.no_grad():
        logits = plain(input_ids=ids[:, :-2]).logits[0]
        theirs = torch.nn.functional.cross_entropy(
            logits[batch.label_positions], batch.targets, reduction="none"
        )
        torch.testing.assert_close(setup.model(batch).nll, theirs, atol=1e-5, rtol=1e-5)
        if strategy == "ddp":
            ours = setup.peft.get_base_model()(input_ids=ids, row_lengths=None).logits
            torch.testing.assert_close(plain(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-5)


def test_only_the_named_rows_are_trained_and_held(tmp_path: Path, alone: World) -> None:
    setup, _ = opened(tmp_path, alone, "llama", {"trainable_tokens": ["<|start|>", 270, 1]})
    shapes = {n.split(".")[-4]: p.shape for n, p in setup.adapter.items() if ".lora_" not in n}
    assert shapes == {"embed_tokens": (2, 64), "lm_head": (2, 64)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokenizer.convert_tokens_to_ids("<|start|>") == 1
    table = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").get_input_embeddings().weight
    (start,) = (p for n, p in setup.adapter.items() if "embed_tokens" in n)
    assert torch.equal(start, table[[1, 270]])


@pytest.mark.parametrize(
    ("architecture", "method", "said"),
    [
        ("llama", {"trainable_tokens": [VOCABULARY]}, "320 is no row of the model's embedding"),
        ("llama", {"trainable_tokens": ["<|strat|>"]}, "did you mean '<|start|>'?"),
        ("llama", WHOLE | {"trainable_tokens": [1]}, "is trained whole already"),
        ("llama", {"modules_to_save": ["lm_hed"]}, "did you mean 'lm_head'?"),
        ("llama", {"modules_to_save": ["mlp"]}, "stored in 4 bits"),
        ("llama", {"modules_to_save": ["rotary_emb"]}, "it has no parameters"),
        ("llama", {"modules_to_save": ["up_proj"], "targets": ["q_proj"]}, "stored in 4 bits"),
        ("gpt2", {"modules_to_save": ["wte"]}, None),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_weight_is_read(
    tmp_path: Path,
    alone: World,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    method: dict[str, Any],
    said: str | None,
) -> None:
    if said is None:  # another spelling of the tied pair
        setup, _ = opened(tmp_path, alone, architecture, method)
        assert len([name for name in setup.adapter if ".lora_" not in name]) == 1
        return
    monkeypatch.setattr("peft_dist.model_setup.fill_from_files", None)
    with pytest.raises(RecipeError) as caught:
        opened(tmp_path, alone, architecture, method, quantization="nf4")
    assert said in str(caught.value)
    assert str(caught.value).startswith("method.")


def test_rows_that_nobody_has_trained_are_found() -> None:
    table = torch.randn(10, 8)
    table[7] = 0.0
    table[8] = table[9]
    assert untrained_rows(table, np.arange(7)) == []
    assert untrained_rows(table, np.array([1, 2, 3, 7])) == [7]
    assert untrained_rows(table, np.array([1, 2, 3, 8, 9])) == [8, 9]


def test_untrained_tokens_of_the_rows_are_told_unless_they_are_trained_now(
    tmp_path: Path, alone: World, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tmp_path / "llama", "llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = 0.0  # the end token, in every row
    model.save_pretrained(tmp_path / "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(16))
    for method in ({}, {"trainable_tokens": [0]}):
        caplog.clear()
        setup, rows = opened(tmp_path, alone, "llama", method)
        with caplog.at_level(logging.WARNING):
            setup.warn_of_untrained_rows(rows)
        assert ("'<|end|>' first; method.trainable_tokens" in caplog.text) == (not method)
