"""One of several ranks, each in a process of its own, that live on every engine one after another.

`python -m tests.fakecuda.all_ranks FOLDER ENGINE...`, with the environment that torchrun exports.
Its group is torch's own over NCCL; see `stub/nccl.c`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_dist.distributed import collectives, flight_recorder, process_group, rendezvous
from peft_dist.distributed.world import read_world
from tests.fakecuda.device import used_bytes
from tests.fakecuda.rank import live, off_device, prepare
from tests.tiny import tiny_model


def carry_objects(patch: pytest.MonkeyPatch, meeting: torch.distributed.Store) -> None:
    """Let small values travel through the store: what NCCL brings to a host is zero here."""
    rank, size, own = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), []
    gather = collectives.gather_objects

    def through_store(value: Any) -> list[Any]:
        own.append(value)
        meeting.set(f"{len(own)}/{rank}", json.dumps(value))
        return [json.loads(meeting.get(f"{len(own)}/{other}")) for other in range(size)]

    for module in list(sys.modules.values()):
        if getattr(module, "gather_objects", None) is gather:
            patch.setattr(module, "gather_objects", through_store)


def main(folder: Path, engines: list[str]) -> None:
    """Train, save and go on, on one engine after the other."""
    patch = pytest.MonkeyPatch()
    world = read_world()
    meeting = rendezvous.meet(world)
    if world.is_main:  # transformers writes on one rank of a group alone
        tiny_model(folder / "model", "llama")
        meeting.set("model", "made")
    meeting.wait(["model"])
    process_group.start(world, meeting)
    carry_objects(patch, meeting)
    for engine in engines:
        own = folder / f"{engine}-{world.rank}"
        own.mkdir()
        (own / "model").symlink_to(folder / "model")
        # 7 rows a step: some ranks get one more than others, and one of them none in a pass.
        shards = {"shard_size": 2} if engine == "hsdp" else {}
        batch = {"global_batch_size": 7, "micro_batch_size": 1}
        rank = prepare(own, patch, parallel={"strategy": engine, **shards}, train=batch)
        live(rank)
        assert off_device(rank) == []
    here = [index for index in range(torch.cuda.device_count()) if used_bytes(index)]
    assert here == [world.local_rank], "memory of another rank's GPU"
    record = flight_recorder.dump()  # what a hang would leave
    assert record is not None
    entries = json.loads(record)["entries"]
    assert {entry["profiling_name"] for entry in entries} >= {"nccl:all_reduce"}, entries[-3:]
    print("lived", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)
