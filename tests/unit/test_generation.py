"""What a model answers to a few held-out rows, against writing on with the plain model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peft_dist.checkpoint.checkpointer import Checkpointer
from peft_dist.common.errors import Interrupted
from peft_dist.data.encode import load_tokenizer
from peft_dist.distributed.world import World
from peft_dist.evaluation.generation import CUT, Sampler, shortened, split
from peft_dist.evaluation.scoring import EvalSet, ScoringStopped, make_eval_set, score_rows
from peft_dist.ledger.events import SampleEvent
from peft_dist.ledger.writer import LedgerWriter
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.tracking.wandb.rows import LedgerRows
from peft_dist.trainer import Trainer
from tests.tiny import (
    completion_rows,
    labelled_rows,
    tiny_model,
    tiny_recipe,
    tokenised,
    write_jsonl,
)
from tests.unit.test_trainer import Records, with_checkpointer


def prepared(
    folder: Path, world: World, architecture: str = "llama", **sections: Any
) -> tuple[ModelSetup, EvalSet]:
    """Return a model setup with plain tensors, which the PEFT model runs by itself too."""
    if not (folder / "model").is_dir():
        tiny_model(folder / "model", architecture)
    make = labelled_rows if architecture == "bert" else completion_rows
    held = str(folder / "train.jsonl")
    sections = {"parallel": {"strategy": "ddp"}, **sections}
    sections["data"] = {"eval": held, **sections.get("data", {})}
    rows = tokenised(folder, make(17), **sections)
    recipe = tiny_recipe(folder / "model", folder / "train.jsonl", **sections)
    source = find_base(recipe, folder / "cache")
    setup = set_up_model(recipe, world, source, label_names=rows.label_names)
    return setup, make_eval_set(recipe, rows)


def written_on(setup: ModelSetup, prompt: list[int], count: int) -> list[int]:
    """Write on greedily, one whole pass per token, up to the tokenizer's end token."""
    end = load_tokenizer(setup.recipe).eos_token_id
    tokens = list(prompt)
    setup.model.eval()
    for _ in range(count):
        with torch.no_grad():
            logits = setup.peft(input_ids=torch.tensor([tokens]), row_lengths=None).logits
        found = int(logits[0, -1].argmax())
        if found == end:
            break
        tokens.append(found)
    return tokens[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_row_is_written_on_as_the_plain_model_would(
    tmp_path: Path, alone: World, architecture: str, packing: bool
) -> None:
    setup, held = prepared(
        tmp_path, alone, architecture,
        evaluate={"samples": 5, "sample_tokens": 7}, data={"packing": packing},
    )  # fmt: skip
    tokenizer = load_tokenizer(setup.recipe)
    found = Sampler(setup, held).events(0, None)
    assert [sample.row for sample in found] == [1, 5, 9, 13, 17]
    for sample, row in zip(found, (0, 4, 8, 12, 16), strict=True):
        prompt, _ = split(held.rows, row)
        expected = written_on(setup, prompt.tolist(), 7)
        cut = CUT if len(expected) == 7 else ""  # it would have gone on
        assert sample.predicted == tokenizer.decode(expected, skip_special_tokens=True) + cut
        assert sample.prompt + sample.expected == "".join(completion_rows(17)[row].values())


def test_a_learned_prompt_is_read_before_a_row(tmp_path: Path, alone: World) -> None:
    method = {"kind": "prompt", "virtual_tokens": 4, "text": "the cat and the dog"}
    setup, held = prepared(tmp_path, alone, method=method, evaluate={"sample_tokens": 3})
    first = Sampler(setup, held).events(0, None)
    with torch.no_grad():
        for parameter in setup.adapter.values():
            parameter.normal_(std=20.0)
    assert Sampler(setup, held).events(0, None) != first


def test_an_answer_ends_where_a_table_of_positions_ends(tmp_path: Path, alone: World) -> None:
    tiny_model(tmp_path / "model", "gpt2", n_positions=48)
    setup, held = prepared(tmp_path, alone, "gpt2", evaluate={"samples": 17, "sample_tokens": 60})
    setup.check_rows(held.rows)
    assert len(Sampler(setup, held).events(0, None)) == 17


def test_choices_are_taken_from_the_scoring(tmp_path: Path, alone: World) -> None:
    setup, held = prepared(tmp_path, alone, evaluate={"choices": [" cat", " dog"]})
    scoring = score_rows(setup, held)
    assert scoring.predicted is not None
    assert scoring.score.accuracy == float(np.mean(scoring.predicted == held.truth))
    for sample in Sampler(setup, held).events(3, scoring.predicted):
        row = completion_rows(17)[sample.row - 1]
        assert sample.expected == row["completion"]
        assert sample.predicted == (" cat", " dog")[scoring.predicted[sample.row - 1]]


def test_classes_have_their_names(tmp_path: Path, alone: World) -> None:
    tiny_model(tmp_path / "model", "bert", num_labels=3)
    setup, held = prepared(tmp_path, alone, "bert", model={"task": "sequence-classification"})
    found = Sampler(setup, held).events(0, score_rows(setup, held).predicted)
    for sample in found:
        row = labelled_rows(17)[sample.row - 1]
        assert (sample.prompt, sample.expected) == (row["text"], row["label"])
        assert sample.predicted in ("animal", "place", "plant")


def test_of_a_conversation_the_last_turn_is_asked_for_and_of_a_text_its_second_half(
    tmp_path: Path,
) -> None:
    tiny_model(tmp_path / "model", "llama")
    turns = [("user", "the cat"), ("assistant", " sat"), ("user", "the dog"), ("assistant", " log")]
    messages = [{"role": role, "content": content} for role, content in turns]
    rows = tokenised(tmp_path, [{"messages": messages}, {"text": "the cat sat on the mat"}])
    tokenizer = load_tokenizer(tiny_recipe(tmp_path / "model", tmp_path / "train.jsonl"))
    prompt, answer = (tokenizer.decode(part.tolist()) for part in split(rows, 0))
    assert prompt.endswith("<|start|>user\nthe dog<|end|>\n<|start|>assistant\n")
    assert answer == " log<|end|>"
    prompt, answer = (tokenizer.decode(part.tolist()) for part in split(rows, 1))
    assert prompt + answer == "the cat sat on the mat<|end|>"
    assert len(prompt) > 3 and len(answer) > 3


def test_long_texts_keep_their_beginning_and_their_end() -> None:
    assert shortened("a" * 500) == "a" * 500
    assert shortened("a" * 400 + "b" * 400) == "a" * 248 + " … " + "b" * 249


def test_a_process_that_is_told_to_stop_writes_nothing_more(tmp_path: Path, alone: World) -> None:
    setup, held = prepared(tmp_path, alone)
    asked = iter([False, True])
    setup.model.train()
    with pytest.raises(ScoringStopped):
        Sampler(setup, held).events(0, None, wants_stop=lambda: next(asked))
    assert setup.model.training


def test_samples_leave_the_run_as_it_is_to_the_bit(tmp_path: Path, alone: World) -> None:
    books = []
    adapters = []
    write_jsonl(tmp_path / "held.jsonl", completion_rows(9, seed=1))
    for samples in (0, 4):
        setup, held = prepared(
            tmp_path, alone,
            method={"dropout": 0.2},
            evaluate={"samples": samples, "sample_tokens": 3, "every_steps": 2},
            data={"eval": str(tmp_path / "held.jsonl")},
            train={"steps": 6, "global_batch_size": 4, "learning_rate": 1e-2},
        )  # fmt: skip
        trainer = Trainer(setup, held.rows, held)
        book = Records()
        trainer.trackers = [book]
        trainer.run()
        books.append(book)
        adapters.append({name: p.detach().clone() for name, p in setup.adapter.items()})
    without, with_them = books
    assert [r["step"] for r in with_them if r["event"] == "sample"] == [0] * 4 + [6] * 4
    assert not [r for r in without if r["event"] == "sample"]
    for event, figure in (("step", "loss"), ("step", "grad_norm"), ("evaluation", "eval_loss")):
        one, other = ([r[figure].hex() for r in book if r["event"] == event] for book in books)
        assert one == other
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


class StopAtLast:
    """TrainerHooks in which a signal comes after so many looks for one, in the last evaluation."""

    def __init__(self, step: int, looks: int) -> None:
        self._last, self._looks, self._now = ("evaluation", step), looks, ("", 0)

    def stop_requested(self) -> bool:
        """Whether it has come."""
        if self._now == self._last:
            self._looks -= 1
        return self._looks < 0

    def phase(self, name: str, step: int) -> None:
        """Note where the training is."""
        self._now = (name, step)


@pytest.mark.parametrize("looks", [3, 5])  # of which two come before the micro-batches scored
def test_a_stop_among_samples_saves_and_the_next_start_samples_again(
    tmp_path: Path, alone: World, looks: int
) -> None:
    def made() -> tuple[Trainer, Checkpointer, Records]:
        setup, held = prepared(
            tmp_path, alone,
            evaluate={"sample_tokens": 8},
            train={"steps": 4, "global_batch_size": 4},
        )  # fmt: skip
        found = Trainer(setup, held.rows, held)
        records = Records()
        found.trackers = [records]
        return found, with_checkpointer(found, tmp_path / "checkpoints"), records

    found, checkpointer, first = made()
    found.hooks = StopAtLast(4, looks)
    with pytest.raises(Interrupted, match="stopped after step 4 of 4"):
        found.run()
    assert {r["step"] for r in first if r["event"] in ("sample", "evaluation")} == {0}
    after, checkpointer, rest = made()
    newest = checkpointer.newest()
    assert newest is not None
    after.resume(newest)
    after.run()
    undisturbed, _, whole = made()
    undisturbed.run()
    told = [r for r in whole if r["event"] == "sample"]
    assert [r for r in [*first, *rest] if r["event"] == "sample"] == told
    assert len(told) == 8


def test_what_wandb_is_sent_of_a_sample_has_none_of_its_texts(tmp_path: Path) -> None:
    ledger = LedgerWriter(tmp_path / "ledger.jsonl")
    texts = dict.fromkeys(("prompt", "expected", "predicted"), "a private text")
    ledger.write(SampleEvent(step=0, row=1, **texts))
    ledger.close()
    (numbered,) = LedgerRows(tmp_path / "ledger.jsonl").new()
    assert numbered.row["event"] == "sample"
    assert "private" not in str(numbered.row)
