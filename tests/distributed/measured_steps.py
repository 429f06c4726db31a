"""A rank that counts its own first steps on real tensors: `measured_steps.py RECIPES OUT`."""

import json
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as torch_dist

from peft_dist.config.recipe import Recipe
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.simulation.run import Simulated, measure

LET_GO_S = 0.003
"""How long gloo's thread is given to let go of what it gathered, of which it tells us first."""
TRIES = 6


def main() -> None:
    """Measure every recipe of a file in one process group, and write what rank 0 counted."""
    warnings.simplefilter("ignore")
    wait = torch_dist.Work.wait

    def patient(work: Any, *rest: Any) -> Any:
        done = wait(work, *rest)
        time.sleep(LET_GO_S)
        return done

    torch_dist.Work.wait = patient
    world = read_world()
    process_group.start(world)
    found = {}
    for name, values in json.loads(Path(sys.argv[1]).read_text()).items():
        found[name] = asdict(least(Recipe.model_validate(values), world))
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))
    process_group.stop()


def least(recipe: Recipe, world: World) -> Simulated:
    """Return a measurement with the least peak on rank 0, once two have agreed. Collective."""
    steps = 2 if recipe.parallel.strategy == "zero3" else 1
    found: list[Simulated] = []
    for _ in range(TRIES):
        folder = Path(recipe.model.name)
        found.append(measure(recipe, folder, world, mode=nullcontext(), steps=steps))
        peaks = [one.peak_bytes for one in found]
        agreed = [peaks.count(min(peaks)) > 1]
        torch_dist.broadcast_object_list(agreed, src=0)
        if agreed[0]:
            break
    return min(found, key=lambda one: one.peak_bytes)


if __name__ == "__main__":
    main()
