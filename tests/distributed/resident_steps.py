"""A rank that asks the kernel for the memory of its first steps: `resident_steps.py RECIPES OUT`.

Counted is the most that was resident from where parameters get memory, over what was so before.
"""

import json
import sys
import warnings
from pathlib import Path

from torch import nn

from peft_dist.config.recipe import Recipe
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.model_setup import set_up_model
from peft_dist.sharding import ENGINES
from peft_dist.simulation import run as simulation


def resident(field: str) -> int:
    """Return bytes that the kernel says are resident: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (kib,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return int(kib) * 1024


def peak_bytes(recipe: Recipe, world: World) -> int:
    """Return the most memory of a start and a step."""
    before: list[int] = []

    class Noted(ENGINES[recipe.parallel.strategy]):  # type: ignore[misc]
        def materialize(self, model: nn.Module) -> None:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
            before.append(resident("VmRSS"))
            super().materialize(model)

    recipe = simulation._settled(recipe, world)
    setup = set_up_model(
        recipe,
        world,
        simulation._source(recipe, Path(recipe.model.name)),
        engines={recipe.parallel.strategy: Noted},
        prover=simulation._first_way,
    )
    trainer = simulation._Trainer(setup, simulation._rows(recipe, world.size), None)
    trainer.one_step()
    return resident("VmHWM") - before[0]


def main() -> None:
    """Measure every recipe of a file, and write what rank 0 has found."""
    warnings.simplefilter("ignore")
    world = read_world()
    process_group.start(world)
    recipes = json.loads(Path(sys.argv[1]).read_text())
    found = {name: peak_bytes(Recipe.model_validate(one), world) for name, one in recipes.items()}
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(found))
    process_group.stop()


if __name__ == "__main__":
    main()
