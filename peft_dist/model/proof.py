"""The proof, at every start, that our forward gives the losses that transformers' own gives.

A few made-up rows go through the model as transformers computes it (`expected.py`). Then through
ours, as a micro-batch. Both use the same modules, so
that base, shards and adapters are the same; what differs is attention, packing, head and loss. A
way of ours that gives other losses is never trained with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.errors import ModelError, line_of
from peft_dist.data.pack import Batch, Everyone, pack, positions_of, targets_of
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.collectives import gather_objects
from peft_dist.distributed.world import World
from peft_dist.model import attention, capped
from peft_dist.model.architectures import bare_model
from peft_dist.model.compiled import CompiledBlocks
from peft_dist.model.expected import (
    Expected,
    Model,
    by_transformers,
    difference,
    layers_of,
    noise_of,
    rounding_of,
)
from peft_dist.model.loss import CausalLM, Decoder, SequenceClassifier
from peft_dist.model.probe import probe_rows
from peft_dist.model.recompute import draws_numbers
from peft_dist.model.router import Routing
from peft_dist.model.token_rows import scorer_of_output

WINDOW = 6
"""Tokens that a sliding window or a chunk has in the proof, so that rows are longer than it."""
_WINDOWS = ("attention_chunk_size", "local_attention", "sliding_window", "sliding_window_size")
GRADIENT_ROUNDING = {torch.float32: 4e-4, torch.bfloat16: 0.2, torch.float16: 0.08}
"""By what a gradient may be off, relative to its norm."""
NOISE = 4.0
"""Times the difference that transformers' own losses have between two lengths of a row."""
ROUNDING = 3.0
"""Times that which they have where every layer rounds otherwise, in less than float32."""


class Way(NamedTuple):
    """One way to compute a micro-batch of rows."""

    attention: str
    packing: bool
    compiled: bool = False

    def __str__(self) -> str:
        """Say it in words."""
        rows = f"{'packed' if self.packing else 'padded'} rows and attention {self.attention}"
        return f"{rows}, blocks compiled" if self.compiled else rows


class ProofRun(NamedTuple):
    """What the proof runs.

    Attributes:
        model: The model as an engine wraps it.
        peft: The model with its adapters.
        blocks: Its layers by name.
        world: Where it runs.
        dtype: What it computes in.
        autocast: Returns the context of every pass.
        gradient: Goes back from a loss that is part of no step; returns the flat gradient.
        disturbed: Returns a context in which the adapter has other values.
        virtual_tokens: Places of learned tokens in front of every row.
        compiled: Its blocks, where they can be compiled.
    """

    model: Model
    peft: PeftModel
    blocks: dict[str, nn.Module]
    world: World
    dtype: torch.dtype
    autocast: Callable[[], AbstractContextManager[object]]
    gradient: Callable[[torch.Tensor], torch.Tensor]
    disturbed: Callable[[], AbstractContextManager[None]]
    virtual_tokens: int = 0
    compiled: CompiledBlocks | None = None

    def compile_blocks(self, on: bool, *, told: bool = False) -> None:
        """Let blocks run compiled from now on, or as they are; see `CompiledBlocks.switch`."""
        if self.compiled is not None:
            self.compiled.switch(on=on, told=told)


def prove(run: ProofRun, ways: Sequence[Way]) -> tuple[Way, list[str]]:
    """Return the first of some ways that is proven, and what is wrong with those before it.

    Collective; the model is left in eval mode and with that way's attention.

    Raises:
        ModelError: Where no way is, with the first layer that differs; where the model fails in
            transformers itself, sees tokens that come later, or has a loss of another kind.
    """
    model, blocks, dtype, device = run.model, run.blocks, run.dtype, run.world.device
    bare = bare_model(run.peft)
    # Learned tokens stand in front of rows and are not the model's; a classifier gets none here.
    learned = run.peft.active_peft_config.is_prompt_learning and isinstance(model, Decoder)
    alone = run.peft.disable_adapter if learned else nullcontext
    rows = probe_rows(bare, classified=isinstance(model, SequenceClassifier))
    problems: list[str] = []
    caps = capped.cap_of(bare.config) is not None
    model.eval()
    run.compile_blocks(False)

    def problem_of(way: Way) -> str | None:
        with alone():
            problem = _problem(run, bare, rows, way, expected)
        own_code = way.attention == attention.VARLEN_ATTENTION and caps
        if own_code and not way.compiled:
            problem = _first_problem(run, problem)
        if problem is None and (way.compiled or own_code):
            # What is compiled for backward is another code. Rows one by one are torch's own.
            reference = attention.ROW_ATTENTION if own_code else way.attention
            batch = _packed(run, rows, way, run.virtual_tokens)
            plain = way._replace(attention=reference, compiled=False)
            return _problem_of_gradient(run, bare, batch, (plain, way))
        return problem

    with torch.no_grad(), run.autocast(), _short_windows(bare):
        with alone():
            expected = by_transformers(model, bare, blocks, device, dtype)
        for way in ways:
            problem = problem_of(way)
            first = problem is not None and not problems
            if first and dtype != torch.float32 and isinstance(model, CausalLM):
                # Before a slower way is taken: is that more than how this model rounds?
                run.compile_blocks(False)
                with alone():
                    rounding = ROUNDING * rounding_of(model, bare, blocks, device, dtype, expected)
                expected = expected._replace(allowed=max(expected.allowed, rounding))
                problem = problem_of(way)
            if problem is None:
                return way, problems
            problems.append(f"{way}: {problem}")
        noise = 0.0
        if isinstance(model, CausalLM):
            run.compile_blocks(False)
            with alone():
                noise = NOISE * noise_of(model, bare, device, dtype)
        if noise > expected.allowed:
            expected = expected._replace(allowed=noise)
            for tried, way in enumerate(ways):
                problem = problem_of(way)
                if problem is None:
                    return way, problems[:tried]
    raise ModelError(
        f"{bare.config.model_type} is not computed as transformers computes it: {problems[-1]}",
        where="model.name",
        remedy="it cannot be trained with this version; please report this",
    )


def _problem(
    run: ProofRun, bare: PreTrainedModel, rows: TokenizedRows, way: Way, expected: Expected
) -> str | None:
    """Score the rows in one way; return what is wrong with it. Collective."""
    model, blocks, dtype = run.model, run.blocks, run.dtype
    run.compile_blocks(False)
    attention.find_gap()
    batch, whole = _packed(run, rows, way), list[torch.Tensor]()
    try:
        if not attention.use_kernel(bare, way.attention):
            return "the model keeps the kernel that it was built with"
        if way.compiled:
            return _problem_of_compiled(run, bare, batch, way, expected)
        with layers_of(bare, blocks) as layers:
            nll, logits, routing = model(batch)
        if isinstance(model, CausalLM) and scorer_of_output(bare) is not None:
            # Few positions are scored in slices of the head, many against all of it.
            whole.append(model(replace(batch, everyone=None)).nll)
    except Exception as error:  # each model fails in its own way
        return line_of(error)
    if (gap := attention.find_gap()) is not None:
        return gap
    scores = logits.flatten() if isinstance(model, SequenceClassifier) else nll
    worst = max(_largest_difference(found, expected, dtype) for found in (scores, *whole))
    if worst <= expected.allowed:
        return _problem_of_routing(routing, expected)
    what = "the loss of a token" if scores is nll else "a logit"
    return (
        f"{what} differs by {worst:.2g}, "
        f"{_first_difference(batch, layers, expected)} is the first to differ"
    )


def _largest_difference(scores: torch.Tensor, expected: Expected, dtype: torch.dtype) -> float:
    counts = [len(losses) for losses in expected.losses]
    pairs = zip(scores.split(counts), expected.losses, strict=True)
    return float(np.max([difference(found, theirs, dtype) for found, theirs in pairs]))


def _problem_of_compiled(
    run: ProofRun, bare: PreTrainedModel, batch: Batch, way: Way, expected: Expected
) -> str | None:
    """Compare losses of compiled blocks with transformers' own. Collective."""
    ((nll, logits, routing),), _ = _passes(run, bare, batch, (way,))
    scores = logits.flatten() if isinstance(run.model, SequenceClassifier) else nll
    worst = _largest_difference(scores, expected, run.dtype)
    wrong = None if worst <= expected.allowed else f"a loss differs by {worst:.2g}"
    return _first_problem(run, wrong or _problem_of_routing(routing, expected))


def _problem_of_gradient(
    run: ProofRun, bare: PreTrainedModel, batch: Batch, ways: tuple[Way, Way]
) -> str | None:
    """Compare the gradient in the second of two ways with that in the first. Collective."""
    try:
        with run.disturbed():  # where a factor is zero the other has no gradient
            _, (plain, compiled) = _passes(run, bare, batch, ways)
    except Exception as error:  # what is wrong with code for backward shows there
        return line_of(error)
    off = float((compiled - plain).norm() / plain.norm().clamp(min=1e-30))
    wrong = None if off <= GRADIENT_ROUNDING[run.dtype] else f"the gradient differs by {off:.2g}"
    return _first_problem(run, wrong and f"{wrong} of its norm")


def _passes(
    run: ProofRun, bare: PreTrainedModel, batch: Batch, ways: tuple[Way, ...]
) -> tuple[list[Any], list[torch.Tensor]]:
    """Return the `Losses` of a micro-batch and its gradients in each of some ways.

    It is the code that trains which runs here, unless dropout makes it another. Collective.
    """
    model, given, gradients = run.model, [], []
    model.train(not draws_numbers(bare))
    try:
        for way in ways:
            attention.use_kernel(bare, way.attention)
            run.compile_blocks(way.compiled)
            with torch.enable_grad():
                given.append(model(batch))
                nll = given[-1].nll
                if nll.requires_grad:  # not without what is learned in front of rows
                    gradients.append(run.gradient(nll.sum()))
    finally:
        model.eval()
    return given, gradients


def _first_problem(run: ProofRun, wrong: str | None) -> str | None:
    """Return what is wrong with compiled code on any process. Collective."""
    failed = "" if run.compiled is None else run.compiled.problem
    problem = failed or attention.find_gap() or wrong
    # Another machine may have another compiler: all take the same way.
    return next(filter(None, gather_objects(problem)), None)


def _packed(run: ProofRun, rows: TokenizedRows, way: Way, virtual_tokens: int = 0) -> Batch:
    ids, packing = np.arange(rows.n_rows), way.packing
    size = positions_of(rows, ids, packing=packing, virtual_tokens=virtual_tokens)
    targets = targets_of(rows, ids)
    everyone = Everyone(size, size, targets, targets)
    batch = pack(rows, ids, packing=packing, virtual_tokens=virtual_tokens, everyone=everyone)
    return batch.to(run.world.device)


def _problem_of_routing(found: Routing | None, expected: Expected) -> str | None:
    """Compare the sums that the auxiliary loss is made of; a tie may be broken in another way."""
    theirs = expected.routing
    if found is None and theirs is None:
        return None
    if found is None or theirs is None:
        return "the loss of its router is left out"
    for ours, sums in zip(found, theirs, strict=True):
        largest = difference(ours.flatten(), sums.flatten(), torch.float32)
        if largest > max(expected.allowed, 0.01) * float(theirs.decisions):
            return "the sums of which the loss of its router is made differ"
    return None


def _first_difference(batch: Batch, layers: dict[str, torch.Tensor], expected: Expected) -> str:
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
