"""Held-out loss and accuracy, against scoring every row with the plain model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from peft_dist.common.errors import DataError
from peft_dist.data.token_cache import encode_completions, tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.evaluation.scoring import EvalSet, make_eval_set, score
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from tests.tiny import (
    completion_rows,
    labelled_rows,
    tiny_encoder_tokenizer,
    tiny_model,
    tiny_recipe,
    write_jsonl,
)

SINGLE = [" cat", " dog"]
SEVERAL = [" cat", " dog", " cat and the dog", " elephant"]


def prepared(folder: Path, world: World, **sections: Any) -> tuple[ModelSetup, EvalSet]:
    tiny_model(folder / "model", "llama")
    rows = write_jsonl(folder / "rows.jsonl", completion_rows(17))
    # ddp leaves plain tensors, with which the PEFT model runs by itself
    parallel = {"strategy": "ddp"}
    sections["data"] = {"eval": str(rows), **sections.get("data", {})}
    recipe = tiny_recipe(folder / "model", rows, parallel=parallel, **sections)
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    return setup, make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "cache"))


def row_logits(setup: ModelSetup, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = setup.peft(input_ids=tokens[None], row_lengths=None).logits[0]
    return logits


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_trained_tokens(
    tmp_path: Path, alone: World, packing: bool
) -> None:
    setup, held = prepared(
        tmp_path, alone, evaluate={"micro_batch_size": 5}, data={"packing": packing}
    )
    losses = []
    for row in range(held.rows.n_rows):
        part = slice(held.rows.offsets[row], held.rows.offsets[row + 1])
        tokens = torch.from_numpy(held.rows.tokens[part].astype("int64"))
        trained = torch.from_numpy(held.rows.trained[part].copy())[1:]
        nll = cross_entropy(row_logits(setup, tokens)[:-1], tokens[1:], reduction="none")
        losses.append(nll[trained])
    found = score(setup, held)
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert found.accuracy is None
    assert found.rows == 17


def test_each_of_several_held_out_sets_has_its_own_loss(tmp_path: Path, alone: World) -> None:
    whole = completion_rows(17)
    paths = [
        str(write_jsonl(tmp_path / f"{at}.jsonl", part))
        for at, part in enumerate((whole[:5], whole[5:]))
    ]
    setup, both = prepared(tmp_path, alone, data={"eval": [{"path": path} for path in paths]})
    found = score(setup, both)
    alone_losses = []
    for path in paths:
        data = setup.recipe.data.model_copy(update={"eval": path})
        recipe = setup.recipe.model_copy(update={"data": data})
        rows = tokenize_rows(recipe, "eval", tmp_path / "cache")
        one = score(setup, make_eval_set(recipe, rows))
        assert one.source_losses == ()
        alone_losses.append(one.loss)
    assert found.source_losses == pytest.approx(alone_losses, abs=1e-5)
    assert alone_losses[0] != pytest.approx(alone_losses[1], rel=1e-3)
    evaluate = setup.recipe.evaluate.model_copy(update={"max_rows": 5})
    few = make_eval_set(setup.recipe.model_copy(update={"evaluate": evaluate}), both.rows)
    assert score(setup, few).source_losses[1] is None


@pytest.mark.parametrize("choices", [SINGLE, SEVERAL])
def test_the_accuracy_is_the_share_of_rows_whose_own_choice_is_the_most_likely(
    tmp_path: Path, alone: World, choices: list[str]
) -> None:
    setup, held = prepared(tmp_path, alone, evaluate={"choices": choices, "micro_batch_size": 4})
    ends = list(encode_completions(setup.recipe, tuple(choices)))
    if all(len(end) == 2 for end in ends):
        ends = [end[:-1] for end in ends]  # one position tells them apart
    assert held.single_token == all(len(end) == 1 for end in ends)
    correct = 0
    for row in range(held.rows.n_rows):
        part = slice(held.rows.offsets[row], held.rows.offsets[row + 1])
        tokens = torch.from_numpy(held.rows.tokens[part].astype("int64"))
        prompt = tokens[~torch.from_numpy(held.rows.trained[part].copy())]
        scores = []
        for end in ends:
            whole = torch.cat([prompt, torch.from_numpy(end.astype("int64"))])
            nll = cross_entropy(row_logits(setup, whole)[:-1], whole[1:], reduction="none")
            scores.append(float(nll[len(prompt) - 1 :].sum()))
        assert held.truth is not None
        correct += scores.index(min(scores)) == held.truth[row]
    assert score(setup, held).accuracy == pytest.approx(correct / held.rows.n_rows)


def test_rows_can_be_fewer(tmp_path: Path, alone: World) -> None:
    setup, held = prepared(tmp_path, alone, evaluate={"max_rows": 3, "choices": SINGLE})
    assert score(setup, held).rows == held.rows.n_rows == 3
    assert held.truth is not None
    assert len(held.truth) == 3


def test_a_completion_that_is_no_choice_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "llama")
    rows = write_jsonl(tmp_path / "rows.jsonl", completion_rows(9))
    recipe = tiny_recipe(
        tmp_path / "model", rows, data={"eval": str(rows)}, evaluate={"choices": [" cat", " log"]}
    )
    with pytest.raises(DataError, match=r"evaluate\.choices: row \d of the held-out rows"):
        make_eval_set(recipe, tokenize_rows(recipe, "eval", tmp_path / "cache"))


def test_scoring_leaves_the_mode_and_the_gradients(tmp_path: Path, alone: World) -> None:
    setup, held = prepared(tmp_path, alone)
    for training in (True, False):
        setup.model.train(training)
        before = setup.engine.gradients.clone()
        score(setup, held)
        assert setup.model.training == training
        assert torch.equal(setup.engine.gradients, before)


def test_classes_are_scored_by_their_logits(tmp_path: Path, alone: World) -> None:
    tiny_model(tmp_path / "model", "bert", num_labels=3)
    tiny_encoder_tokenizer(tmp_path / "model")
    rows = write_jsonl(tmp_path / "rows.jsonl", labelled_rows(14))
    recipe = tiny_recipe(
        tmp_path / "model",
        rows,
        model={"task": "sequence-classification"},
        parallel={"strategy": "ddp"},
        data={"eval": str(rows)},
    )
    tokens = tokenize_rows(recipe, "eval", tmp_path / "cache")
    held = make_eval_set(recipe, tokens)
    setup = set_up_model(
        recipe, alone, find_base(recipe, tmp_path / "cache"), label_names=tokens.label_names
    )
    assert tokens.class_ids is not None
    setup.model.eval()
    logits = torch.stack(
        [
            setup.peft(input_ids=torch.from_numpy(tokens.tokens[a:b].astype("int64"))[None])
            .logits[0]
            .detach()
            for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
        ]
    )
    truth = torch.from_numpy(tokens.class_ids.astype("int64"))
    found = score(setup, held)
    assert found.loss == pytest.approx(float(cross_entropy(logits, truth)), abs=1e-5)
    assert found.accuracy == pytest.approx(float((logits.argmax(dim=1) == truth).float().mean()))
