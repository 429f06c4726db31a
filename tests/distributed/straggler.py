"""A few steps on every engine, one of whose ranks sleeps in the midst of its model.

`torchrun straggler.py FOLDER`; nothing is asserted here.
"""

import json
import os
import sys
import time
from pathlib import Path

from peft_dist.data.token_cache import tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import read_world
from peft_dist.model.architectures import transformer_blocks
from peft_dist.model.source import find_base
from peft_dist.model_setup import set_up_model
from peft_dist.trainer import Trainer
from tests.equivalence.cases import Recorder
from tests.tiny import tiny_recipe

ENGINES = ("ddp", "fsdp", "hsdp", "zero2", "zero3")
SLEEPER, SLEEP_S = 2, 0.4


def main(folder: Path) -> None:
    """Train on every engine and leave the records of the steps."""
    world = read_world()
    process_group.start(world)
    for engine in ENGINES:
        groups = {"shard_size": 2} if engine == "hsdp" else {}
        recipe = tiny_recipe(
            folder / "model",
            folder / "rows.jsonl",
            quantization="nf4",
            train={"steps": 5, "global_batch_size": 8, "micro_batch_size": 2},
            parallel={"strategy": engine, **groups},
        )
        rows = tokenize_rows(recipe, "train", folder / "cache")
        setup = set_up_model(recipe, world, find_base(recipe, folder / "cache"))
        if world.rank == SLEEPER:
            last = list(transformer_blocks(setup.peft.get_base_model()).values())[-1]
            # Behind the gather of its block, before which FSDP2 and DeepSpeed stand.
            last.input_layernorm.register_forward_hook(lambda *_: time.sleep(SLEEP_S))
        trainer, recorder = Trainer(setup, rows, None), Recorder()
        trainer.trackers = [recorder] if world.is_main else []
        trainer.run()
        if world.is_main:
            text = json.dumps(recorder.records)
            (folder / f"{engine}.json").write_text(text, encoding="utf-8")
    process_group.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a worker ends
