"""What the distributed tests share: small models, and the trainings that they compare."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_dist.entrypoints.check_models import build_tiny
from tests.equivalence import cases
from tests.faults.long import IS_LONG
from tests.processes import ROOT, environment, forked_world, run
from tests.tiny import (
    ARCHITECTURES,
    completion_rows,
    labelled_rows,
    preference_rows,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)

Outcome = dict[str, Any]
Outcomes = Callable[[str, str], Outcome]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the first test the time in which all cases are trained, also on a slow machine."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(5400 if IS_LONG else 3600))


def make_inputs(folder: Path) -> None:
    """Make every model and row file that a case names."""
    models = folder / "models"
    for architecture in ARCHITECTURES:
        labels = {"num_labels": 3} if architecture == "bert" else {}
        tiny_model(models / architecture, architecture, **labels)
    # 96 columns take blocks of 32 values, 71 take none; 2 processes divide neither 71 nor 321 rows
    tiny_model(models / "odd", "llama", hidden_size=96, head_dim=32, num_attention_heads=3,
               num_key_value_heads=3, intermediate_size=71, vocab_size=321)  # fmt: skip
    tiny_model(models / "files", "llama", max_shard_size="60KB")
    # The last tensor of the file is one that all shards have rows of: the unquantized head.
    tiny_model(models / "damaged", "llama", rope_theta=10000.0)
    tiny_model(models / "half", "llama", dtype=torch.bfloat16)
    tiny_model(models / "half-tied", "qwen2", dtype=torch.float16)
    tiny_model(models / "gpt2-trunk", "gpt2", trunk_only=True)
    tiny_model(models / "gpt2-dropout", "gpt2", resid_pdrop=0.2)
    tiny_model(models / "bert-trunk", "bert", trunk_only=True)
    for model_type in cases.MIXTURES:
        mixture = build_tiny(model_type)
        mixture.config.output_router_logits = True  # where the type knows it
        mixture.config.router_aux_loss_coef = 0.5
        mixture.save_pretrained(models / model_type)
        tiny_tokenizer(models / model_type)
    for name, double in (("bnb", False), ("bnb-double", True)):
        quantizer = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
        )
        packed = AutoModelForCausalLM.from_pretrained(
            models / "llama", quantization_config=quantizer, device_map="cpu"
        )
        packed.save_pretrained(models / name)
        tiny_tokenizer(models / name)
    write_jsonl(folder / "completion.jsonl", completion_rows(48))
    write_jsonl(folder / "completion-eval.jsonl", completion_rows(13, seed=1))
    for form in ("pair", "judged"):
        write_jsonl(folder / f"{form}.jsonl", preference_rows(24, form))
        write_jsonl(folder / f"{form}-eval.jsonl", preference_rows(7, form, seed=1))
    write_jsonl(folder / "labelled.jsonl", labelled_rows(48))
    write_jsonl(folder / "labelled-eval.jsonl", labelled_rows(13, seed=1))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which every case was trained, on one, two and four processes."""
    folder = tmp_path_factory.mktemp("cases")
    make_inputs(folder)
    script = str(ROOT / "tests" / "equivalence" / "cases.py")
    done = run(
        [*forked_world(1, 2, 4), script, str(folder)],
        environment=environment(folder / "cache"),
        cwd=folder,
        timeout_s=5400 if IS_LONG else 3000,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return folder


@pytest.fixture(scope="session")
def outcome(trained: Path) -> Outcomes:
    """Return a function from a case and an engine to what its training left."""

    def read(case: str, engine: str) -> Outcome:
        assert engine in cases.CASES[case].engines
        text = (trained / "outcomes" / case / engine / "outcome.json").read_text(encoding="utf-8")
        return cast(Outcome, json.loads(text))

    return read


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the matrix of methods and engines, where it was run."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in getattr(report, "user_properties", ()):
            if name == "matrix":
                terminalreporter.write_sep("=", "methods and engines, as they ran")
                terminalreporter.write_line(str(text))
