"""The saved adapter on the plain base, by PEFT and transformers alone, gives the same logits."""

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch.nn.functional import log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from tests.equivalence.cases import CASES, DDP, FSDP, PROBE_ROWS, SAVED, SINGLE
from tests.equivalence.conftest import Outcomes
from tests.tiny import tiny_recipe

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
BFLOAT16_TOLERANCE = 0.05
RELOADED = [
    (name, engine)
    for name, engine in sorted(SAVED)
    if engine in (SINGLE, FSDP, DDP) or name.startswith("matrix-")
    if not name.startswith("objective-reward")  # has no logits; tests/unit/test_objective.py
    if not name.startswith("experts-")  # bitsandbytes has none; tests/unit/test_expert_lora.py
]


def plain_base(folder: Path, *, classify: bool, dtype: torch.dtype) -> PreTrainedModel:
    """Load a base as a user of transformers would."""
    auto_class = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
    labels = {"num_labels": 3} if classify else {}
    base: PreTrainedModel = auto_class.from_pretrained(folder, dtype=dtype, **labels)
    for parameter in base.parameters():
        if parameter.is_floating_point():
            # transformers leaves the norms of a packed base in the file's dtype
            parameter.data = parameter.data.to(dtype)
    return base


def keep_the_weights(model: torch.nn.Module) -> None:
    """Stop bitsandbytes from repacking its weights for AVX512 at the first evaluation."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def causal_probe(model: PeftModel, rows: TokenizedRows) -> tuple[list[float], torch.Tensor]:
    """Return what `cases.probe` does, one row at a time through the plain model."""
    nll, first = [], []
    for row in range(PROBE_ROWS):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        tokens = torch.from_numpy(rows.tokens[part].astype("int64"))
        trained = torch.from_numpy(rows.trained[part].copy())
        trained[0] = False
        at = (
            torch.flatnonzero(trained) if hasattr(torch, "flatnonzero") else trained.nonzero()[:, 0]
        )
        # Of learned tokens in front, prompt tuning returns the logits too.
        logits = model(input_ids=tokens[None]).logits[0, -len(tokens) :].float()
        nll += (-log_softmax(logits[at - 1], dim=-1)[torch.arange(len(at)), tokens[at]]).tolist()
        first.append(logits[at[0] - 1])
    return nll, torch.stack(first)


def class_probe(model: PeftModel, rows: TokenizedRows) -> tuple[list[float], torch.Tensor]:
    """The same for classification."""
    assert rows.class_ids is not None
    logits = []
    for row in range(PROBE_ROWS):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        tokens = torch.from_numpy(rows.tokens[part].astype("int64"))
        logits.append(model(input_ids=tokens[None]).logits[0].float())
    stacked = torch.stack(logits)
    truth = torch.from_numpy(rows.class_ids[:PROBE_ROWS].copy())
    nll = -log_softmax(stacked, dim=-1)[torch.arange(PROBE_ROWS), truth]
    return nll.tolist(), stacked


@pytest.mark.parametrize(("name", "engine"), RELOADED)
def test_a_plain_peft_model_has_the_trainers_logits(
    trained: Path, outcome: Outcomes, name: str, engine: str
) -> None:
    case, found = CASES[name], outcome(name, engine)
    classify = case.model.startswith("bert")
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name.partition("-")[0])
    task = "sequence-classification" if classify else "causal-lm"
    recipe = tiny_recipe(
        trained / "models" / case.model,
        trained / f"{case.rows}.jsonl",
        model={"task": task},
        objective=case.sections.get("objective", "sft"),
    )
    rows = tokenize_rows(recipe, "train", trained / "cache-1" / "rows")
    folder = Path(found["packed_base"] or recipe.model.name)
    base = plain_base(folder, classify=classify, dtype=dtype or torch.float32)
    packed = sum(isinstance(module, Linear4bit) for module in base.modules())
    assert packed == found["packed_layers"]
    keep_the_weights(base)
    adapter = trained / "outcomes" / name / engine / "adapter"
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        nll, logits = (class_probe if classify else causal_probe)(model, rows)
    expected = torch.tensor(found["probe_logits"])
    tolerance = BFLOAT16_TOLERANCE if dtype else TOLERANCE
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(
        torch.tensor(nll), torch.tensor(found["probe_nll"]), atol=tolerance, rtol=tolerance
    )
