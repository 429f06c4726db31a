"""The life of one rank on a CUDA device, with the product's own parts, as `finetune` puts them."""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as torch_dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from peft_dist.checkpoint.checkpointer import Checkpointer
from peft_dist.checkpoint.verified_save import AdapterSaver
from peft_dist.config import Recipe
from peft_dist.data.counts import SourceRows
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed.world import World, read_world
from peft_dist.evaluation.scoring import EvalSet, make_eval_set
from peft_dist.model.source import find_base
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.simulation import run as simulation_run
from peft_dist.trainer import Trainer
from tests.tiny import completion_rows, labelled_rows, tiny_model, tiny_recipe, write_jsonl

RANKS, RANKS_OF_A_NODE = 4, 2
"""One world for all tests: DeepSpeed keeps the first process group that it meets."""


def first_rank(patch: pytest.MonkeyPatch) -> World:
    """Be rank 0 in a process group that carries nothing; or the rank that this process is."""
    # There are no values to compare: what is read from a device is zero.
    patch.setattr(torch, "allclose", lambda *_, **__: True)
    if torch_dist.is_initialized() and torch_dist.get_backend() == "nccl":
        return read_world()
    numbers = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS_OF_A_NODE}
    for name, number in numbers.items():
        patch.setenv(name, str(number))
    world = read_world()
    assert world.device == torch.device("cuda", 0)
    if not torch_dist.is_initialized():
        torch_dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    return world


@dataclass
class Rank:
    """What a rank has when its training begins."""

    recipe: Recipe
    setup: ModelSetup
    trainer: Trainer
    saver: AdapterSaver
    checkpointer: Checkpointer
    folder: Path


def prepare(
    folder: Path, patch: pytest.MonkeyPatch, architecture: str = "llama", **sections: Any
) -> Rank:
    """Do what a rank does before its first step."""
    world = first_rank(patch)
    model = folder / "model"
    if not model.exists():
        tiny_model(model, architecture, **({"num_labels": 3} if architecture == "bert" else {}))
    rows = (labelled_rows if architecture == "bert" else completion_rows)(32)
    file = write_jsonl(folder / "rows.jsonl", rows)
    task = "sequence-classification" if architecture == "bert" else "causal-lm"
    wanted: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "bfloat16", "task": task},
        "data": {"train": str(file), "eval": str(file)},
        "train": {"steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-2},
        "evaluate": {"samples": 2, "sample_tokens": 2},
    }
    for name, section in sections.items():
        before = wanted.get(name, {})
        wanted[name] = {**before, **section} if isinstance(section, dict) else section
    recipe = tiny_recipe(model, file, **wanted)
    if recipe.parallel.strategy == "zero3":  # it compares values, which there are none of
        of_zero3 = "deepspeed.runtime.zero.partitioned_param_coordinator"
        module = importlib.import_module(of_zero3)
        patch.setattr(module, "assert_ints_same_as_other_ranks", lambda _: None)
    train = tokenize_rows(recipe, "train", folder / "cache")
    held = make_eval_set(recipe, tokenize_rows(recipe, "eval", folder / "cache"))
    base = find_base(recipe, folder / "cache")
    setup = set_up_model(recipe, world, base, label_names=train.label_names)
    saver = AdapterSaver(setup, train)
    saver.prove()
    return _with_trainer(recipe, setup, saver, train, held, folder)


def _with_trainer(
    recipe: Recipe,
    setup: ModelSetup,
    saver: AdapterSaver,
    train: TokenizedRows,
    held: EvalSet,
    folder: Path,
) -> Rank:
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    checkpointer = Checkpointer(
        saver,
        checkpoints,
        recipe.checkpoint,
        attempt=1,
        facts={},
        may_publish=lambda: None,
        sync_ledger=lambda: None,
    )
    trainer = Trainer(setup, train, held, checkpointer=checkpointer)
    return Rank(recipe, setup, trainer, saver, checkpointer, folder)


def live(rank: Rank) -> None:
    """Train, save a checkpoint, go on from it, look at the base, save the adapter."""
    trainer = rank.trainer
    trainer.run()
    trainer._save(trainer.progress.step)
    trainer.finish_saves()
    newest = rank.checkpointer.newest()
    assert newest is not None
    trainer.resume(newest)
    rank.setup.check_integrity()
    rank.saver.save(rank.folder / "adapter")


def off_device(rank: Rank) -> list[str]:
    """Return the tensors of the model that are not on its device, by name."""
    model, device = rank.setup.model, rank.setup.world.device
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in tensors if tensor.device != device]


def steps(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Yield what takes each step of a training."""
    trainer.setup.model.train()
    for batch in trainer.rows.batches(trainer.plan.steps()):
        yield partial(trainer._step, batch)


def of_shape(
    folder: Path,
    patch: pytest.MonkeyPatch,
    config: dict[str, Any],
    lengths: list[int],
    **sections: Any,
) -> Trainer:
    """Return the trainer of a model of any size, whose base is never read.

    Args:
        folder: Where its config.json is written.
        patch: Sets the environment of a rank.
        config: Of the model.
        lengths: Tokens of each row, in the order in which rows are trained.
        sections: What the recipe says besides.
    """
    world = first_rank(patch)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wanted: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "data": {"max_length": max(lengths)},
        "train": {},
    }
    for name, section in sections.items():
        wanted[name] = {**wanted.get(name, {}), **section} if isinstance(section, dict) else section
    recipe = tiny_recipe(folder, folder / "rows.jsonl", **wanted)
    setup = set_up_model(recipe, world, simulation_run._source(recipe, folder))
    return Trainer(setup, _rows(lengths), None)


def _rows(lengths: list[int]) -> TokenizedRows:
    total = sum(lengths)
    return TokenizedRows(
        tokens=np.zeros(total, dtype=np.int32),
        trained=np.ones(total, dtype=np.bool_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        class_ids=None,
        label_names=(),
        pad_id=0,
        sources=(SourceRows("rows", len(lengths), 0, 0, 0, 0, 0, ()),),
        fingerprint="",
    )
