"""Parts of the base that are trained beside a LoRA: whole modules, and rows of the vocabulary.

What the base ties stays tied: PEFT is asked to, and here it is seen that it has.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.method import Lora
from peft_dist.methods.init import assign
from peft_dist.methods.method import BaseAccess
from peft_dist.model.architectures import bare_model, module_name
from peft_dist.model.token_rows import TokenRows

_WHERE = "method.modules_to_save"


def parts_config(
    model: PreTrainedModel, settings: Lora, token_ids: tuple[int, ...], targets: Iterable[str]
) -> dict[str, Any]:
    """Return what PEFT's configuration says of trained modules and trained tokens.

    Args:
        model: The base on `meta`.
        settings: The recipe's.
        token_ids: Of `trainable_tokens`.
        targets: What has a LoRA.

    Raises:
        RecipeError: For a module that is not there or cannot be trained whole.
    """
    wanted = [name for one in settings.modules_to_save for name in _matched(model, one, targets)]
    if not (wanted or token_ids):
        return {}
    embedding, head = _vocabulary(model)
    parts = {module_name(model, module): module for module in (embedding, head) if module}
    tied = head is not None and embedding.weight is head.weight
    whole = [name for name in parts if any(f".{name}".endswith(f".{one}") for one in wanted)]
    if not tied and model.config.get_text_config().tie_word_embeddings and (whole or token_ids):
        raise RecipeError(
            "config.json ties embedding and head, but the files hold other values for each",
            where=_WHERE if whole else "method.trainable_tokens",
            remedy="set tie_word_embeddings to false in config.json",
        )
    if whole and token_ids:
        raise RecipeError(
            f"{whole[0]} is trained whole already",
            where="method.trainable_tokens",
            remedy="remove it, or take it out of modules_to_save",
        )
    config: dict[str, Any] = {"modules_to_save": wanted or None}
    if whole and tied:
        # PEFT knows the pair by the name of the head alone.
        last = module_name(model, head).rpartition(".")[2]
        rest = [one for one in wanted if not any(f".{p}".endswith(f".{one}") for p in parts)]
        config |= {"modules_to_save": [*rest, last], "ensure_weight_tying": True}
    if token_ids:
        if head is not None and not tied and getattr(head, "bias", None) is not None:
            raise RecipeError(
                "the output head has a bias, which PEFT leaves out beside trained tokens",
                where="method.trainable_tokens",
                remedy="set method.modules_to_save to embedding and head instead",
            )
        # A head of its own has rows of its own for them, or they would never be written.
        names = list(parts)[:1] if tied else list(parts)
        config["trainable_token_indices"] = {name: list(token_ids) for name in names}
    return config


def on_meta(config: dict[str, Any]) -> AbstractContextManager[object]:
    """Return the context to inject in: PEFT makes a linear of the vocabulary's size to tie it."""
    return torch.device("meta") if config.get("ensure_weight_tying") else nullcontext()


def compute_as_base(peft: PeftModel, dtype: torch.dtype) -> None:
    """Let trained parts, float32, give what the base gives, which may be narrower.

    Raises:
        RecipeError: Where PEFT has untied what the base ties.
    """
    for module in peft.modules():
        if isinstance(module, TrainableTokensLayer):
            TokenRows.take_over(module)
    embedding, head = _vocabulary(bare_model(peft))
    if not isinstance(embedding, ModulesToSaveWrapper):
        return
    own: Any = embedding.modules_to_save["default"]
    if not own._forward_hooks:  # else it casts already, as one that is stored narrower does
        own.register_forward_hook(lambda _module, _args, output: output.to(dtype))
    base: Any = embedding.original_module
    if isinstance(head, ModulesToSaveWrapper):
        other: Any = head
        if other.original_module.weight is base.weight:
            # On `meta` PEFT copies what it ties.
            other.modules_to_save["default"].weight = own.weight
        return
    if head is None or head.weight is not base.weight:
        return
    raise RecipeError(
        "PEFT would train the embedding without the head that is tied to it",
        where=_WHERE,
        remedy="leave it out, or set method.trainable_tokens",
    )


def fill_token_rows(peft: PeftModel, start: BaseAccess) -> None:
    """Let trained tokens start as the base has them. Collective."""
    for module in peft.modules():
        if isinstance(module, TokenRows) and module.tied_adapter is None:
            base: Any = module.get_base_layer()
            rows = start.full_tensor(base.weight)[module.token_ids]
            for parameter in module.trainable_tokens_delta.values():
                assign(parameter, rows.float())


def left_frozen(
    peft: PeftModel, token_ids: NDArray[np.int64]
) -> tuple[nn.Parameter | None, NDArray[np.int64]]:
    """Return the base's token embedding, and which of some tokens it alone stands for.

    None where the embedding is trained whole.
    """
    embedding: Any = bare_model(peft).get_input_embeddings()
    if isinstance(embedding, ModulesToSaveWrapper):
        return None, token_ids
    if isinstance(embedding, TrainableTokensWrapper):
        layer: Any = embedding.token_adapter
        token_ids = np.setdiff1d(token_ids, layer.token_ids.cpu().numpy())
        embedding = layer.get_base_layer()
    return embedding.weight, token_ids


def _vocabulary(model: PreTrainedModel) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _matched(model: PreTrainedModel, wanted: str, targets: Iterable[str]) -> list[str]:
    """Return names by which PEFT finds the modules of a name, or end of a name, and no other."""
    found = {
        name: module for name, module in model.named_modules() if f".{name}".endswith(f".{wanted}")
    }
    if not found:
        names = {name.rpartition(".")[2] for name, module in model.named_modules() if name}
        raise RecipeError(
            f"the model has no module {wanted!r}", where=_WHERE, remedy=nearest(wanted, names)
        )
    for name, module in found.items():
        problem = _problem(name, module, targets)
        if problem is not None:
            raise RecipeError(
                f"{name} cannot be trained whole: {problem}", where=_WHERE, remedy="leave it out"
            )
    # PEFT takes every name that ends so: `norm` would mean `input_layernorm` too.
    ends = [name for name, _ in model.named_modules() if name.endswith(wanted)]
    return [wanted] if len(ends) == len(found) else list(found)


def _problem(name: str, module: nn.Module, targets: Iterable[str]) -> str | None:
    parameters = list(module.parameters())
    if not parameters:
        return "it has no parameters"
    if any(not one.is_floating_point() for one in parameters):
        return "its weights are stored in 4 bits"
    inside = [f"{name}.{child}" if child else name for child, _ in module.named_modules()]
    if any(f".{one}".endswith(f".{target}") for one in inside for target in targets):
        return "it has a LoRA"
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return "it is a list of others"
    return None
