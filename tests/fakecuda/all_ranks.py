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
from tests.fakecuda.device import mark, tracing, used_bytes
from tests.fakecuda.rank import live, of_shape, off_device, prepare, steps
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


OVERLAPPED: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Its head has between two and three times the bytes of a block."""
PASSES = 2
"""Micro-batches of a step."""


def trace_a_step(folder: Path, patch: pytest.MonkeyPatch, rank: int) -> int:
    """Write what streams are asked for in a step on fsdp; return what the all-reduce carries."""
    own = folder / f"overlap-{rank}"
    own.mkdir()
    batch = {"steps": 2, "global_batch_size": PASSES * 2 * 4, "micro_batch_size": 2}
    trainer = of_shape(own, patch, OVERLAPPED, [64] * 32, train=batch, quantization="nf4",
                       parallel={"strategy": "fsdp", "reshard": "forward"})  # fmt: skip
    base: Any = trainer.setup.peft.get_base_model()
    for index, block in enumerate(base.model.layers):
        block.register_forward_pre_hook(lambda *_, i=index: mark(f"forward-{i}"))
        block.register_forward_hook(lambda *_, i=index: mark(f"forward-{i}-ends"))
        # Of modules inside, for what is before: the engine's own hook of a block.
        for name in ("mlp", "self_attn"):
            inside = getattr(block, name)
            inside.register_full_backward_pre_hook(lambda *_, i=index: mark(f"backward-{i}"))
    run = trainer.passes.run

    def marked(rows: Any) -> Any:
        sums = run(rows)
        mark("passes-end")
        return sums

    patch.setattr(trainer.passes, "run", marked)
    for index, step in enumerate(steps(trainer)):
        if index == 0:
            step()
            continue
        with tracing(folder / f"trace-{rank}"):
            step()
    return trainer.setup.engine.gradients.numel() + trainer.setup.engine.extras


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
    reduced = trace_a_step(folder, patch, world.rank)
    (folder / f"reduced-{world.rank}").write_text(str(reduced), encoding="utf-8")
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
