"""The architectures that are supported, and how to find their parts.

A model type is listed when a test trains it on every engine. Everything else is refused before a
weight is read.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import ModelError

if TYPE_CHECKING:
    from peft import PeftModel

CAUSAL_LM = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
)
SEQUENCE_CLASSIFICATION = ("bert",)
LEARNED_POSITIONS = ("bert", "gpt2", "opt")
"""Those that look positions up in a table, past whose end there is nothing."""

_TASKS = {
    "causal-lm": (AutoModelForCausalLM, CAUSAL_LM),
    "sequence-classification": (AutoModelForSequenceClassification, SEQUENCE_CLASSIFICATION),
    "reward": (AutoModelForSequenceClassification, CAUSAL_LM),
}


def read_config(folder: Path, *, task: str) -> PretrainedConfig:
    """Read config.json and refuse an architecture that is not supported for the task."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(
            f"config.json of {folder} cannot be read ({_first_line(error)})",
            where="model.name",
            remedy="give a folder with a Hugging Face config.json",
        ) from None
    _, supported = _TASKS[task]
    if config.model_type not in supported:
        raise ModelError(
            f"architecture {config.model_type!r} is not supported for {task}",
            where="model.name",
            remedy=f"supported: {', '.join(supported)}",
        )
    return config


def build_skeleton(
    config: PretrainedConfig,
    *,
    task: str,
    dtype: torch.dtype,
    attention: str,
    label_names: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Build the model with every parameter on `meta` and every buffer real.

    Buffers (rotary frequencies, embedding scales) are computed by the constructor and stand in no
    checkpoint, which is why they must not be made on `meta`.
    """
    # Imported here: accelerate takes a second to import and only this function needs it.
    from accelerate import init_empty_weights

    if label_names:
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
    # A packed checkpoint names its quantizer here; our own layers take its place.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.use_cache = False
    auto_class, _ = _TASKS[task]
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class.from_config(
                config,
                trust_remote_code=False,
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
            )
    except (ValueError, ImportError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{config.model_type} cannot be built with attention {attention} "
            f"({_first_line(error)})",
            where="model",
            remedy="set model.attention: auto, or fix config.json",
        ) from None
    model.requires_grad_(False)
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def bare_model(peft: "PeftModel") -> PreTrainedModel:
    """Return the model inside, which PEFT types as any module."""
    return cast("PreTrainedModel", peft.get_base_model())


def transformer_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the repeated layers by name, in order: the unit of sharding and of checkpointing."""
    longest: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) >= max(len(longest), 1):
            kinds = {type(child) for child in module}
            if len(kinds) == 1:
                longest = {f"{name}.{index}": child for index, child in enumerate(module)}
    if not longest:
        raise ModelError(
            f"no repeated transformer block found in {type(model).__name__}",
            where="model.name",
            remedy="this is a bug for a supported architecture; please report it",
        )
    return longest


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return every linear (nn.Linear or GPT-2's Conv1D) inside the blocks, by full name."""
    return {
        f"{block_name}.{name}": module
        for block_name, block in transformer_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def has_conv1d(model: PreTrainedModel) -> bool:
    """Whether the released model keeps weights transposed, as GPT-2 does."""
    return any(isinstance(module, Conv1D) for module in model.modules())
