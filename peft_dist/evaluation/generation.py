"""What the model answers to a few held-out rows, for people to read before and after training.

Greedy and on all processes alike, so that a sharded base can do it; changes no weight, no gradient
and no random state. The texts are the user's data: they go into the ledger and nowhere else.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from peft_dist.common.screen import wait
from peft_dist.data.encode import load_tokenizer
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed.collectives import any_of, first_of_all
from peft_dist.evaluation.scoring import EvalSet, ScoringStopped
from peft_dist.ledger.events import SampleEvent
from peft_dist.model.loss import ALL_TOKENS, Losses
from peft_dist.model_setup import ModelSetup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CUT = "\N{HORIZONTAL ELLIPSIS}"
"""Behind an answer that was not at its end when the model had to stop."""
SHOWN_CHARACTERS = 500
"""Longest text in an event."""
ENDED = -1
"""In the place of a token: this row has come to its end."""

Ids = NDArray[np.int32]


class Sampler:
    """The rows that are shown of a run's held-out ones, and how their answers are found."""

    def __init__(self, setup: ModelSetup, eval_set: EvalSet) -> None:
        """Choose the rows: evenly spaced, for neighbours are often of one kind."""
        self._session, self._held = setup, eval_set
        rows = eval_set.rows
        # The first row of an example is its good answer, but of one that was judged to be bad.
        good = np.arange(rows.n_examples) if rows.desirable is None else rows.desirable.nonzero()[0]
        writes = setup.recipe.head != "reward"
        count = min(setup.recipe.evaluate.samples, len(good)) if writes else 0
        chosen = np.unique(np.linspace(0, len(good) - 1, count).astype(np.int64))
        self.rows = good[chosen] * rows.rows_per_example

    def events(
        self,
        step: int,
        predicted: NDArray[np.int64] | None,
        *,
        wants_stop: Callable[[], bool] | None = None,
    ) -> list[SampleEvent]:
        """Return one event per row; on rank 0 alone, none elsewhere. Collective.

        Args:
            step: After which step.
            predicted: The choice or class of every held-out row, where there are any.
            wants_stop: Asked before every pass; may differ from process to process.

        Raises:
            ScoringStopped: On every process, where it said yes on any.
        """
        pairs = [split(self._held.rows, row) for row in self.rows]
        if not len(self.rows):
            return []
        if predicted is None:
            answers = self._write_on([prompt for prompt, _ in pairs], wants_stop)
        if not self._session.world.is_main:
            return []
        names = self._session.recipe.evaluate.choices or self._held.rows.label_names
        events = []
        for index, (row, (prompt, expected)) in enumerate(zip(self.rows, pairs, strict=True)):
            if predicted is None:
                written = answers[index]
                cut = "" if ENDED in written else CUT
                own = self._text([token for token in written if token != ENDED])
                texts = self._text(expected), own + cut
            else:
                assert self._held.truth is not None
                texts = names[self._held.truth[row]], names[predicted[row]]
            events.append(
                SampleEvent(
                    step=step,
                    row=int(row) // self._held.rows.rows_per_example + 1,
                    prompt=shortened(self._text(prompt)),
                    expected=shortened(texts[0]),
                    predicted=shortened(texts[1]),
                )
            )
        return events

    def _write_on(
        self, prompts: Sequence[Ids], wants_stop: Callable[[], bool] | None
    ) -> list[list[int]]:
        """Return what the model writes after each prompt; `ENDED` where it came to an end."""
        setup = self._session
        answers: list[list[int]] = [[] for _ in prompts]
        was_training = setup.model.training
        setup.model.eval()
        try:
            most, what = setup.recipe.evaluate.sample_tokens, f"writing {len(prompts)} samples"
            with torch.no_grad(), setup.autocast(), wait(what, total=most, unit="tokens") as bar:
                for _ in range(most):
                    if wants_stop is not None and any_of(wants_stop(), setup.world.device):
                        raise ScoringStopped
                    found = self._next_tokens(prompts, answers)
                    for answer, token in zip(answers, found, strict=True):
                        # A row that has ended stays: without it the others' batch would change.
                        answer.append(token)
                    bar.advance()
                    if all(token == ENDED for token in found):
                        break
        finally:
            setup.model.train(was_training)
        return answers

    def _next_tokens(self, prompts: Sequence[Ids], answers: Sequence[list[int]]) -> list[int]:
        """Return each row's likeliest next token as rank 0 finds it, or `ENDED`. Collective."""
        setup, rows = self._session, self._held.rows
        written = [
            np.concatenate([prompt, np.array([t for t in answer if t != ENDED], dtype=np.int32)])
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        # `pack` scores what is trained: a last token that nobody sees stands for the next one.
        tokens = [np.append(row, np.int32(rows.pad_id)) for row in written]
        ends = np.cumsum([len(row) for row in tokens])
        trained = np.zeros(ends[-1], dtype=np.bool_)
        trained[ends - 1] = True
        asked = replace(
            rows,
            tokens=np.concatenate(tokens),
            trained=trained,
            offsets=np.concatenate([[0], ends]).astype(np.int64),
        )
        batch = setup.pack(asked, np.arange(len(tokens))).to(setup.world.device)
        losses: Losses = setup.model(batch, ALL_TOKENS)
        assert losses.choice_logits is not None
        likeliest = losses.choice_logits.argmax(dim=1)
        if setup.world.is_main:
            for index, (answer, row) in enumerate(zip(answers, tokens, strict=True)):
                full = setup.max_positions is not None and len(row) >= setup.max_positions
                over = full or ENDED in answer[-1:] or int(likeliest[index]) in self._special
                if over:
                    likeliest[index] = ENDED
        # What other kinds of GPU find likeliest may differ, and then they would part ways.
        return first_of_all(likeliest).tolist()

    def _text(self, tokens: Any) -> str:
        return str(self._tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True))

    @cached_property
    def _tokenizer(self) -> "PreTrainedTokenizerFast":
        return load_tokenizer(self._session.recipe)

    @cached_property
    def _special(self) -> frozenset[int]:
        """Tokens that end an answer: those of a text's end, and of a turn's."""
        added = self._tokenizer.added_tokens_decoder
        special = {token for token, facts in added.items() if facts.special}
        return frozenset(special | set(self._tokenizer.all_special_ids))


def split(rows: TokenizedRows, row: int) -> tuple[Ids, Ids]:
    """Return what a row asks with, and the answer that it was trained to get.

    The answer is the last part that is trained. A plain text asks with its first half; a row with
    a class asks with all of it.
    """
    part = slice(rows.offsets[row], rows.offsets[row + 1])
    tokens = np.array(rows.tokens[part], dtype=np.int32)
    trained = np.flatnonzero(rows.trained[part])
    if not len(trained):
        return tokens, tokens[:0]
    last = int(trained[-1]) + 1
    gaps = np.flatnonzero(np.diff(trained) > 1)
    begin = int(trained[gaps[-1] + 1] if len(gaps) else trained[0])
    if begin < 2 and last > 2:  # nothing but a begin token comes before it
        begin = last // 2
    return tokens[:begin], tokens[begin:last]


def shortened(text: str) -> str:
    """Return a text of at most `SHOWN_CHARACTERS`: of a longer one, how it begins and ends."""
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[: half - 2]} … {text[-half + 1 :]}"
