"""The held-out loss of a run's adapter in three ways: as trained, on the full base, and merged.

What 4 bits and merging cost shows in these numbers alone.
"""

from pathlib import Path

import psutil
import torch

from peft_dist.checkpoint.adapter_file import load_adapter
from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.errors import PeftDistError
from peft_dist.common.screen import stage
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.method import Lora
from peft_dist.config.parallel import Parallel
from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.evaluation.scoring import EvalSet, make_eval_set, score
from peft_dist.model.source import find_base
from peft_dist.model.weights import WeightFiles
from peft_dist.model_setup import log, set_up_model
from peft_dist.run.directory import RunDir


def held_out_losses(run: RunDir, out: Path) -> list[str]:
    """Score the held-out rows of a run in three ways; return lines about it.

    Args:
        run: The run.
        out: The merged model.
    """
    recipe = load_recipe(run.recipe, check_paths=False)
    if recipe.data.eval is None or recipe.objective.kind != "sft":
        return []
    need, room = _bytes_of(out), psutil.virtual_memory().available
    if need > room:
        return [
            f"held-out losses not compared: that takes {need / 1e9:,.1f} GB of memory, "
            f"and {room / 1e9:,.1f} GB are free"
        ]
    try:
        return [_compared(run, recipe, out)]
    except PeftDistError as error:  # the merged model is there, whatever became of the rows
        return [f"held-out losses not compared: {error}"]


def _compared(run: RunDir, recipe: Recipe, out: Path) -> str:
    recipe = load_recipe(run.recipe)
    method = recipe.method.model_copy(update={"start_from": None})
    recipe = recipe.model_copy(update={"parallel": Parallel(strategy="ddp"), "method": method})
    world, cache = read_world(), usable_cache_dir()
    eval_set = make_eval_set(recipe, tokenize_rows(recipe, "eval", cache / "rows"))
    process_group.start(world)
    full = recipe.model_copy(update={"quantization": "none"})
    model = recipe.model.model_copy(update={"name": str(out), "revision": None})
    # A new LoRA changes nothing.
    merged = full.model_copy(update={"model": model, "method": Lora(rank=1)})
    ways: dict[str, tuple[Recipe, Path | None]] = {
        "full + adapter": (full, run.adapter),
        "merged": (merged, None),
    }
    if recipe.quantization != "none":
        ways = {"4-bit + adapter": (recipe, run.adapter), **ways}
    losses = [
        f"{name} {_loss(one, adapter, eval_set, world, cache):.4f}"
        for name, (one, adapter) in ways.items()
    ]
    process_group.stop()
    return f"held-out loss: {', '.join(losses)}"


def _loss(
    recipe: Recipe, adapter: Path | None, eval_set: EvalSet, world: World, cache: Path
) -> float:
    with stage(f"scoring {eval_set.rows.n_examples:,} held-out rows", log):
        source = find_base(recipe, cache)
        setup = set_up_model(recipe, world, source, label_names=eval_set.rows.label_names)
        if adapter is not None:
            state = load_adapter(adapter, setup.method, setup.peft, setup.adapter)
            setup.engine.load_adapter_state(state)
        return score(setup, eval_set).loss


def _bytes_of(folder: Path) -> int:
    """Return the bytes of a model in float32, as a CPU computes with it."""
    tensors = WeightFiles(folder).tensors.values()
    return sum(torch.Size(one.shape).numel() * 4 for one in tensors)
