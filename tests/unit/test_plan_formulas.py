"""The formulas of memory against the simulation, which runs the code that they describe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from peft_dist.config.parallel import Reshard
from peft_dist.config.recipe import Recipe
from peft_dist.distributed.world import World
from peft_dist.model import cross_entropy, sliced_cross_entropy
from peft_dist.model.tiny_config import tiny_config
from peft_dist.plan import memory, vocabulary_bytes
from peft_dist.plan.adapter import adapter_shape
from peft_dist.plan.gathers import gathered_bytes
from peft_dist.plan.memory import peak_bytes
from peft_dist.plan.read_shape import read_shape
from peft_dist.plan.setting import Setting
from peft_dist.sharding import deepspeed_zero, lookup
from peft_dist.simulation.run import Simulated, simulate
from tests.configs import model_folder
from tests.faults.long import IS_LONG
from tests.tiny import ARCHITECTURES

TOLERANCE = 0.03
DECODERS = sorted(ARCHITECTURES.keys() - {"bert"})
FEW = {"num_hidden_layers": 3}
CASES: dict[str, dict[str, Any]] = {
    "gemma2": {"model": "gemma-2-27b", "rows": 2, "changes": FEW},
    "phi3": {"model": "phi-4", "rows": 2, "changes": FEW},
    "qwen3": {"model": "qwen3-32b", "rows": 2, "changes": FEW},
    "qwen3, recomputed": {"model": "qwen3-32b", "rows": 2, "changes": FEW, "recompute": True},
    "mistral": {"model": "mistral-small-24b", "rows": 2, "changes": FEW},
    "mixture": {"model": "qwen3-30b-a3b", "rows": 2, "changes": FEW},
    "mixture, recomputed": {
        "model": "qwen3-30b-a3b",
        "rows": 2,
        "changes": FEW,
        "recompute": True,
    },
    "fsdp": {},
    "fsdp, little vocabulary": {"model": "shallow-few-words"},
    "fsdp, recomputed": {"recompute": True},
    "fsdp, recomputed, little vocabulary": {"model": "shallow-few-words", "recompute": True},
    "fsdp, kept over backward": {"reshard": "backward"},
    "fsdp, kept over backward, recomputed, little vocabulary": {
        "model": "shallow-few-words",
        "recompute": True,
        "reshard": "backward",
    },
    "fsdp, kept over a step": {"reshard": "step", "passes": 2},
    "fsdp, few tokens": {"rows": 1, "length": 256},
    "fsdp, some dequantized": {"dequantized": 2},
    "fsdp, all dequantized, kept over a step": {"dequantized": 9, "reshard": "step", "passes": 2},
    "ddp, all dequantized": {"strategy": "ddp", "dequantized": 9},
    "mixture, dequantized": {
        "model": "qwen3-30b-a3b",
        "rows": 2,
        "changes": FEW,
        "dequantized": 3,
    },
    "fsdp, many rows": {"rows": 16, "length": 128},
    "ddp": {"strategy": "ddp"},
    "hsdp": {"strategy": "hsdp", "processes": 16},
    "unquantized": {"quantization": "none"},
    "two matrices": {"method": {"kind": "lora", "targets": ["q_proj", "v_proj"]}},
    "dropout": {"method": {"kind": "lora", "rank": 16, "dropout": 0.1}},
    "dora": {"method": {"kind": "lora", "dora": True}},
    "bottleneck": {"method": {"kind": "bottleneck"}},
    "prefix": {"method": {"kind": "prefix"}},
    "prompt": {"method": {"kind": "prompt"}},
    "bitfit": {"method": {"kind": "bitfit", "add_bias": True}},
    "dpo": {"rows": 2, "strategy": "ddp", "objective": {"kind": "dpo"}},
}

SHORT = (
    "gemma2",
    "phi3",
    "fsdp",
    "fsdp, recomputed, little vocabulary",
    "fsdp, kept over backward, recomputed, little vocabulary",
    "fsdp, kept over a step",
    "fsdp, few tokens",
    "ddp",
    "hsdp",
    "dropout",
    "dpo",
)


def simulated_and_planned(
    folder: Path,
    *,
    model: str = "shallow",
    strategy: str = "fsdp",
    processes: int = 8,
    rows: int = 4,
    length: int = 1024,
    recompute: bool = False,
    reshard: Reshard = "forward",
    passes: int = 1,
    dequantized: int = 0,
    quantization: str = "nf4",
    method: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
) -> tuple[Simulated, memory.Bytes, int, int]:
    """Return both, and gathered bytes and trained parameters of the formulas."""
    model_folder(folder, model, **changes or {})
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder), "dtype": "bfloat16"},
            "quantization": quantization,
            "method": method or {"kind": "lora", "rank": 16},
            **({"objective": objective} if objective else {}),
            "data": {"train": "x.jsonl", "max_length": length},
            "train": {
                "global_batch_size": passes * rows * processes,
                "micro_batch_size": rows,
                "activation_checkpointing": recompute,
            },
            "parallel": {
                "strategy": strategy,
                "processes": processes,
                **({"shard_size": 8} if strategy == "hsdp" else {}),
                **({"reshard": reshard} if strategy != "ddp" else {}),
                "dequantized_blocks": dequantized,
            },
        }
    )
    found = simulate(recipe, folder, World(0, processes, 0, 8, torch.device("cpu")))
    shape = read_shape(json.loads((folder / "config.json").read_text()), where="test")
    adapter = adapter_shape(recipe.method, shape)
    assert adapter is not None
    setting = Setting(
        sharded=strategy != "ddp",
        shards={"ddp": 1, "hsdp": 8}.get(strategy, processes),
        micro_batch=rows * recipe.rows_per_example,
        length=length,
        recompute=recompute,
        reshard=reshard,
        accumulation=passes,
        dequantized=dequantized,
        quantized=quantization == "nf4",
        one_call=True,
        mask_bytes=2,  # of a CPU, on which the simulation runs
    )
    assert shape.parameters == found.base_parameters
    gathered = gathered_bytes(shape, adapter, setting) if setting.sharded else 0
    return found, peak_bytes(shape, adapter, setting), gathered, adapter.parameters


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES if IS_LONG else SHORT)
def test_formulas_are_near_what_the_code_does(tmp_path: Path, case: str) -> None:
    found, planned, gathered, trained = simulated_and_planned(tmp_path, **CASES[case])
    assert planned.base == found.base_bytes
    assert trained == found.trained_parameters
    carried = found.carried_bytes
    assert gathered == carried.get("_allgather_base_", 0) + carried.get("alltoall_base_", 0)
    assert planned.allocated == pytest.approx(found.peak_bytes, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_every_parameter_of_a_mixture_is_counted(kind: str) -> None:
    config = tiny_config(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert read_shape(config.to_dict(), where="test").parameters == counted


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_every_parameter_of_a_decoder_is_counted(kind: str, tied: bool) -> None:
    sizes = {**ARCHITECTURES[kind], "tie_word_embeddings": tied, "vocab_size": 320}
    words = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **sizes, **words)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert read_shape(config.to_dict(), where="test").parameters == counted


def test_the_formulas_know_the_numbers_of_the_code() -> None:
    assert memory.LOGIT_BYTES_PER_CHUNK == cross_entropy.LOGIT_BYTES_PER_CHUNK
    assert memory.REUSE_ELEMENTS == deepspeed_zero._REUSE_ELEMENTS
    assert vocabulary_bytes.ALIGNED_COLUMNS == lookup.ALIGNED_COLUMNS
    assert lookup.ID_DTYPE.itemsize == vocabulary_bytes.ID_BYTES
    assert sliced_cross_entropy.ID_DTYPE.itemsize == vocabulary_bytes.ID_BYTES
    assert vocabulary_bytes.NUMBERS == sliced_cross_entropy.NUMBERS
    assert vocabulary_bytes.LEAST_SPARED_BYTES == sliced_cross_entropy.LEAST_SPARED_BYTES
