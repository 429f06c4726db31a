"""What transformers computes of the probe: its eager attention, its head, its loss."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from peft_dist.common.errors import ModelError, line_of
from peft_dist.data.pack import Batch, pack
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.model import attention
from peft_dist.model.head import with_wide_matrix
from peft_dist.model.loss import CausalLM, Decoder, Losses, RewardModel, SequenceClassifier
from peft_dist.model.probe import SAME_TOKENS, cut, probe_rows
from peft_dist.model.router import Routing, auxiliary_loss, router_term

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Difference of two losses, rewards or logits that passes for rounding."""
SHARE = 5e-6
"""Of the largest loss of a token that passes for rounding in float32.

Rows that a short convolution mixes were seen to change losses by 1.5e-5 of it, rounding 1.5e-6."""
LOOKS_AHEAD = "no causal language model as it is configured"
_MOST_OF = 0.75


class Expected(NamedTuple):
    """What transformers computes of the probe."""

    losses: list[torch.Tensor]
    """[tokens - 1] of each row; of a reward model its reward [1], with the sign turned; of a
    classifier its logits [classes]."""
    layers: dict[str, torch.Tensor]
    """[tokens, H] of all rows, of the token embedding and of the blocks, by name."""
    allowed: float
    """Difference of two scores that passes for rounding."""
    routing: Routing | None
    """Of all rows; none of a model whose router is not trained to be even."""


Model = Decoder | SequenceClassifier


def by_transformers(
    model: Model,
    bare: PreTrainedModel,
    blocks: dict[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> Expected:
    """Score the probe by the model's own forward. Collective.

    Raises:
        ModelError: Where it fails, sees tokens that come later, or has a loss of another kind.
    """
    attention.use_kernel(bare, "eager")
    with _refused_in_one_line(bare):
        score = _score_tokens if isinstance(model, CausalLM) else _score_rows
        return score(model, bare, blocks, device, dtype)


def _score_tokens(
    model: Model,
    bare: PreTrainedModel,
    blocks: dict[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> Expected:
    """Score the sequences that rows begin, in one pass, and keep what is the rows' own."""
    rows, whole = probe_rows(bare), probe_rows(bare, whole=True)
    batch = pack(whole, np.arange(whole.n_rows), packing=False).to(device)
    shape = batch.input_ids.shape
    lengths = torch.from_numpy(rows.lengths).to(device)
    own = torch.arange(shape[1], device=device) < lengths[:, None]
    with layers_of(bare, blocks) as seen:
        found, _, routing = model(batch, None, partial(_released, counted=own))
    losses = found.view(shape[0], shape[1] - 1)
    allowed = ROUNDING[dtype]
    if dtype == torch.float32:
        allowed = min(allowed, SHARE * float(losses.abs().max()))
    same = SAME_TOKENS - 1
    if not difference(losses[0, :same], losses[-1, :same], dtype) <= 10 * allowed:
        raise ModelError(
            f"{bare.config.model_type} is {LOOKS_AHEAD}: what comes later in a row changes the "
            "losses before it",
            where="model.name",
            remedy="choose another model",
        )
    return Expected(
        [one[: n - 1] for one, n in zip(losses, rows.lengths.tolist(), strict=True)],
        {
            name: value.reshape(*shape, -1)[own]
            for name, value in seen.items()
            if value.numel() % own.numel() == 0  # else it is no row of numbers for each token
        },
        allowed,
        routing,
    )


def _score_rows(
    model: Model,
    bare: PreTrainedModel,
    blocks: dict[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
) -> Expected:
    """Score each row alone: it has a reward, or a logit of each class."""
    rows = probe_rows(bare)
    released = _released_reward if isinstance(model, RewardModel) else _released_classes
    scores, layers = [], []
    for row in range(rows.n_rows):
        batch = pack(rows, np.array([row]), packing=False).to(device)
        with layers_of(bare, blocks) as seen:
            scores.append(model(batch, None, released).nll)
        layers.append({name: value.flatten(0, -2) for name, value in seen.items()})
    joined = {name: torch.cat([one[name] for one in layers]) for name in layers[0]}
    allowed = ROUNDING[dtype]
    if dtype == torch.float32:  # of a sum of many, which may cancel each other
        allowed = min(allowed, 4 * SHARE * max(float(score.abs().max()) for score in scores))
    return Expected(scores, joined, allowed, None)


def noise_of(
    model: CausalLM, bare: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> float:
    """Return by how much transformers' losses of a row differ between two lengths of it.

    Collective.
    """
    rows = probe_rows(bare)
    most = 0.0
    attention.use_kernel(bare, "eager")

    def losses(some: TokenizedRows, row: int) -> torch.Tensor:
        batch = pack(some, np.array([row]), packing=False).to(device)
        found: torch.Tensor = model(batch, None, _released).nll
        return found

    with _refused_in_one_line(bare):
        for row in range(rows.n_rows):
            half = rows.lengths[row] // 2 + 1
            shorter = losses(cut(rows, row, half), 0)
            most = max(most, difference(losses(rows, row)[: half - 1], shorter, dtype))
    return most


def rounding_of(
    model: CausalLM,
    bare: PreTrainedModel,
    blocks: dict[str, nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    expected: Expected,
) -> float:
    """Return by how much transformers' losses change where every layer rounds otherwise.

    The output of the token embedding and of each block is changed at random, each number by at most
    half of its last bit. Collective.

    Args:
        model: The model as an engine wraps it.
        bare: The model of transformers in it.
        blocks: Its layers by name.
        device: Where it computes.
        dtype: What it computes in.
        expected: The losses without that.
    """
    rows = probe_rows(bare, whole=True)
    batch = pack(rows, np.arange(rows.n_rows), packing=False).to(device)
    random = torch.Generator().manual_seed(0)
    attention.use_kernel(bare, "eager")

    def disturb(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = output if isinstance(output, torch.Tensor) else output[0]
        change = (torch.rand(value.shape, generator=random) - 0.5).to(value.device)
        changed = (value.float() * (1.0 + torch.finfo(dtype).eps * change)).to(value.dtype)
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    with _refused_in_one_line(bare):
        watched = [bare.get_input_embeddings(), *blocks.values()]
        handles = [module.register_forward_hook(disturb) for module in watched]
        try:
            changed = model(batch, None, _released).nll
        finally:
            for handle in handles:
                handle.remove()
    per_row = zip(changed.chunk(rows.n_rows), expected.losses, strict=True)
    return max(difference(one[: len(own)], own, dtype) for one, own in per_row)


@contextmanager
def _refused_in_one_line(bare: PreTrainedModel) -> Iterator[None]:
    """Turn whatever a model fails with in transformers itself into a refusal."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # each model fails in its own way
        raise ModelError(
            f"{bare.config.model_type} cannot be run by transformers ({line_of(error)})",
            where="model.name",
            remedy="choose another model",
        ) from None


def _released(
    model: PreTrainedModel, batch: Batch, *, counted: torch.Tensor | None = None
) -> Losses:
    """Score sequences by the model's own forward, and see that its own loss is a mean of such.

    Args:
        model: The model.
        batch: Sequences of one length.
        counted: [B, T] true for the tokens whose routing counts. Off: all do.
    """
    ids = batch.input_ids
    out = with_wide_matrix(model)(input_ids=ids, labels=ids)
    logits = out.logits.float()
    nll = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    own = float(out.loss) - auxiliary_loss(model, out)
    # Decoders that were taken out of encoder-decoders want labels that are shifted already.
    unshifted = float(cross_entropy(logits.flatten(0, 1), ids.flatten()))
    if min(abs(own - float(nll.mean())), abs(own - unshifted)) > 1e-2 * (1.0 + abs(own)):
        raise ModelError(
            f"{model.config.model_type} has a loss of its own, {own:.4f} where the cross-entropy "
            f"of the next token is {float(nll.mean()):.4f}",
            where="model.name",
            remedy="choose another model",
        )
    term = router_term(model)
    return Losses(nll, None, term and term.routing(out.router_logits, counted))


def _released_reward(model: PreTrainedModel, batch: Batch) -> Losses:
    """Return the reward of one row by the model's own forward, its sign turned."""
    return Losses(-model(input_ids=batch.input_ids).logits[:, 0].float(), None)


def _released_classes(model: PreTrainedModel, batch: Batch) -> Losses:
    """Return the logits of one row by the model's own forward."""
    return Losses(model(input_ids=batch.input_ids).logits.flatten().float(), None)


def difference(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> float:
    """Return by how much the losses of a row differ, infinite where one is no number.

    In float32 the largest difference counts. In less, a router sends the odd token to another
    expert by rounding alone, so up to a quarter of a row's tokens may differ by more.
    """
    differences = (one - other).abs().float().cpu().sort().values  # the one wait for a device
    if not differences.isfinite().all():
        return float("inf")
    last = len(differences) - 1
    return float(differences[last if dtype == torch.float32 else math.ceil(_MOST_OF * last)])


@contextmanager
def layers_of(
    bare: PreTrainedModel, blocks: dict[str, nn.Module]
) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the outputs of the token embedding and of the blocks, [B, T, H] by name."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            value = output if isinstance(output, torch.Tensor) else output[0]
            seen[name] = value.detach().float()

        return hook

    watched = {"the embedding": bare.get_input_embeddings(), **blocks}
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
