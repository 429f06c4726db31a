"""Held-out loss and accuracy of a model setup's model, shared out over all processes.

Changes no weight and no gradient; knows no schedule.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isnan
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from peft_dist.common.errors import DataError
from peft_dist.common.screen import wait
from peft_dist.config import Recipe
from peft_dist.data.order import RowIds, assign
from peft_dist.data.pack import Batch, to_device
from peft_dist.data.token_cache import TokenizedRows, encode_completions
from peft_dist.distributed.collectives import sum_over
from peft_dist.distributed.stop_vote import StopVote
from peft_dist.model.loss import Losses
from peft_dist.model_setup import ModelSetup
from peft_dist.objective.passes import Scores, make_pass, with_margin


@dataclass(frozen=True)
class Score:
    """The result of one evaluation."""

    loss: float
    """Mean negative log-likelihood per trained token, in nats, or the objective's own mean."""
    accuracy: float | None
    """Share of rows whose own choice or class is the most likely, or of pairs whose chosen answer
    has the higher reward; None without either."""
    rows: int
    """Examples."""
    reward_chosen: float | None = None
    """Mean reward of chosen or desirable answers, where the objective has one."""
    reward_rejected: float | None = None
    kl: float | None = None
    source_losses: tuple[float | None, ...] = ()
    """Loss of each source of the rows, where they have several and the objective is sft; None for
    one that no row of is scored."""

    def figures(self) -> dict[str, float]:
        """Return what the objective reports besides loss and accuracy, without what is missing."""
        named = {name: getattr(self, name) for name in ("reward_chosen", "reward_rejected", "kl")}
        return with_margin({name: value for name, value in named.items() if value is not None})


@dataclass(frozen=True)
class EvalSet:
    """Rows to score, and the choices to score them against."""

    rows: TokenizedRows
    choices: tuple[NDArray[np.int32], ...]
    """Tokens of each choice; empty: loss only. The end token is left out where one position tells
    all choices apart, and counts elsewhere: " no" would always beat " no idea" without it."""
    truth: NDArray[np.int64] | None
    """[n_rows] index of each row's own choice or class."""
    reference: Scores | None = None
    """[n_rows] scores of the rows at the start of training, where the objective has them."""

    def texts(self) -> dict[str, NDArray[np.int32]]:
        """Return all token ids, by the field that they come from."""
        found = {"data.eval": self.rows.tokens}
        return found | ({"evaluate.choices": np.concatenate(self.choices)} if self.choices else {})

    @property
    def single_token(self) -> bool:
        """Whether one position tells all choices apart."""
        return all(len(choice) == 1 for choice in self.choices)


def make_eval_set(recipe: Recipe, rows: TokenizedRows) -> EvalSet:
    """Take the first `evaluate.max_rows` rows and find which choice each one is.

    Raises:
        DataError: For a row whose completion is none of the choices.
    """
    rows = _first(rows, recipe.evaluate.max_rows)
    if rows.class_ids is not None:
        return EvalSet(rows, (), rows.class_ids)
    if not recipe.evaluate.choices:
        return EvalSet(rows, (), None)
    encoded = encode_completions(recipe, recipe.evaluate.choices)
    by_tokens = {tokens.tobytes(): index for index, tokens in enumerate(encoded)}
    truth = np.empty(rows.n_rows, dtype=np.int64)
    for row in range(rows.n_rows):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        completion = np.asarray(rows.tokens[part][rows.trained[part]], dtype=np.int32)
        index = by_tokens.get(completion.tobytes())
        if index is None:
            raise DataError(
                f"row {row + 1} of the held-out rows completes with none of the choices",
                where="evaluate.choices",
                remedy="add its completion to the choices, or raise data.max_length",
            )
        truth[row] = index
    if all(len(tokens) == 2 for tokens in encoded):
        encoded = tuple(tokens[:-1] for tokens in encoded)
    return EvalSet(rows, encoded, truth)


def _first(rows: TokenizedRows, count: int | None) -> TokenizedRows:
    if count is None or count >= rows.n_examples:
        return rows
    kept = count * rows.rows_per_example
    tokens = int(rows.offsets[kept])
    return replace(
        rows,
        tokens=rows.tokens[:tokens],
        trained=rows.trained[:tokens],
        offsets=rows.offsets[: kept + 1],
        class_ids=None if rows.class_ids is None else rows.class_ids[:count],
        desirable=None if rows.desirable is None else rows.desirable[:count],
    )


class Scoring(NamedTuple):
    """An evaluation row by row."""

    score: Score
    predicted: NDArray[np.int64] | None
    """[n_rows] the likeliest choice or class of each row; None without choices."""


class ScoringStopped(Exception):
    """A process wanted the scoring to stop, and all have."""


def score(
    setup: ModelSetup, eval_set: EvalSet, *, wants_stop: Callable[[], bool] | None = None
) -> Score:
    """Score the rows; see `score_rows`."""
    return score_rows(setup, eval_set, wants_stop=wants_stop).score


def score_rows(
    setup: ModelSetup, eval_set: EvalSet, *, wants_stop: Callable[[], bool] | None = None
) -> Scoring:
    """Score the rows, and say what was predicted for each. Collective.

    Args:
        setup: The model.
        eval_set: The rows.
        wants_stop: Asked before every micro-batch; may differ from process to process. On a GPU
            a yes counts a few micro-batches later, or not where these are the last.

    Raises:
        ScoringStopped: On every process, where it said yes on any.
    """
    was_training = setup.model.training
    setup.model.eval()
    try:
        with torch.no_grad(), setup.autocast():
            return _score(setup, eval_set, wants_stop)
    finally:
        setup.model.train(was_training)


def _score(setup: ModelSetup, eval_set: EvalSet, wants_stop: Callable[[], bool] | None) -> Scoring:
    device = setup.world.device
    if setup.recipe.objective.kind != "sft":
        return Scoring(_preferences(setup, eval_set, wants_stop), None)
    choices = eval_set.choices if eval_set.single_token else ()
    choice_ids = None
    if choices:
        choice_ids = to_device(torch.from_numpy(np.concatenate(choices)), device)
    sources = eval_set.rows.source_of_row[: eval_set.rows.n_rows]
    sums = torch.zeros(1 + len(eval_set.rows.sources), dtype=torch.float64, device=device)
    predicted = torch.zeros(eval_set.rows.n_rows, dtype=torch.int64, device=device)
    for ids, batch in _batches(setup, eval_set.rows, wants_stop, "held-out rows"):
        losses: Losses = setup.model(batch, choice_ids)
        if not len(ids):
            continue
        sums[0] += losses.nll.sum()
        of_target = to_device(torch.from_numpy(sources[ids]), device)[batch.target_rows]
        sums[1:].index_add_(0, of_target, losses.nll.double())
        if losses.choice_logits is not None:
            predicted[to_device(torch.from_numpy(ids), device)] = losses.choice_logits.argmax(dim=1)
    total, *by_source = sum_over(sums).tolist()
    counts = eval_set.rows.predicted_counts
    score = Score(total / int(counts.sum()), None, eval_set.rows.n_rows)
    if len(by_source) > 1:
        each = np.bincount(sources, weights=counts, minlength=len(by_source))
        means = (part / n if n else None for part, n in zip(by_source, each.tolist(), strict=True))
        score = replace(score, source_losses=tuple(means))
    if eval_set.truth is None:
        return Scoring(score, None)
    if eval_set.choices and not eval_set.single_token:
        best = _likeliest(setup, eval_set, wants_stop)
    else:
        best = sum_over(predicted)  # every row is one process's
    found = best.cpu().numpy()
    accuracy = float((found == eval_set.truth).mean())
    return Scoring(replace(score, accuracy=accuracy), found)


def _preferences(
    setup: ModelSetup, eval_set: EvalSet, wants_stop: Callable[[], bool] | None
) -> Score:
    """Score answers under the recipe's own objective."""
    rows, device = eval_set.rows, setup.world.device
    objective = make_pass(setup, rows, eval_set.reference)
    groups = _shares(setup, rows)[setup.world.rank]
    divisor = objective.begin(np.arange(rows.n_examples), groups)
    total = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=device)
    for examples, batch in _batches(setup, rows, wants_stop, "answers", objective.rows):
        share = objective.share(setup.model(batch), batch, examples)
        total[0] += share.loss
        total[1:] += share.metrics
    loss, *figures = sum_over(total).tolist()
    named = dict(zip(objective.metrics, figures, strict=True))
    found: dict[str, Any] = {k: None if isnan(value) else value for k, value in named.items()}
    accuracy = found.pop("reward_accuracy", None)
    return Score(loss / divisor, accuracy, rows.n_examples, **found)


def _shares(setup: ModelSetup, rows: TokenizedRows) -> list[list[RowIds]]:
    """Return each process's share of the examples, micro-batch by micro-batch."""
    return assign(
        np.arange(rows.n_examples),
        rows.example_lengths,
        world_size=setup.world.size,
        micro_batch_size=setup.recipe.evaluate.micro_batch_size,
    )


def _batches(
    setup: ModelSetup,
    rows: TokenizedRows,
    wants_stop: Callable[[], bool] | None,
    doing: str,
    rows_of: Callable[[RowIds], RowIds] = lambda examples: examples,
) -> Iterator[tuple[RowIds, Batch]]:
    """Yield this process's micro-batches of examples, as long as no process wants to stop."""
    shares, vote = _shares(setup, rows), StopVote(setup.world.device)
    everyone = setup.everyone(rows, [[*map(rows_of, share)] for share in shares])
    mine = shares[setup.world.rank]
    with wait(f"evaluating {doing}", total=sum(map(len, mine)), unit="rows here") as bar:
        for ids, sizes in zip(mine, everyone, strict=True):
            if wants_stop is not None and vote.ask(wants_stop()):
                raise ScoringStopped
            yield ids, setup.pack(rows, rows_of(ids), sizes).to(setup.world.device)
            bar.advance(len(ids))


def _likeliest(
    setup: ModelSetup, eval_set: EvalSet, wants_stop: Callable[[], bool] | None
) -> torch.Tensor:
    """Return the likeliest choice of each row, each choice scored as a row."""
    crossed = _every_choice(eval_set)
    scores = torch.zeros(crossed.n_rows, dtype=torch.float64, device=setup.world.device)
    for ids, batch in _batches(setup, crossed, wants_stop, "every choice"):
        losses: Losses = setup.model(batch)
        if len(ids):
            rows = to_device(torch.from_numpy(ids), scores.device)[batch.target_rows]
            scores.index_add_(0, rows, -losses.nll.double())
    return sum_over(scores).reshape(eval_set.rows.n_rows, len(eval_set.choices)).argmax(dim=1)


def _every_choice(eval_set: EvalSet) -> TokenizedRows:
    """Return rows x choices rows: each prompt with each choice, the choice alone trained."""
    rows = eval_set.rows
    tokens: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    for row in range(rows.n_rows):
        part = slice(rows.offsets[row], rows.offsets[row + 1])
        prompt = rows.tokens[part][: int(np.argmax(rows.trained[part]))]
        for choice in eval_set.choices:
            tokens.append(np.concatenate([prompt, choice]))
            trained.append(np.arange(len(tokens[-1])) >= len(prompt))
    offsets = np.cumsum([0, *(len(t) for t in tokens)], dtype=np.int64)
    return replace(
        rows, tokens=np.concatenate(tokens), trained=np.concatenate(trained), offsets=offsets
    )
