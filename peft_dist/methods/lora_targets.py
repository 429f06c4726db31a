"""Which linears of a model a LoRA goes on, by the names that PEFT finds them by."""

from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.method import Lora
from peft_dist.model import special_cases
from peft_dist.model.architectures import is_linear, transformer_blocks
from peft_dist.model.nf4 import FrozenLinear4bit


def linear_targets(model: PreTrainedModel, settings: Lora) -> tuple[list[str], list[str]]:
    """Return the names by which PEFT finds the linears inside the blocks, all or those wanted.

    Returns:
        Names of modules: the last part of a name where it means linears alone, else whole names.
        Names of parameters, for linears whose names PEFT takes for those of experts.

    Raises:
        RecipeError: For one that names no linear, or none that LoRA can be put on.
    """
    refused = special_cases.no_lora_on(model)
    taken = special_cases.names_of_experts(model)
    if settings.dropout or settings.dora:
        reason = "PEFT has neither dropout nor dora for it"
        refused = refused | dict.fromkeys(taken, reason)
    names: dict[str, list[str]] = {}
    for block_name, block in transformer_blocks(model).items():
        for name, module in block.named_modules(prefix=block_name):
            if isinstance(module, FrozenLinear4bit) or is_linear(module):
                names.setdefault(name.rpartition(".")[2], []).append(name)
    if not names:
        raise RecipeError(
            f"the blocks of {model.config.model_type} hold no linear",
            where="method",
            remedy="choose another model",
        )
    linears = {name for some in names.values() for name in some}
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in linears}
    wanted = settings.targets
    if isinstance(wanted, str):
        wanted = tuple(names.keys() - refused.keys())
    for target in wanted:
        if target not in names:
            raise RecipeError(
                f"{target!r} is no linear inside the blocks of this model",
                where="method.targets",
                remedy=nearest(target, names),
            )
        if target in refused:
            raise RecipeError(
                f"{target!r} of {model.config.model_type} cannot have a LoRA: {refused[target]}",
                where="method.targets",
                remedy="leave it out",
            )
    modules = [
        name
        for target in wanted
        if target not in taken
        for name in (names[target] if target in others else [target])
    ]
    chosen = tuple(f"{block}." for block in chosen_blocks(model, settings))
    parameters = [
        f"{name}.weight"
        for target in wanted
        if target in taken
        for name in names[target]
        if name.startswith(chosen)
    ]
    return sorted(modules), sorted(parameters)


def chosen_blocks(model: PreTrainedModel, settings: Lora) -> list[str]:
    """Return the names of the blocks to adapt.

    Raises:
        RecipeError: For a block that the model has not.
    """
    blocks = list(transformer_blocks(model))
    for number in settings.layers_to_transform:
        if number >= len(blocks):
            raise RecipeError(
                f"the model has no block {number}",
                where="method.layers_to_transform",
                remedy=f"choose from 0 to {len(blocks) - 1}",
            )
    return [blocks[number] for number in settings.layers_to_transform] or blocks


def check_choice(model: PreTrainedModel, settings: Lora, targets: list[str]) -> None:
    """Refuse patterns that match no linear, where PEFT would leave them unread.

    Raises:
        RecipeError: Naming the pattern.
    """
    names = [
        f"{block_name}.{name}"
        for block_name in chosen_blocks(model, settings)
        for name, module in model.get_submodule(block_name).named_modules()
        if (isinstance(module, FrozenLinear4bit) or is_linear(module))
        and name.split(".")[-1] in targets
    ]
    for field in ("exclude_modules", "rank_pattern", "alpha_pattern"):
        for end in getattr(settings, field):
            # PEFT takes a pattern as a regular expression, which a name is not meant to be.
            if not all(part.isidentifier() or part.isdecimal() for part in end.split(".")) or not (
                any(f".{name}".endswith(f".{end}") for name in names)
            ):
                raise RecipeError(
                    f"{end!r} is no adapted linear, nor the end of its name",
                    where=f"method.{field}",
                    remedy=nearest(end, targets),
                )


def has_bias(model: PreTrainedModel, wanted: str, targets: list[str]) -> bool:
    """Whether there is a bias that PEFT would train: any, or that of an adapted linear."""
    return any(
        name.rpartition(".")[2] == "bias" and (wanted == "all" or name.split(".")[-2] in targets)
        for name, _ in model.named_parameters()
    )
