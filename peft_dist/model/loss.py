"""From hidden states to losses: what a wrapped model computes for one micro-batch.

The vocabulary is only scored at positions that have a target. No optimisation and no reduction over
processes here.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel, PrefixTuningConfig
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from peft_dist.data.pack import Batch
from peft_dist.model import capped
from peft_dist.model.architectures import bare_model, trunk_name
from peft_dist.model.attention import OURS, VARLEN_ATTENTION
from peft_dist.model.cross_entropy import cross_entropy, logits_of
from peft_dist.model.gathered import ScoresInSlices, bytes_of_position
from peft_dist.model.head import Head
from peft_dist.model.router import Routing, router_term
from peft_dist.model.token_rows import OutputMatrix, output_matrix, scorer_of_output, whole_matrix

ALL_TOKENS = slice(None)
"""As choices: the whole vocabulary, without a copy of the head."""


class Losses(NamedTuple):
    """What one pass gives.

    Attributes:
        nll: float32 [N], negative log-likelihood of each target; of a reward model [n_rows], each
            row's reward with its sign turned.
        choice_logits: float32 [n_rows, n_choices], scores at each row's first target; or None.
        routing: What the routers made of all tokens, where the model trains them evenly; or None.
    """

    nll: torch.Tensor
    choice_logits: torch.Tensor | None
    routing: Routing | None = None


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

    def _trunk(self, model: PreTrainedModel, batch: Batch) -> Any:
        """Return what the model's trunk gives, of which hidden states [B, T, H]."""
        prefix = _prefix(self.peft, batch.position_ids.device)
        learned = 0 if prefix is None else prefix[0].shape[2]
        arguments: dict[str, Any] = {
            # A prefix takes the first positions.
            "position_ids": batch.position_ids + learned,
            "attention_mask": batch.attention_mask,
            "use_cache": False,
            **self._row_arguments(model, batch, learned),
        }
        if prefix is not None:
            arguments["prefix"] = prefix
        elif batch.row_lengths is None:
            # Rows begin where the model takes them to; RoBERTa's positions do not begin at 0.
            del arguments["position_ids"]
        if not self._takes_any:  # what it needs and does not take, the proof at the start finds
            arguments = {name: arguments[name] for name in arguments.keys() & self._takes}
        trunk = model.get_submodule(self._trunk_name)
        return trunk(**_inputs(self.peft, batch), **arguments)

    def _row_arguments(self, model: PreTrainedModel, batch: Batch, learned: int) -> dict[str, Any]:
        """Return how this kernel gets to know where packed rows begin.

        Flash attention would find out by itself, in every layer, waiting for the device.
        """
        kernel = model.config._attn_implementation
        longest = max(batch.row_lengths or (0,))
        if kernel in OURS:
            arguments = {
                "row_lengths": batch.row_lengths,
                "row_bounds": batch.row_bounds,
                "longest_row": longest,
            }
            if kernel == VARLEN_ATTENTION and batch.row_lengths is not None:
                arguments |= _row_blocks(model.config, batch, learned)
            return arguments
        if kernel == "flash_attention_2" and batch.row_lengths is not None:
            return {
                "cu_seq_lens_q": batch.row_bounds,
                "cu_seq_lens_k": batch.row_bounds,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return {}


def _row_blocks(config: PretrainedConfig, batch: Batch, learned: int) -> dict[str, Any]:
    """Return who sees whom by the windows of layers, for a model that caps its scores."""
    cap, positions = capped.cap_of(config), batch.position_ids[0]
    if cap is None:
        return {}
    return {
        "row_blocks": {
            window: capped.row_blocks(positions, window=window, learned=learned, softcap=cap)
            for window in capped.windows_of(config)
        }
    }


class CausalLM(Decoder):
    """A causal language model with its adapters, as a function from a batch to its losses."""

    def __init__(self, peft_model: PeftModel) -> None:
        """Take a model that has its adapters already.

        Raises:
            RecipeError: For one whose output head has an adapter.
        """
        super().__init__(peft_model)
        model = bare_model(peft_model)
        output_matrix(model)
        self._head = Head(model)
        self.router_term = router_term(model)

    def route(self, model: PreTrainedModel, batch: Batch) -> Losses:
        """Return what routers make of a `Batch`, and no losses."""
        out = self._trunk(model, batch)
        return Losses(out.last_hidden_state.new_empty(0), None, self._routing(out, batch))

    def _routing(self, out: Any, batch: Batch) -> Routing | None:
        """Return what routers made of a `Batch`; nothing of the stand-in for an empty one."""
        if self.router_term is None:
            return None
        mask = batch.attention_mask
        if not batch.n_rows:
            mask = torch.zeros_like(batch.position_ids, dtype=torch.bool)
        return self.router_term.routing(out.router_logits, mask)

    def _scored(
        self, model: PreTrainedModel, batch: Batch, choice_ids: torch.Tensor | slice | None
    ) -> Losses:
        """Return the loss of each target, and the choices' scores at each row's first."""
        out = self._trunk(model, batch)
        hidden, routing = out.last_hidden_state, self._routing(out, batch)
        picked = hidden.flatten(0, 1)[batch.label_positions]
        if self._head.before is not None:
            picked = self._head.before(picked)
        if torch.is_autocast_enabled(picked.device.type):
            picked = picked.to(torch.get_autocast_dtype(picked.device.type))
        # Every process takes part in the same collectives, with work or without.
        nothing = hidden.float().sum()[None] * 0.0 if not batch.targets.numel() else None
        scorer, everyone = self._scorer(model), batch.everyone
        if (
            scorer
            and everyone
            and choice_ids is None
            and scorer.pays(everyone, bytes_of_position(picked))
        ):
            most = everyone.most_targets
            nll = scorer.cross_entropy(picked, batch.targets, self._head.after, most)
            return Losses(nll if nothing is None else nothing, None, routing)
        with whole_matrix(model) as matrix:
            if nothing is not None:
                return Losses(nothing, None, routing)
            nll = cross_entropy(picked, matrix, batch.targets, self._head.after)
            choice_logits = None
            if choice_ids is not None:
                rows = torch.arange(batch.n_rows, device=picked.device)
                first = picked[torch.searchsorted(batch.target_rows, rows)]
                choice_logits = self._logits_of_choices(first, matrix, choice_ids)
        return Losses(nll, choice_logits, routing)

    def _scorer(self, model: PreTrainedModel) -> ScoresInSlices | None:
        return scorer_of_output(model) if self._head.by_token else None

    def most_in_slices(self, dtype: torch.dtype) -> int:
        """Return up to how many targets of a process in a step slices of the head score them.

        Args:
            dtype: What the model computes in.
        """
        model = bare_model(self.peft)
        scorer = self._scorer(model)
        if scorer is None:
            return 0
        width = output_matrix(model).weight.shape[1]
        return scorer.most_targets(width * dtype.itemsize, learns=True)

    def _logits_of_choices(
        self, hidden: torch.Tensor, matrix: OutputMatrix, choice_ids: torch.Tensor | slice
    ) -> torch.Tensor:
        if self._head.after is None:
            return logits_of(hidden, matrix.of(choice_ids))
        return self._head.after(logits_of(hidden, matrix))[:, choice_ids]


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
        hidden = self._trunk(model, batch).last_hidden_state.flatten(0, 1)
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
