"""From hidden states to losses: what a wrapped model computes for one micro-batch.

The vocabulary is only scored at positions that have a target, in chunks, so that the logits of a
long batch never stand in memory at once. No optimisation and no reduction over processes here.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from peft_dist.common.errors import RecipeError
from peft_dist.data.pack import Batch
from peft_dist.model.architectures import bare_model, trunk_name
from peft_dist.model.attention import OURS
from peft_dist.model.head import Head

LOGIT_BYTES_PER_CHUNK = 256 << 20
"""Float32 logits that stand in memory at once."""
CAST_BYTES = 4 << 20
"""Bytes of the head that are cast at once where it is stored narrower than it computes."""
ALL_TOKENS = slice(None)
"""As choices: the whole vocabulary, without a copy of the head."""


class Losses(NamedTuple):
    """What one pass gives.

    Attributes:
        nll: float32 [N], negative log-likelihood of each target; of a reward model [n_rows], each
            row's reward with its sign turned.
        choice_logits: float32 [n_rows, n_choices], scores at each row's first target; or None.
    """

    nll: torch.Tensor
    choice_logits: torch.Tensor | None


def _vocabulary_parts(
    weight: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the head in the dtype that computes: as it is, or cast part by part.

    A cast part is used while it stands in the processor's cache; a cast head would be written to
    memory and read again.
    """
    rows = weight.shape[0]
    if weight.dtype != dtype:
        rows = max(1, CAST_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        yield part, weight[part].to(dtype)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return float32 logits [N, V] of hidden [N, H]."""
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
    for part, rows in _vocabulary_parts(weight, hidden.dtype):
        logits[:, part] = hidden @ rows.t()
    return logits if bias is None else logits.add_(bias)


def _times_vocabulary(step: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return step [N, V] times the head [V, H]."""
    total: torch.Tensor | None = None
    for part, rows in _vocabulary_parts(weight, step.dtype):
        total = step[:, part] @ rows if total is None else total.addmm_(step[:, part], rows)
    assert total is not None
    return total


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of hidden [N, H] against a frozen head [V, H] without [N, V] logits.

    The gradient for `hidden` is made chunk by chunk during forward, while the logits of that
    chunk stand; backward only scales it. The head is frozen and gets none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        after: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> torch.Tensor:
        rows = max(1, LOGIT_BYTES_PER_CHUNK // (4 * weight.shape[0]))
        wants_grad = ctx.needs_input_grad[0]
        nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        grad = torch.empty_like(hidden) if wants_grad else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            products = _logits(hidden[part], weight, bias)
            if after is None:
                logits = products
            else:
                with torch.set_grad_enabled(wants_grad):
                    logits = after(products.requires_grad_(wants_grad))
            values = logits.detach()
            log_norm = torch.logsumexp(values, dim=-1)
            picked = values.gather(1, targets[part, None]).squeeze(1)
            nll[part] = log_norm - picked
            if grad is not None:
                step = torch.exp(values - log_norm[:, None])
                step[torch.arange(step.shape[0], device=step.device), targets[part]] -= 1.0
                if after is not None:
                    (step,) = torch.autograd.grad(logits, products, step)
                grad[part] = _times_vocabulary(step.to(hidden.dtype), weight)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_nll[:, None].to(grad.dtype), None, None, None, None


def _learned(peft: PeftModel, device: torch.device) -> torch.Tensor:
    """Return what PEFT's encoder gives for each virtual token, [P, width]."""
    positions = torch.arange(peft.active_peft_config.num_virtual_tokens, device=device)
    learned: torch.Tensor = peft.prompt_encoder[peft.active_adapter](positions)
    return learned


def _inputs(peft: PeftModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Return the tokens of a `Batch`, or their embeddings with the learned ones in their places."""
    if batch.virtual_positions is None:
        return {"input_ids": batch.input_ids}
    embedded: torch.Tensor = bare_model(peft).get_input_embeddings()(batch.input_ids)
    learned = _learned(peft, embedded.device).to(embedded.dtype)
    rows = len(batch.virtual_positions) // len(learned)
    flat = embedded.flatten(0, 1).index_copy(0, batch.virtual_positions, learned.repeat(rows, 1))
    return {"inputs_embeds": flat.view_as(embedded)}


def _prefix(peft: PeftModel, device: torch.device) -> tuple[torch.Tensor, ...] | None:
    """Return each layer's learned keys and values, [2, key-value heads, P, head size]."""
    config = peft.active_peft_config
    if not (isinstance(config, PrefixTuningConfig) and peft.has_active_enabled_adapter):
        return None
    learned = _learned(peft, device)
    layers, heads = config.num_layers, config.num_attention_heads
    assert layers is not None and heads is not None, config  # PEFT took them from the model
    parts = learned.view(len(learned), layers, 2, heads, -1)
    return parts.permute(1, 2, 3, 0, 4).unbind(0)


def _refuse_trained_head(head: nn.Module) -> None:
    """Refuse what the loss would leave untrained without a word: it reads the head's weight alone.

    Raises:
        RecipeError: Naming what is trained.
    """
    trained = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    if trained:
        raise RecipeError(
            f"trains {trained[0]} of the output head, which the loss takes for frozen",
            where="method",
            remedy="choose modules inside the transformer blocks",
        )


class Decoder(nn.Module, ABC):
    """A decoder with its adapters, without its head.

    The one module an engine wraps: a head is used inside its forward, where a sharding engine has
    gathered it.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        """Take a model that has its adapters already."""
        super().__init__()
        self.peft = peft_model
        model = bare_model(peft_model)
        self._trunk_name = trunk_name(model)
        trunk = model.get_submodule(self._trunk_name)
        taken = inspect.signature(trunk.forward).parameters.values()
        self._takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken)
        self._takes = {one.name for one in taken}

    def forward(
        self,
        batch: Batch,
        choice_ids: torch.Tensor | slice | None = None,
        instead: Callable[[PreTrainedModel, Batch], Losses] | None = None,
    ) -> Losses:
        """Score a `Batch`.

        Args:
            batch: The rows.
            choice_ids: Token ids [C] of the single-token choices that rows are scored against.
            instead: What to do with the bare model instead, here where an engine has gathered
                what stands outside its blocks.
        """
        model = bare_model(self.peft)
        if instead is not None:
            return instead(model, batch)
        return self._scored(model, batch, choice_ids)

    @abstractmethod
    def _scored(
        self, model: PreTrainedModel, batch: Batch, choice_ids: torch.Tensor | slice | None
    ) -> Losses:
        """Return what `forward` does, from the bare model."""

    def _hidden(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, T, H] of the model's trunk."""
        prefix = _prefix(self.peft, batch.position_ids.device)
        arguments: dict[str, Any] = {
            # A prefix takes the first positions.
            "position_ids": batch.position_ids + (0 if prefix is None else prefix[0].shape[2]),
            "attention_mask": batch.attention_mask,
            "use_cache": False,
            **self._row_arguments(model, batch),
        }
        if prefix is not None:
            arguments["prefix"] = prefix
        if not self._takes_any:  # what it needs and does not take, the proof at the start finds
            arguments = {name: arguments[name] for name in arguments.keys() & self._takes}
        trunk = model.get_submodule(self._trunk_name)
        out = trunk(**_inputs(self.peft, batch), **arguments)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def _row_arguments(self, model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
        """Return how this kernel gets to know where packed rows begin.

        Flash attention would find out by itself, in every layer, waiting for the device.
        """
        kernel = model.config._attn_implementation
        if kernel in OURS:
            return {"row_lengths": batch.row_lengths, "row_bounds": batch.row_bounds}
        if kernel == "flash_attention_2" and batch.row_lengths is not None:
            longest = max(batch.row_lengths)
            return {
                "cu_seq_lens_q": batch.row_bounds,
                "cu_seq_lens_k": batch.row_bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return {}


class CausalLM(Decoder):
    """A causal language model with its adapters, as a function from a batch to its losses."""

    def __init__(self, peft_model: PeftModel) -> None:
        """Take a model that has its adapters already.

        Raises:
            RecipeError: For one whose output head is trained, or has an adapter.
        """
        super().__init__(peft_model)
        model = bare_model(peft_model)
        _refuse_trained_head(model.get_output_embeddings())
        self._head = Head(model)

    def _scored(
        self, model: PreTrainedModel, batch: Batch, choice_ids: torch.Tensor | slice | None
    ) -> Losses:
        """Return the loss of each target, and the choices' scores at each row's first."""
        hidden = self._hidden(model, batch)
        head = model.get_output_embeddings()
        picked = hidden.flatten(0, 1)[batch.label_positions]
        if self._head.before is not None:
            picked = self._head.before(picked)
        if batch.label_positions.numel() == 0:
            # Every process must take part in the same collectives, with work or without.
            return Losses(hidden.float().sum()[None] * 0.0, None)
        if torch.is_autocast_enabled(picked.device.type):
            picked = picked.to(torch.get_autocast_dtype(picked.device.type))
        nll: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # it is torch's
            picked, head.weight, head.bias, batch.targets, self._head.after
        )
        choice_logits = None
        if choice_ids is not None:
            rows = torch.arange(batch.n_rows, device=picked.device)
            first = picked[torch.searchsorted(batch.target_rows, rows)]
            if self._head.after is None:
                bias = None if head.bias is None else head.bias[choice_ids]
                choice_logits = _logits(first, head.weight[choice_ids], bias)
            else:
                logits = self._head.after(_logits(first, head.weight, head.bias))
                choice_logits = logits[:, choice_ids]
        return Losses(nll, choice_logits)


class SequenceClassifier(nn.Module):
    """An encoder with a classification head, as a function from a batch to its losses."""

    def __init__(self, peft_model: PeftModel) -> None:
        """Take a model that has its adapters already."""
        super().__init__()
        self.peft = peft_model

    def forward(
        self,
        batch: Batch,
        choice_ids: torch.Tensor | slice | None = None,
        instead: Callable[[PreTrainedModel, Batch], Losses] | None = None,
    ) -> Losses:
        """Score a `Batch`; the choices are always all classes. For `instead` see `CausalLM`."""
        model = bare_model(self.peft)
        if instead is not None:
            return instead(model, batch)
        inputs = _inputs(self.peft, batch)
        logits: torch.Tensor = model(**inputs, attention_mask=batch.attention_mask).logits.float()
        if batch.targets.numel() == 0:
            return Losses(logits.sum()[None] * 0.0, None)
        return Losses(functional.cross_entropy(logits, batch.targets, reduction="none"), logits)


class RewardModel(Decoder):
    """A decoder with a head of one number, as a function from a batch to its rows' rewards.

    The reward is read where transformers reads it: at the last token that is not the pad token of
    the model's configuration.
    """

    def _scored(
        self, model: PreTrainedModel, batch: Batch, choice_ids: torch.Tensor | slice | None
    ) -> Losses:
        """Return each row's reward as `choice_logits` [n_rows, 1], and turned as `nll`."""
        hidden = self._hidden(model, batch).flatten(0, 1)
        score: Any = model.score
        rewards = score(hidden[self._ends(batch)]).float()
        if not batch.n_rows:
            return Losses(rewards.sum()[None] * 0.0, None)
        return Losses(-rewards[:, 0], rewards)

    def _ends(self, batch: Batch) -> torch.Tensor:
        """Return where in [B * T] each row's reward is read."""
        ids = batch.input_ids.flatten()
        at = torch.arange(len(ids), device=ids.device, dtype=torch.int32)
        if batch.row_bounds is None:
            rows, count = at // batch.input_ids.shape[1], len(batch.input_ids)
        else:
            rows = torch.bucketize(at, batch.row_bounds[1:], right=True)
            count = len(batch.row_bounds) - 1
        pad = bare_model(self.peft).config.pad_token_id
        real = torch.ones_like(ids, dtype=torch.bool) if pad is None else ids != pad
        if batch.attention_mask is not None:  # rows may be padded with another token
            real = real & batch.attention_mask.flatten().bool()
        none = torch.zeros(count, dtype=at.dtype, device=at.device)
        return none.scatter_reduce(0, rows.long(), at * real, "amax").long()
