"""What the tests of learned tokens share: our passes beside those of plain PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_dist.config.recipe import Recipe
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.model.nf4 import FrozenLinear4bit, dequantize
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.trainer import Trainer
from tests.tiny import (
    VOCABULARY,
    completion_rows,
    labelled_rows,
    save_adapter,
    tiny_model,
    tiny_recipe,
    write_jsonl,
)

ENCODER = "prompt_encoder.default.embedding.weight"
TEXT = "the cat sat on the mat"
STEPS = {"train": {"steps": 3, "global_batch_size": 4, "learning_rate": 3e-2}}


def learned(folder: Path, architecture: str, /, **sections: Any) -> Recipe:
    """Return a recipe for an unquantized tiny model; `sections` are merged into it."""
    classify = architecture == "bert"
    if not (folder / architecture).is_dir():
        tiny_model(folder / architecture, architecture, **({"num_labels": 3} if classify else {}))
    rows = labelled_rows(12) if classify else completion_rows(12)
    task = {"model": {"task": "sequence-classification"}} if classify else {}
    path = write_jsonl(folder / "rows.jsonl", rows)
    return tiny_recipe(folder / architecture, path, **{"quantization": "none", **task, **sections})


def opened(recipe: Recipe, world: World) -> tuple[ModelSetup, TokenizedRows]:
    """Open a model setup and read the recipe's rows."""
    cache = Path(recipe.data.train).parent / "cache"
    rows = tokenize_rows(recipe, "train", cache)
    setup = set_up_model(recipe, world, find_base(recipe, cache), label_names=rows.label_names)
    return setup, rows


def trained(setup: ModelSetup, rows: TokenizedRows) -> None:
    """Train as the recipe says."""
    Trainer(setup, rows, None).run()


def gradient(setup: ModelSetup, rows: TokenizedRows) -> torch.Tensor:
    """Return the gradient of the loss of six rows."""
    setup.model.train()
    setup.model(setup.pack(rows, torch.arange(6).numpy())).nll.sum().backward()
    return setup.engine.gradients.clone()


def ours(setup: ModelSetup, rows: TokenizedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each target, and each row's logits at its first."""
    setup.model.eval()
    batch = setup.pack(rows, torch.arange(rows.n_rows).numpy())
    with torch.no_grad():
        nll, logits, _ = setup.model(batch, torch.arange(VOCABULARY))
    cap = getattr(setup.model, "softcap", None)  # choices need no cap to be ranked
    return nll, logits if cap is None else cap * torch.tanh(logits / cap)


def plain(model: Any, rows: TokenizedRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same of a model that knows nothing of us, one row after the other."""
    nll, first = [], []
    for row in range(rows.n_rows):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        tokens = torch.from_numpy(rows.tokens[part].astype("int64"))
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0]
        if rows.class_ids is None:
            at = torch.from_numpy(rows.trained[part].copy())[1:].nonzero()[:, 0]
            targets, logits = tokens[1:][at], logits[-len(tokens) :][at]
        else:
            targets, logits = torch.tensor([rows.class_ids[row]]), logits[None]
        nll.append(functional.cross_entropy(logits, targets, reduction="none"))
        first.append(logits[0])
    return torch.cat(nll), torch.stack(first)


def bare(folder: Path) -> Any:
    """Return the released base."""
    causal: Any = AutoModelForCausalLM  # untyped upstream
    encoder: Any = AutoModelForSequenceClassification
    if folder.name == "bert":
        return encoder.from_pretrained(folder).eval()
    return causal.from_pretrained(folder).eval()


def dequantized(setup: ModelSetup) -> Any:
    """Return the released base with what its 4-bit layers stand for in its linears."""
    twin = bare(Path(setup.recipe.model.name))
    for name, module in setup.peft.get_base_model().named_modules():
        if isinstance(module, FrozenLinear4bit):
            whole = setup.engine.full_tensor
            weight = dequantize(
                whole(module.packed),
                whole(module.absmax),
                block_size=module.block_size,
                dtype=torch.float32,
            )
            target = twin.get_submodule(name).weight
            is_conv1d = twin.config.model_type == "gpt2"
            target.data = weight.t().contiguous() if is_conv1d else weight
    return twin


def reloaded(setup: ModelSetup, folder: Path, base: Any) -> PeftModel:
    """Save the adapter and load it with plain PEFT onto a base."""
    state = setup.engine.adapter_state()
    save_adapter(folder / "adapter", setup.method, setup.peft, state)
    return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def tokens_of(folder: Path, text: str) -> list[int]:
    """Return the token ids of a text."""
    load: Any = AutoTokenizer.from_pretrained
    return list(load(folder)(text, add_special_tokens=False)["input_ids"])


def assert_alike(found: Any, expected: Any, atol: float = 1e-5) -> None:
    """Compare losses and logits."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)
