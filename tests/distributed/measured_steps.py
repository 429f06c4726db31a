"""A rank that counts its own first steps on real tensors: `measured_steps.py RECIPES OUT`."""

import json
import sys
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from peft_dist.config.recipe import Recipe
from peft_dist.distributed import process_group
from peft_dist.distributed.world import read_world
from peft_dist.simulation.run import measure


def main() -> None:
    """Measure every recipe of a file in one process group, and write what rank 0 counted."""
    warnings.simplefilter("ignore")
    world = read_world()
    process_group.start(world)
    found = {}
    for name, values in json.loads(Path(sys.argv[1]).read_text()).items():
        recipe = Recipe.model_validate(values)
        folder = Path(recipe.model.name)
        # gloo's thread may let go of what was gathered a moment late, once in many times.
        steps = 2 if recipe.parallel.strategy == "zero3" else 1
        twice = [measure(recipe, folder, world, mode=nullcontext(), steps=steps) for _ in range(2)]
        found[name] = asdict(min(twice, key=lambda one: one.peak_bytes))
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))
    process_group.stop()


main()
