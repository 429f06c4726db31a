"""The sizes of an adapter, from the method section of a recipe and the shape of its base."""

from dataclasses import dataclass

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.method import BitFit, Bottleneck, Lora, Method, Prefix, Prompt
from peft_dist.plan.shapes import Linear, ModelShape


@dataclass(frozen=True)
class AdapterShape:
    """What is trained."""

    parameters: int
    """In all."""
    input_parameters: int = 0
    """Of these, of LoRA's A: what autocast keeps a copy of during a whole forward pass."""
    targets: tuple[Linear, ...] = ()
    """Linears of a block that LoRA goes beside."""
    rank: int = 0
    drops: bool = False
    """Whether each target keeps a copy of its own of what it reads, and which values it dropped."""
    weighs: bool = False
    """Whether LoRA's magnitudes are trained too (DoRA)."""
    virtual_tokens: int = 0
    """Positions that every row has besides its tokens."""
    kept_per_token: int = 0
    """Values of compute dtype per token and block that the adapter keeps for backward."""


def adapter_shape(method: Method, shape: ModelShape) -> AdapterShape | None:
    """Return what a method trains on a base; None where only PEFT knows.

    Raises:
        RecipeError: For a target that the model has not.
    """
    if isinstance(method, Lora):
        return _lora(method, shape)
    hidden, layers = shape.hidden, shape.layers
    if isinstance(method, Bottleneck):
        inner = method.bottleneck_size or hidden // (method.reduction_factor or 16)
        places = 2 if method.placement == "houlsby" else 1
        one = 2 * hidden * inner + inner + hidden
        return AdapterShape(layers * places * one, kept_per_token=places * (hidden + 2 * inner))
    if isinstance(method, Prefix):
        values = method.virtual_tokens * layers * 2 * shape.key_width
        if method.projection:
            inner = method.projection_size or hidden
            wide = layers * 2 * shape.key_width
            values = method.virtual_tokens * hidden + hidden * inner + inner + inner * wide + wide
        return AdapterShape(values, kept_per_token=2 * shape.key_width)
    if isinstance(method, Prompt):
        return AdapterShape(method.virtual_tokens * hidden, virtual_tokens=method.virtual_tokens)
    if isinstance(method, BitFit):
        if method.targets != "all":
            return None
        biased = [one for one in shape.linears if one.bias or method.add_bias]
        norms = 0 if shape.float32_norms else 2 * hidden
        return AdapterShape(layers * (sum(one.out_features for one in biased) + norms))
    return None


def _vocabulary_rows(method: Lora, shape: ModelShape) -> int | None:
    """Return the trained rows of embedding and head; None where other modules are trained."""
    if not set(method.modules_to_save) <= {"embed_tokens", "lm_head"}:
        return None
    matrices = shape.vocabulary_matrices
    whole = min(len(set(method.modules_to_save)), matrices) * shape.vocabulary
    return whole + len(set(method.trainable_tokens)) * matrices


def _lora(method: Lora, shape: ModelShape) -> AdapterShape | None:
    rows = _vocabulary_rows(method, shape)
    if rows is None:
        return None
    names = {linear.name for linear in shape.linears}
    if method.targets == "all-linear":
        wanted = names
    else:
        wanted = set(method.targets)
        for name in method.targets:
            if name not in names:
                raise RecipeError(
                    f"{name!r} is no linear of {shape.model_type}",
                    where="method.targets",
                    remedy=nearest(name, names),
                )
    # Experts of a block are no linears by name: they get none.
    targets = tuple(one for one in shape.linears if one.name in wanted and one.copies == 1)
    inputs = shape.layers * method.rank * sum(one.in_features for one in targets)
    outputs = shape.layers * method.rank * sum(one.out_features for one in targets)
    magnitudes = shape.layers * sum(one.out_features for one in targets) if method.dora else 0
    return AdapterShape(
        inputs + outputs + magnitudes + rows * shape.hidden,
        input_parameters=inputs,
        targets=targets,
        rank=method.rank,
        drops=method.dropout > 0,
        weighs=method.dora,
    )
