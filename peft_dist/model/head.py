"""From a decoder's hidden states to its logits, by the model's own code around its output matrix.

Models scale their logits, squeeze them by a tanh, or pass hidden states through another layer
first. None of that is listed here: the model's own forward is run with a stand-in for its trunk and
one for its output matrix, so that what is left is what the model does before and after the matrix.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import ModelError
from peft_dist.model.architectures import module_name, trunk_name
from peft_dist.model.token_rows import output_matrix, whole_matrix

_PROBE_TOKENS = 3


class Head:
    """What stands around a model's output matrix.

    Attributes:
        before: Maps hidden states [N, H] to what the matrix is multiplied with; None where that is
            the hidden states themselves.
        after: Maps the products, float [N, V], to logits; None where these are the logits.
    """

    before: Callable[[torch.Tensor], torch.Tensor] | None
    after: Callable[[torch.Tensor], torch.Tensor] | None
    by_token: bool
    """Whether `after` maps each token's products by themselves, so that a slice of them may do;
    some models mask tokens by their ids."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Look at a model, on `meta` or not; its adapters must be there already.

        Raises:
            ModelError: Where its forward does not end in one matrix.
        """
        matrix = model.get_output_embeddings()
        self._model, self._matrix_name = model, module_name(model, matrix)
        self._trunk_name = trunk_name(model)
        if matrix is None or not self._matrix_name or not self._trunk_name:
            raise _refusal(model, "has no output matrix that can be found")
        hidden = torch.linspace(-1, 1, _PROBE_TOKENS * 8).view(_PROBE_TOKENS, 8)
        products = torch.linspace(-9, 9, _PROBE_TOKENS * matrix.weight.shape[0])
        products = products.view(_PROBE_TOKENS, -1)
        self.before = self._before
        self.after = self._after
        try:
            try:
                if torch.equal(self._before(hidden), hidden):
                    self.before = None
            except RuntimeError:
                pass  # a layer of other width, or without memory yet: it is there
            if torch.equal(self._after(products), products):
                self.after = None
            self.by_token = self.after is None or self._maps_by_token(products)
        except Exception as error:  # each model fails in its own way
            if isinstance(error, ModelError):
                raise
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise _refusal(model, f"cannot be parted from its trunk ({line})") from None

    def _before(self, hidden: torch.Tensor) -> torch.Tensor:
        matrix = _Input(hidden)
        try:
            self._run(hidden, matrix)
        except _Reached:
            return matrix.seen.flatten(0, 1)
        raise _refusal(self._model, "does not multiply with its output matrix")

    def _after(self, products: torch.Tensor) -> torch.Tensor:
        # What comes before the matrix is run as well, for nothing; few models have anything there.
        width = 1 if self.before is None else self._model.config.hidden_size
        like = next(self._model.parameters())
        device = like.device if self.before is not None and like.is_meta else products.device
        nothing = torch.zeros(len(products), width, dtype=like.dtype, device=device)
        return self._run(nothing, _Output(products[None])).flatten(0, 1)

    def _maps_by_token(self, products: torch.Tensor) -> bool:
        """Whether a slice of the products gives the slice of the logits."""
        whole, middle = self._after(products), products.shape[1] // 2
        try:
            return all(
                torch.equal(self._after(products[:, part].contiguous()), whole[:, part])
                for part in (slice(middle), slice(middle, None), slice(1, 2))
            )
        except (RuntimeError, IndexError):
            return False  # it counts on the tokens that it knows

    def _run(self, hidden: torch.Tensor, matrix: nn.Module) -> torch.Tensor:
        """Run the model's own forward with stand-ins for its trunk and output matrix."""
        model = self._model
        trunk = model.get_submodule(self._trunk_name)
        parts = {self._trunk_name: _Trunk(hidden[None], trunk), self._matrix_name: matrix}
        tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        # Not called as a module: an engine's hooks are for the whole model.
        out = type(model).forward(_with_parts(model, parts), input_ids=tokens)
        logits: torch.Tensor = out.logits
        return logits


def _refusal(model: PreTrainedModel, problem: str) -> ModelError:
    return ModelError(
        f"the head of {type(model).__name__} {problem}",
        where="model.name",
        remedy="choose another model",
    )


class _Reached(Exception):
    """The output matrix was reached; what comes after it does not matter."""


class _Input(nn.Module):
    """Stands for the output matrix, and keeps what it is multiplied with."""

    seen: torch.Tensor

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.weight = hidden.new_empty(0)  # some models ask for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.seen = hidden
        raise _Reached


class _Output(nn.Module):
    """Stands for the output matrix, and gives products made elsewhere."""

    def __init__(self, products: torch.Tensor) -> None:
        super().__init__()
        self.products = products
        self.weight = products.new_empty(0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.products


class _TrunkOutput:
    """Hidden states, and nothing of all else that a trunk may give."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state, None, None)[index]


class _Trunk(nn.Module):
    """Stands for the trunk, and for any part of it that the model calls by name."""

    def __init__(self, hidden: torch.Tensor, trunk: nn.Module) -> None:
        super().__init__()
        self.hidden = hidden
        self.__dict__["trunk"] = trunk  # not as a part of this one

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["trunk"], name)
        return self if isinstance(value, nn.Module) else value

    def forward(self, *_: Any, **__: Any) -> _TrunkOutput:
        return _TrunkOutput(self.hidden)


def _with_parts(model: nn.Module, parts: dict[str, nn.Module]) -> Any:
    """Return the model with other modules in places; all else is shared with it."""
    changed = _shallow(model)
    for name, part in parts.items():
        *parents, last = name.split(".")
        at = changed
        for parent in parents:
            at._modules[parent] = _shallow(at._modules[parent])
            at = at._modules[parent]
        at._modules[last] = part
    return changed


def _shallow(module: Any) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


class _WideMatrix(nn.Module):
    """The output matrix, used as wide as the hidden states are where it is stored narrower."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not as a part of this one
        self.weight = output_matrix(model).weight  # some models ask for its dtype

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with whole_matrix(self.__dict__["model"]) as matrix:
            bias = None if matrix.bias is None else matrix.bias.to(hidden.dtype)
            return nn.functional.linear(hidden, matrix.whole().to(hidden.dtype), bias)


def with_wide_matrix(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the model's own forward; its output matrix may be stored narrower than it computes."""
    matrix = model.get_output_embeddings()
    wide = _WideMatrix(model)
    changed = _with_parts(model, {module_name(model, matrix): wide})

    def forward(**arguments: Any) -> Any:
        return type(model).forward(changed, **arguments)

    return forward
