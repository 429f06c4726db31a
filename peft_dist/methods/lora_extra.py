"""Fields of PEFT's LoraConfig that a recipe has no key for: passed through, or refused in one line.

What passes must be a plain LoRA in all but its fields: a variant has tensors that start in ways of
its own, or a loop of its own.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.method import Lora

OWN_KEYS = {
    "alpha_pattern": "alpha_pattern",
    "bias": "bias",
    "corda_config": "init",
    "exclude_modules": "exclude_modules",
    "init_lora_weights": "init",
    "layers_to_transform": "layers_to_transform",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_ga_config": "init",
    "modules_to_save": "modules_to_save",
    "r": "rank",
    "rank_pattern": "rank_pattern",
    "target_modules": "targets",
    "target_parameters": "target_parameters",
    "trainable_token_indices": "trainable_tokens",
    "use_dora": "dora",
    "use_rslora": "rslora",
}
"""Fields that a key of the recipe sets, and the key."""
_SET_BY_THE_RUN = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
)
_NO_PLACE = {
    "alora_invocation_tokens": "it looks for its tokens in every row, which are packed here",
    "arrow_config": "it routes between adapters that are trained already",
    "eva_config": "init eva gives every layer the rank that rank or rank_pattern says",
    "layer_replication": "it changes the layers of the base",
    "loftq_config": "init loftq makes one iteration, and more would change the base in 4 bits",
    "megatron_config": "it is for Megatron's own layers",
    "megatron_core": "it is for Megatron's own layers",
    "qalora_group_size": "it is for a base in GPTQ",
    "use_qalora": "it is for a base in GPTQ",
}
"""Fields that no run here has a place for, and why."""


def extra_fields(settings: Lora) -> dict[str, Any]:
    """Return a copy of the fields to pass on.

    Raises:
        RecipeError: For one that the recipe or the run sets, that PEFT does not know, or that has
            no place here.
    """
    known = LoraConfig.__dataclass_fields__.keys()
    free = known - OWN_KEYS.keys() - set(_SET_BY_THE_RUN) - _NO_PLACE.keys()
    for name in settings.extra:
        if name in OWN_KEYS:
            raise _refusal(name, "has a key of its own", f"set method.{OWN_KEYS[name]}")
        if name in _SET_BY_THE_RUN:
            raise _refusal(name, "is set by the run", "remove it")
        if name in _NO_PLACE:
            raise _refusal(name, f"has no place here: {_NO_PLACE[name]}", "remove it")
        if name not in known:
            raise _refusal(name, "is no field of PEFT's LoraConfig", nearest(name, free))
    return copy.deepcopy(dict(settings.extra))


@contextmanager
def naming_extra(settings: Lora) -> Iterator[None]:
    """Take what PEFT raises meanwhile for a refusal of the extra fields, where there are any."""
    try:
        yield
    except Exception as error:  # PEFT has no one way to refuse a value
        if not settings.extra:
            raise
        line = " ".join(str(error).split())
        names, problem = ", ".join(settings.extra), f"is refused by PEFT ({line[:300]})"
        raise _refusal(names, problem, "change or remove it") from None


def check_plain(peft: PeftModel, settings: Lora) -> None:
    """Refuse what extra fields have made of the LoRA, where it is no plain one any more.

    Raises:
        RecipeError: Naming PEFT's variant.
    """
    if not settings.extra:
        return
    for module in peft.modules():
        for variant in getattr(module, "lora_variant", {}).values():
            if not type(variant).__name__.startswith("Dora"):
                raise _refusal(
                    ", ".join(settings.extra),
                    f"makes another method of LoRA ({type(variant).__name__}), whose tensors or "
                    "losses PEFT leaves to a training loop of its own",
                    "remove it",
                )


def _refusal(name: str, problem: str, remedy: str) -> RecipeError:
    return RecipeError(f"{name} {problem}", where="method.extra", remedy=remedy)
