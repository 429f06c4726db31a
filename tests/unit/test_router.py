"""A router is trained to be even over the global batch, as transformers would of all its rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

from peft_dist.common.errors import ModelError
from peft_dist.data.pack import pack
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed.world import World
from peft_dist.entrypoints.check_models import build_tiny
from peft_dist.model import attention, router
from peft_dist.model.loss import Losses
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.trainer import Trainer
from tests.tiny import completion_rows, tiny_recipe, tiny_tokenizer, write_jsonl
from tests.unit.test_trainer import Records

BATCH = 6


def trainer(folder: Path, world: World, micro_batch_size: int, *, even: bool = True) -> Trainer:
    if not (folder / "model").is_dir():
        model = build_tiny("mixtral")
        model.config.output_router_logits = even
        model.config.router_aux_loss_coef = 0.5
        model.save_pretrained(folder / "model")
        tiny_tokenizer(folder / "model")
    size = {"steps": 1, "global_batch_size": BATCH, "micro_batch_size": micro_batch_size}
    rows = write_jsonl(folder / "rows.jsonl", completion_rows(BATCH))
    recipe = tiny_recipe(
        folder / "model", rows, quantization="none", train=size | {"max_grad_norm": 0.0}
    )
    setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
    return Trainer(setup, tokenize_rows(recipe, "train", folder / "cache"), None)


def by_transformers(made: Trainer) -> tuple[float, float]:
    """Return the loss of all rows in one batch by the model's own forward, and its gradient."""
    batch = pack(made.rows, np.arange(BATCH), packing=False)
    labels = torch.full_like(batch.input_ids, -100).flatten()
    labels[batch.label_positions + 1] = batch.targets
    attention.use_kernel(made.setup.peft.get_base_model(), "eager")
    losses = made.setup.model(
        batch,
        None,
        lambda model, batch: Losses(
            model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask.long(),
                labels=labels.view_as(batch.input_ids),
            ).loss[None],
            None,
        ),
    )
    losses.nll.sum().backward()
    norm = float(made.setup.engine.gradients.norm())
    made.setup.engine.zero_gradients()
    return float(losses.nll.detach()), norm


@pytest.mark.parametrize("micro_batch_size", [BATCH, 1])
def test_the_loss_of_a_step_is_that_of_its_whole_batch_in_any_number_of_passes(
    tmp_path: Path, alone: World, micro_batch_size: int
) -> None:
    made = trainer(tmp_path, alone, micro_batch_size)
    way = made.setup.peft.get_base_model().config._attn_implementation
    expected = by_transformers(made)
    attention.use_kernel(made.setup.peft.get_base_model(), way)
    records = Records()
    made.trackers = [records]
    made.run()
    (step,) = [one for one in records if one["event"] == "step"]
    assert (step["loss"], step["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_a_model_whose_config_asks_for_none_has_none(tmp_path: Path, alone: World) -> None:
    assert trainer(tmp_path, alone, BATCH, even=False).passes.router.term is None


def test_a_loss_for_the_router_that_is_not_ours_is_refused(
    tmp_path: Path, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = router.RouterTerm.loss
    monkeypatch.setattr(router.RouterTerm, "loss", lambda self, *args: 1.01 * whole(self, *args))
    with pytest.raises(ModelError, match="has an auxiliary loss of its own for its router"):
        trainer(tmp_path, alone, BATCH)
