"""Recompute each block of a model in backward instead of keeping its activations."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from peft_dist.common.errors import RecipeError

RANDOM = ("drop", "jitter")
"""Parts of the names of everything in transformers and PEFT that draws numbers in a forward."""


def recompute_blocks(model: PreTrainedModel) -> None:
    """Let a model with its adapters recompute its blocks in backward.

    Where a forward draws random numbers, the state of their generators is saved before each block
    and restored in backward; elsewhere that would only cost the host time.

    Raises:
        RecipeError: For a model that cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise RecipeError(
            f"{model.config.model_type} cannot compute its layers again",
            where="train.activation_checkpointing",
            remedy="set it to false",
        )
    settings = {"use_reentrant": False, "preserve_rng_state": draws_numbers(model)}
    model.gradient_checkpointing_enable(settings)


def draws_numbers(model: PreTrainedModel) -> bool:
    """Whether a forward in training may draw random numbers, as far as names tell."""
    for name, value in _settings(model.config):
        if _is_random(name) and isinstance(value, float) and value > 0.0:
            return True
    modules = (module for module in model.modules() if _is_random(type(module).__name__))
    return any(_rate(module) > 0.0 for module in modules)


def _is_random(name: str) -> bool:
    return any(part in name.lower() for part in RANDOM)


def _rate(module: nn.Module) -> float:
    """Return the probability that a layer of dropout has; 1 where it names it otherwise."""
    return float(getattr(module, "p", 1.0))


def _settings(config: PretrainedConfig) -> Iterator[tuple[str, Any]]:
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _settings(value)
        else:
            yield name, value
