"""Fill the cache with a model's packed form ahead of training, or check the one that is there.

One process, or several under torchrun that share the rows out; none holds the model.
"""

import argparse
import time

import torch

from peft_dist.common.arguments import add_model_to_quantize
from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.console import show
from peft_dist.common.errors import ModelError
from peft_dist.distributed import process_group
from peft_dist.distributed.collectives import Shard
from peft_dist.distributed.world import World, read_world
from peft_dist.model import architectures, cache
from peft_dist.model.plan import plan_base
from peft_dist.model.weights import WeightFiles, model_folder
from peft_dist.worker.process import run_worker


def main(argv: list[str]) -> int:
    """Quantize one model as one process of a world; return the exit code."""
    parser = argparse.ArgumentParser(prog="peft-dist quantize", description=main.__doc__)
    add_model_to_quantize(parser)
    options = parser.parse_args(argv)
    return run_worker(lambda _: _quantize(options, read_world()))


def _quantize(options: argparse.Namespace, world: World) -> None:
    started = time.monotonic()
    folder = model_folder(options.model, options.revision)
    config = architectures.read_config(folder, task=options.task)
    files = WeightFiles(folder)
    dtype = torch.float32  # of parameters that are never given memory here
    skeleton = architectures.build_skeleton(
        config, task=options.task, dtype=dtype, attention="auto"
    )
    if files.packed:
        raise ModelError(
            f"{folder} is quantized already", where="MODEL", remedy="train from it as it is"
        )
    plan = plan_base(skeleton, files, quantization="nf4")
    cache_dir = usable_cache_dir()
    folder_of_entry = cache.entry_folder(cache_dir, files, options.task)
    process_group.start(world)
    shard = Shard(world.rank, world.size)
    entry = cache.fill_through_cache({}, plan, files, shard, world=world, entry=folder_of_entry)
    if entry is None:
        raise ModelError(
            "the packed base could not be written",
            where=str(cache_dir),
            remedy="free space there, or set PEFT_DIST_CACHE",
        )
    if world.is_main:
        size = sum(file.stat().st_size for file in entry.iterdir())
        show(f"{entry}  {size / 1e6:,.1f} MB  {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
