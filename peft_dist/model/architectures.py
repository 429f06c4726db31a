"""What transformers can build for a task, and how to find the parts of it by structure.

There is no list of architectures: whether one is computed as transformers computes it is proven at
every start (`proof.py`).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import ModelError, RecipeError
from peft_dist.model import special_cases

if TYPE_CHECKING:
    from peft import PeftModel

TASKS = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "reward": AutoModelForSequenceClassification,
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
    classify = task == "sequence-classification"
    supported = (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        if classify
        else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
    if config.model_type not in supported:
        raise ModelError(
            f"architecture {config.model_type!r} is not supported for {task}",
            where="model.name",
            remedy="`peft-dist models` lists those that are",
        )
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise ModelError(
            f"{config.model_type} has no vocabulary of tokens",
            where="model.name",
            remedy="choose another model",
        )
    reason = special_cases.refusal(config)
    if reason is not None:
        raise ModelError(
            f"{config.model_type} is not supported: {reason}",
            where="model.name",
            remedy="choose another model",
        )
    return config


def turn_dropout_off(config: PretrainedConfig) -> None:
    """Set every probability of dropping something to 0.

    GPT-2, OPT and BERT are released with 0.1, which made sense where they were trained whole: what
    an adapter needs is said in its own section.
    """
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


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
        _require_readable(config.quantization_config)
        del config.quantization_config
    special_cases.leave_weights_alone(config)
    config.use_cache = False
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = TASKS[task].from_config(
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
    _keep_in_float32(model, dtype)
    model.requires_grad_(False)
    return model


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make float32 what transformers loads so whatever the model computes in, such as a router."""
    plan = list(model._get_dtype_plan(dtype))
    if not plan:
        return
    pattern = build_glob_alternation(plan)[0]
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_floating_point():
                    continue
                if pattern.search(f"{prefix}.{name}"):
                    wide = tensor.to(torch.float32)
                    tensors[name] = nn.Parameter(wide) if tensors is module._parameters else wide


_READABLE = ("bitsandbytes", "compressed-tensors", "fp8", "modelopt", "mxfp4")
"""Quantizers whose codes can be read by rows; see `prequantized.py`."""


def _require_readable(quantization: Any) -> None:
    """Refuse a model whose codes nothing here reads: without its quantizer it is another model."""
    facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
    kind = facts.get("quant_method", "bitsandbytes")
    kind = str(getattr(kind, "value", kind))
    if kind not in _READABLE:
        raise ModelError(
            f"the model is stored for the quantizer {kind}",
            where="model.name",
            remedy="use its full-precision version; it can be quantized here",
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def bare_model(peft: "PeftModel") -> PreTrainedModel:
    """Return the model inside, which PEFT types as any module."""
    return cast("PreTrainedModel", peft.get_base_model())


def transformer_blocks(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Return the repeated layers by name, in order: the unit of sharding and of checkpointing."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    # The nearest to the token embedding, which a tower for images has no part of; of lists inside
    # lists, such as experts, the outermost; of several, the least nested, then the largest.
    at = module_name(model, model.get_input_embeddings())
    near: dict[str, nn.ModuleList] = {}
    while at and not near:
        at = at.rpartition(".")[0]
        inside = {
            name: module
            for name, module in lists.items()
            if name.startswith(f"{at}." if at else "")
        }
        near = {
            name: module
            for name, module in inside.items()
            if not any(name.startswith(f"{other}.") for other in inside)
        }
    if not near:
        raise ModelError(
            f"no repeated transformer block found in {type(model).__name__}",
            where="model.name",
            remedy="choose another model",
        )
    largest = max(near, key=lambda name: (-name.count("."), _elements(near[name])))
    blocks = {f"{largest}.{index}": block for index, block in enumerate(near[largest])}
    if any(isinstance(block, nn.ModuleList) for block in blocks.values()):  # stages of layers
        blocks = {
            f"{name}.{index}": layer
            for name, stage in blocks.items()
            for index, layer in enumerate(cast("nn.ModuleList", stage))
        }
    return blocks


def module_name(model: nn.Module, module: nn.Module | None) -> str:
    """Return the name of a module in a model; empty where it is no part of it."""
    return next((name for name, one in model.named_modules() if one is module), "")


def trunk_name(model: PreTrainedModel) -> str:
    """Return the name of all but the head: the part that holds the token embedding."""
    return module_name(model, model.get_input_embeddings()).partition(".")[0]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def require_own_weights(blocks: dict[str, nn.Module], model_type: str) -> None:
    """Refuse layers that share weights, of which each would be sharded by itself.

    Raises:
        RecipeError: Naming the first that does.
    """
    owners: dict[int, str] = {}
    for name, block in blocks.items():
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), name) != name:
                raise RecipeError(
                    f"{name} of {model_type} shares weights with {owners[id(parameter)]}, and "
                    "FSDP shards each layer by itself",
                    where="parallel.strategy",
                    remedy="set it to ddp or zero3",
                )


def pad_id(config: PretrainedConfig) -> int | None:
    """Return the token by which a model knows padding; None where it knows none."""
    found: int | None = getattr(config.get_text_config(), "pad_token_id", None)
    return found


def rope_limit(config: PretrainedConfig) -> int | None:
    """Return the longest row up to which rotary positions are those of that row alone.

    Past it, `dynamic_rope_update` of transformers chooses other frequencies for all rows that are
    computed together; None where the model has no such positions.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("dynamic", "longrope"):
        return None
    limit = rope.get("original_max_position_embeddings") or text.max_position_embeddings
    return int(limit)


def position_table(model: PreTrainedModel) -> int | None:
    """Return how many positions the model has places for, where it looks them up in a table.

    A table of learned or computed positions (`wpe`, `embed_positions`) has nothing past its end;
    rotary positions and biases by distance have no end.
    """
    positions: int | None = getattr(model.config, "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and module is not tokens and "wpe" in last:
            return module.num_embeddings
        if isinstance(module, nn.Embedding) and module is not tokens and "position" in last:
            return min(positions or module.num_embeddings, module.num_embeddings)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "embed_positions":
            return buffer.shape[0]
    return None


def block_linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """Return every linear (nn.Linear or GPT-2's Conv1D) inside the blocks, by full name."""
    return {
        f"{block_name}.{name}": module
        for block_name, block in transformer_blocks(model).items()
        for name, module in block.named_modules()
        if is_linear(module)
    }


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear and no more: some are derived from one, as routers are."""
    plain = (nn.Linear.forward, Conv1D.forward)
    return isinstance(module, nn.Linear | Conv1D) and (
        type(module).forward in plain or type(module).__name__ in special_cases.PLAIN_LINEARS
    )


def has_conv1d(model: PreTrainedModel) -> bool:
    """Whether the released model keeps weights transposed, as GPT-2 does."""
    return any(isinstance(module, Conv1D) for module in model.modules())
