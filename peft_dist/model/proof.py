"""The proof, at every start, that our forward gives the losses that transformers' own gives.

A few made-up rows go through the model as transformers computes it: one row at a time, its eager
attention, its head, its loss. Then through ours, as a micro-batch. Both use the same modules, so
that base, shards and adapters are the same; what differs is attention, packing, head and loss. A
way of ours that gives other losses is never trained with.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from peft_dist.common.errors import ModelError
from peft_dist.data.pack import Batch, pack
from peft_dist.data.tokenize import TokenizedRows
from peft_dist.distributed.world import World
from peft_dist.model import attention
from peft_dist.model.architectures import bare_model
from peft_dist.model.head import with_wide_matrix
from peft_dist.model.loss import CausalLM, Decoder, Losses
from peft_dist.model.router import Routing, auxiliary_loss, router_term

ROW_TOKENS = (19, 3, 30)
"""Tokens of each row of the probe."""
WINDOW = 6
"""Tokens that a sliding window or a chunk has in the proof, so that rows are longer than it."""
_WINDOWS = ("attention_chunk_size", "local_attention", "sliding_window", "sliding_window_size")
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Difference of the losses of one token that passes for rounding."""
_MOST_TOKENS = 4096
LOOKS_AHEAD = "no causal language model as it is configured"
_MOST_OF = 0.75
NOISE = 4.0
"""Times the difference that transformers' own losses have between two lengths of a row."""


class Way(NamedTuple):
    """One way to compute a micro-batch of rows."""

    attention: str
    packing: bool

    def __str__(self) -> str:
        """Say it in words."""
        return f"{'packed' if self.packing else 'padded'} rows and attention {self.attention}"


class _Expected(NamedTuple):
    """What transformers computes of the probe."""

    losses: list[torch.Tensor]
    """[tokens - 1] of each row; of a reward model its reward [1], with the sign turned."""
    layers: dict[str, torch.Tensor]
    allowed: float
    routing: list[Routing]
    """Of each row; none of a model whose router is not trained to be even."""


class ProofRun(NamedTuple):
    """What the proof runs.

    Attributes:
        model: The model as an engine wraps it.
        peft: The model with its adapters.
        blocks: Its layers by name.
        world: Where it runs.
        dtype: What it computes in.
        autocast: Returns the context of every pass.
    """

    model: Decoder
    peft: PeftModel
    blocks: dict[str, nn.Module]
    world: World
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[object]]


def prove(run: ProofRun, ways: Sequence[Way]) -> tuple[Way, list[str]]:
    """Return the first of some ways that is proven, and what is wrong with those before it.

    Collective; the model is left in eval mode and with that way's attention.

    Raises:
        ModelError: Where no way is, with the first layer that differs; where the model fails in
            transformers itself, sees tokens that come later, or has a loss of another kind.
    """
    model, blocks, dtype, device = run.model, run.blocks, run.dtype, run.world.device
    bare = bare_model(run.peft)
    # Learned tokens stand in front of rows and are not the model's.
    learned = run.peft.active_peft_config.is_prompt_learning
    alone = run.peft.disable_adapter() if learned else nullcontext()
    rows = probe_rows(bare)
    problems: list[str] = []
    model.eval()
    with alone, torch.no_grad(), run.autocast(), _short_windows(bare):
        expected = _by_transformers(model, bare, blocks, rows, device, dtype)
        for way in ways:
            problem = _problem(model, bare, blocks, rows, device, dtype, way, expected)
            if problem is None:
                return way, problems
            problems.append(f"{way}: {problem}")
    raise ModelError(
        f"{bare.config.model_type} is not computed as transformers computes it: {problems[-1]}",
        where="model.name",
        remedy="it cannot be trained with this version; please report this",
    )


def probe_rows(bare: PreTrainedModel) -> TokenizedRows:
    """Return made-up rows of ordinary tokens."""
    config = bare.config.get_text_config()
    vocabulary: int = config.vocab_size
    special = {
        value
        for one in (config, bare.config)
        for name, value in one.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ordinary = np.array([i for i in range(min(vocabulary, _MOST_TOKENS)) if i not in special])
    tokens = np.random.default_rng(0).choice(ordinary, sum(ROW_TOKENS)).astype(np.int32)
    return TokenizedRows(
        tokens=tokens,
        trained=np.ones(len(tokens), dtype=np.bool_),
        offsets=np.concatenate([[0], np.cumsum(ROW_TOKENS)]).astype(np.int64),
        class_ids=None,
        label_names=(),
        pad_id=int(ordinary[0]),
        sources=(),
        fingerprint="",
    )


def _by_transformers(
    model: Decoder,
    bare: PreTrainedModel,
    blocks: dict[str, nn.Module],
    rows: TokenizedRows,
    device: torch.device,
    dtype: torch.dtype,
) -> _Expected:
    """Score each row alone by the model's own forward. Collective."""
    scored = _released if isinstance(model, CausalLM) else _released_reward
    losses, noise, layers, routing = [], 0.0, [], []
    try:
        attention.use_kernel(bare, "eager")
        for row in range(rows.n_rows):
            batch = pack(rows, np.array([row]), packing=False).to(device)
            with _layers(bare, blocks) as seen:
                found, _, routed = model(batch, None, scored)
            routing += [routed] if routed else []
            layers.append({name: value.flatten(0, -2) for name, value in seen.items()})
            losses.append(found)
            if scored is not _released:
                continue
            half = rows.lengths[row] // 2 + 1
            cut = pack(_cut(rows, row, half), np.array([0]), packing=False).to(device)
            shorter = model(cut, None, _released).nll
            noise = max(noise, _difference(found[: half - 1], shorter, dtype))
    except ModelError:
        raise
    except Exception as error:  # each model fails in its own way
        raise ModelError(
            f"{bare.config.model_type} cannot be run by transformers ({_line(error)})",
            where="model.name",
            remedy="choose another model",
        ) from None
    if not noise <= 10 * ROUNDING[dtype]:
        raise ModelError(
            f"{bare.config.model_type} is {LOOKS_AHEAD}: what comes later in a row changes the "
            "losses before it",
            where="model.name",
            remedy="choose another model",
        )
    joined = {name: torch.cat([one[name] for one in layers]) for name in layers[0]}
    return _Expected(losses, joined, max(ROUNDING[dtype], NOISE * noise), routing)


def _cut(rows: TokenizedRows, row: int, length: int) -> TokenizedRows:
    """Return the first tokens of one row, alone."""
    part = slice(rows.offsets[row], rows.offsets[row] + length)
    return replace(
        rows,
        tokens=rows.tokens[part],
        trained=rows.trained[part],
        offsets=np.array([0, length], dtype=np.int64),
    )


def _released(model: PreTrainedModel, batch: Batch) -> Losses:
    """Score one row by the model's own forward, and see that its own loss is a mean of such."""
    out = with_wide_matrix(model)(input_ids=batch.input_ids, labels=batch.input_ids)
    logits = out.logits[0, :-1].float()
    nll = cross_entropy(logits, batch.input_ids[0, 1:], reduction="none")
    own = float(out.loss) - auxiliary_loss(model, out)
    # Decoders that were taken out of encoder-decoders want labels that are shifted already.
    unshifted = float(cross_entropy(out.logits[0].float(), batch.input_ids[0]))
    if min(abs(own - float(nll.mean())), abs(own - unshifted)) > 1e-2 * (1.0 + abs(own)):
        raise ModelError(
            f"{model.config.model_type} has a loss of its own, {own:.4f} where the cross-entropy "
            f"of the next token is {float(nll.mean()):.4f}",
            where="model.name",
            remedy="choose another model",
        )
    term = router_term(model)
    return Losses(nll, None, term and term.routing(out.router_logits, None))


def _released_reward(model: PreTrainedModel, batch: Batch) -> Losses:
    """Return the reward of one row by the model's own forward, its sign turned."""
    return Losses(-model(input_ids=batch.input_ids).logits[:, 0].float(), None)


def _problem(
    model: Decoder,
    bare: PreTrainedModel,
    blocks: dict[str, nn.Module],
    rows: TokenizedRows,
    device: torch.device,
    dtype: torch.dtype,
    way: Way,
    expected: _Expected,
) -> str | None:
    """Score the rows in one way; return what is wrong with it. Collective."""
    attention.find_gap()
    batch = pack(rows, np.arange(rows.n_rows), packing=way.packing).to(device)
    try:
        if not attention.use_kernel(bare, way.attention):
            return "the model keeps the kernel that it was built with"
        with _layers(bare, blocks) as layers:
            nll, _, routing = model(batch)
    except Exception as error:  # each model fails in its own way
        return _line(error)
    if (gap := attention.find_gap()) is not None:
        return gap
    counts = [len(losses) for losses in expected.losses]
    differences = [
        _difference(found, theirs, dtype)
        for found, theirs in zip(nll.split(counts), expected.losses, strict=True)
    ]
    worst = int(np.argmax(differences))
    if differences[worst] <= expected.allowed:
        return _problem_of_routing(routing, expected)
    return (
        f"the loss of a token differs by {differences[worst]:.2g}, "
        f"{_first_difference(batch, layers, expected)} is the first to differ"
    )


def _problem_of_routing(found: Routing | None, expected: _Expected) -> str | None:
    """Compare the sums that the auxiliary loss is made of; a tie may be broken in another way."""
    if found is None and not expected.routing:
        return None
    if found is None or not expected.routing:
        return "the loss of its router is left out"
    theirs = [torch.stack(one).sum(dim=0) for one in zip(*expected.routing, strict=True)]
    for ours, sums in zip(found, theirs, strict=True):
        largest = _difference(ours.flatten(), sums.flatten(), torch.float32)
        if largest > max(expected.allowed, 0.01) * float(theirs[2]):
            return "the sums of which the loss of its router is made differ"
    return None


def _difference(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> float:
    """Return by how much the losses of a row differ, infinite where one is no number.

    In float32 the largest difference counts. In less, a router sends the odd token to another
    expert by rounding alone, so up to a quarter of a row's tokens may differ by more.
    """
    differences = (one - other).abs().float().cpu().sort().values  # the one wait for a device
    if not differences.isfinite().all():
        return float("inf")
    last = len(differences) - 1
    return float(differences[last if dtype == torch.float32 else math.ceil(_MOST_OF * last)])


def _first_difference(batch: Batch, layers: dict[str, torch.Tensor], expected: _Expected) -> str:
    """Return the name of the first layer whose output differs; the head, where none does."""
    for name, theirs in expected.layers.items():
        ours = layers[name].flatten(0, -2)
        if batch.attention_mask is not None:
            ours = ours[batch.attention_mask.flatten()]
        scale = float(theirs.abs().max()) + 1e-6
        if ours.shape != theirs.shape or not torch.allclose(
            ours, theirs, rtol=0, atol=expected.allowed * scale
        ):
            return name
    return "the head"


@contextmanager
def _layers(
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


@contextmanager
def _short_windows(bare: PreTrainedModel) -> Iterator[None]:
    """Make every sliding window and attention chunk shorter than the rows of the probe."""
    changed: list[tuple[Any, str, int]] = []
    owners: list[Any] = [bare.config, bare.config.get_text_config(), *bare.modules()]
    for owner in owners:
        for name in _WINDOWS:
            value = owner.__dict__.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                with suppress(AttributeError):  # computed from another
                    setattr(owner, name, WINDOW)
                    changed.append((owner, name, value))
    try:
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


def _line(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
