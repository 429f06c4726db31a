"""Where the frozen base comes from: a model's files, by way of its packed form where it has one."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from peft_dist.config import Recipe
from peft_dist.distributed.collectives import Shard
from peft_dist.distributed.world import World
from peft_dist.model import cache, fill_base
from peft_dist.model.plan import BasePlan
from peft_dist.model.weights import WeightFiles, model_folder

_IN_HUB_CACHE = re.compile(r".*/models--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})/?")


class Released(NamedTuple):
    """What an adapter names as its base, to be found by it on any machine."""

    name: str
    """Hub id where that is known, else the folder."""
    commit: str | None
    """Of the hub; a branch may be moved."""


@dataclass(frozen=True)
class BaseSource:
    """Where the base comes from."""

    files: WeightFiles
    entry: Path | None
    """Where its packed form belongs in the cache; None where it has none of its own."""
    cache_dir: Path
    """Where what was found out about it is kept."""

    def released(self, recipe: Recipe) -> Released:
        """Return what the base of a recipe is known by.

        A folder's own `_name_or_path` is not asked: a fine-tuned copy keeps that of its origin.
        """
        for folder in (recipe.model.name, str(self.files.folder)):
            match = _IN_HUB_CACHE.fullmatch(folder)
            if match is not None:
                return Released(match["name"].replace("--", "/", 1), match["commit"])
        return Released(recipe.model.name, recipe.model.revision)

    def fill(
        self,
        parameters: dict[str, nn.Parameter],
        plan: BasePlan,
        shard: Shard,
        *,
        world: World,
        copy_into: fill_base.CopyInto,
    ) -> Path | None:
        """Fill every parameter of the plan; return the cache entry that now holds them, if any.

        Collective; the arguments are those of `fill_base`.
        """
        if self.entry is None:
            fill_base.fill_base(
                parameters, plan, self.files, shard, device=world.device, copy_into=copy_into
            )
            return None
        return cache.fill_through_cache(
            parameters, plan, self.files, shard, world=world, entry=self.entry, copy_into=copy_into
        )


def find_base(recipe: Recipe, cache_dir: Path) -> BaseSource:
    """Download the model where it is not local, and hash it for the cache.

    Both can take minutes, so call it before the process group exists.

    Raises:
        ModelError: Where there is no such model, or a file of it is broken.
    """
    files = WeightFiles(model_folder(recipe.model.name, recipe.model.revision))
    packs = recipe.quantization == "nf4" and not files.packed
    entry = cache.entry_folder(cache_dir, files, recipe.head) if packs else None
    return BaseSource(files, entry, cache_dir)
