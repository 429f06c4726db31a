"""Trained rows of the vocabulary: what a token embedding and an output matrix have beside the base.

PEFT wraps either where it is trained whole (`modules_to_save`) or some rows of it are
(`trainable_token_indices`). Here is how they are computed, and what the loss multiplies with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError
from peft_dist.model.gathered import ScoresInSlices, gathered, scorer_of


class TokenRows(TrainableTokensLayer):
    """Trained rows of a vocabulary matrix, in place of those of the base.

    PEFT's own forward copies the whole matrix at every pass, and has a gradient for all of it.
    """

    token_ids: torch.Tensor
    """int64 [n], whose rows are trained."""
    row_of: torch.Tensor
    """int32 [V], the trained row of each token; -1 for one of the base's."""

    @classmethod
    def take_over(cls, layer: TrainableTokensLayer) -> None:
        """Make this of a layer that PEFT has just injected on `meta`."""
        (adapter,) = layer.token_indices
        layer.__class__ = cls
        base: Any = layer.get_base_layer()
        ids = torch.tensor(layer.token_indices[adapter])
        row_of = torch.full((base.weight.shape[0],), -1, dtype=torch.int32)
        row_of[ids] = torch.arange(len(ids), dtype=torch.int32)
        layer.register_buffer("token_ids", ids, persistent=False)
        layer.register_buffer("row_of", row_of, persistent=False)
        if layer.tied_adapter is None:
            del layer.trainable_tokens_original[adapter]  # for unmerging, which nothing here does

    @property
    def rows(self) -> nn.Parameter | None:
        """The trained rows, float32 [n, H]; None while the adapter is off."""
        if self.disable_adapters or not self.active_adapters:
            return None
        rows: nn.Parameter = self.trainable_tokens_delta[self.active_adapters[0]]
        return rows

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Look ids up, or multiply hidden states [..., H], as the base does; then with our rows."""
        out: torch.Tensor = self.base_layer(x, *args, **kwargs)
        rows = self.rows
        if rows is None:
            return out
        if not isinstance(self.base_layer, nn.Embedding):
            return out.index_copy(-1, self.token_ids, functional.linear(x, rows.to(x.dtype)))
        at = self.row_of[x]
        own = functional.embedding(at.clamp(min=0), rows)
        scale = self._get_embed_scale()  # type: ignore[no-untyped-call]  # of PEFT
        own = own if scale is None else own * scale
        return torch.where((at >= 0)[..., None], own.to(out.dtype), out)


class OutputMatrix(NamedTuple):
    """What hidden states are multiplied with.

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        ids: int64 [n], tokens whose rows stand in `rows` instead; or None.
        rows: float32 [n, H], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def of(self, tokens: torch.Tensor | slice) -> "OutputMatrix":
        """Return the matrix of some tokens, [C] of them, or of all."""
        if isinstance(tokens, slice):
            return self
        weight = self.weight[tokens]
        if self.ids is not None and self.rows is not None:
            same = tokens[:, None] == self.ids
            own = self.rows[same.int().argmax(1)].to(weight.dtype)
            weight = torch.where(same.any(1)[:, None], own, weight)
        return OutputMatrix(weight, None if self.bias is None else self.bias[tokens])

    def whole(self) -> torch.Tensor:
        """Return [V, H] with the trained rows in their places."""
        if self.ids is None or self.rows is None:
            return self.weight
        return self.weight.index_copy(0, self.ids, self.rows.to(self.weight.dtype))


def output_matrix(model: PreTrainedModel) -> OutputMatrix:
    """Return the matrix at the end of a causal language model, with what is trained of it.

    An engine may hold a part of it alone; `whole_matrix` has all.

    Raises:
        RecipeError: For an adapter on it, which a product with this matrix would leave out.
    """
    head, ids, rows = _output(model)
    return OutputMatrix(head.weight, head.bias, ids, rows)


@contextmanager
def whole_matrix(model: PreTrainedModel) -> Iterator[OutputMatrix]:
    """Have the matrix at the end of a causal language model whole. Collective."""
    head, ids, rows = _output(model)
    with gathered(head):
        yield OutputMatrix(head.weight, head.bias, ids, rows)


def scorer_of_output(model: PreTrainedModel) -> ScoresInSlices | None:
    """Return what scores positions against slices of the output matrix, where nothing does else."""
    head, ids, _ = _output(model)
    return scorer_of(head) if ids is None else None


def _output(model: PreTrainedModel) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
    """Return the module that holds the output matrix, and what is trained of its rows."""
    head: Any = model.get_output_embeddings()
    ids = rows = None
    if isinstance(head, TrainableTokensWrapper):
        layer = head.token_adapter
        assert isinstance(layer, TokenRows)
        ids, rows, head = layer.token_ids, layer.rows, layer.get_base_layer()
    elif isinstance(head, ModulesToSaveWrapper):
        off = head.disable_adapters or not head.active_adapters
        head = head.original_module if off else head.modules_to_save[head.active_adapters[0]]
    inside = [name for name, one in head.named_parameters() if one.requires_grad]
    odd = [name for name in inside if name not in ("weight", "bias")]
    if odd or isinstance(head, AuxiliaryTrainingWrapper):
        raise RecipeError(
            f"puts {(odd or ['an adapter'])[0]} on the output head, which the loss reads by its "
            "weight alone",
            where="method",
            remedy="choose modules inside the transformer blocks, or method.modules_to_save",
        )
    return head, ids, rows
