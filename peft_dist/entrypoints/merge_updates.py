"""What LoRA does to the tensors of the files, which may keep a weight in several pieces.

An update is two factors, so a piece of it is a piece of one of them: it follows a weight to the
tensors that the weight is made of, and never stands whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from peft_dist.common.errors import ModelError
from peft_dist.model.stored import Joined, RowTensor, Stacked, Stored, Turned

Change = Callable[[torch.Tensor], torch.Tensor]
"""Returns what stands in a tensor's place, given the base's."""


@dataclass(frozen=True)
class Update:
    """What LoRA does to one weight.

    Attributes:
        a: float32 [r, in].
        b: float32 [out, r].
        scaling: Factor of B @ A.
        magnitude: float32 [out], the norm of every row with DoRA; None without.
        transposed: Whether the weight is kept [in, out], as GPT-2's are.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None
    transposed: bool

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight, in float32 and as the given one is laid out."""
        rows = weight.float().t() if self.transposed else weight.float()
        rows = torch.addmm(rows, self.b, self.a, alpha=self.scaling)
        if self.magnitude is not None:
            rows *= (self.magnitude / rows.norm(dim=1))[:, None]  # DoRA, arXiv 2402.09353, eq. 5
        return rows.t() if self.transposed else rows


def weight_of(module: str, config: LoraConfig, skeleton: PreTrainedModel) -> str:
    """Return the name of the weight that a LoRA of PEFT's file is for.

    Those on several parameters of one module lie inside each other, the first one innermost.
    """
    plain = module.replace(".base_layer", "")
    inside = module.count(".base_layer")
    try:
        parameters = skeleton.get_submodule(plain)._parameters
    except AttributeError:
        return f"{plain}.weight"
    wanted = set(config.target_parameters or ())
    adapted = [name for name in parameters if f"{plain}.{name}" in wanted]
    if not adapted:
        return f"{plain}.weight"
    return f"{plain}.{adapted[len(adapted) - 1 - inside]}"


def changes_of(
    name: str, source: RowTensor, left: torch.Tensor, right: torch.Tensor
) -> Iterator[tuple[str, Change]]:
    """Yield, for each file tensor that a weight is made of, what is added to it.

    Args:
        name: Of the weight, for errors.
        source: What it is made of.
        left: [..., rows, r].
        right: [..., r, columns].

    Raises:
        ModelError: For a tensor that does not add up from its parts.
    """
    last = len(source.shape) - 1
    if isinstance(source, Stored):
        yield source.key, lambda stored: stored.float() + left @ right
    elif isinstance(source, Stacked):
        for part, rows, columns in zip(source.parts, left, right, strict=True):
            yield from changes_of(name, part, rows, columns)
    elif isinstance(source, Turned) and sorted(source.dims) == [last - 1, last]:
        (whole,) = source.parts
        yield from changes_of(name, whole, right.transpose(-1, -2), left.transpose(-1, -2))
    elif isinstance(source, Joined):
        sizes = [part.shape[source.dim] for part in source.parts]
        lefts, rights = [left] * len(sizes), [right] * len(sizes)
        dim = source.dim % len(source.shape)
        if dim < last:
            lefts = list(left.split(sizes, dim=dim))
        if dim != last - 1:
            rights = list(right.split(sizes, dim=dim))
        for part, rows, columns in zip(source.parts, lefts, rights, strict=True):
            yield from changes_of(name, part, rows, columns)
    else:
        raise ModelError(
            f"{name} is made of other tensors of the files, into which nothing can be merged",
            where="model.name",
            remedy="use the adapter beside its base",
        )
