"""The proof, at every launch, that each process holds the bytes of one base that it must hold.

Mends nothing: a base that is not sharded as it should be is not trained on.
"""

import hashlib
import json
import os

from torch import nn

from peft_dist.common.errors import ModelError, TrainingError
from peft_dist.distributed.collectives import gather_objects
from peft_dist.sharding.engine import Engine


def verify_sharded(
    engine: Engine,
    frozen: dict[str, nn.Parameter],
    trained: dict[str, nn.Parameter],
    strategy: str,
) -> tuple[int, list[int]]:
    """Count the bytes every rank holds and refuse to train where they are not what they must be.

    Silent replication is how sharded fine-tuning usually fails: finite loss, no error, no memory
    saved. Collective.
    """
    for name, parameter in {**frozen, **trained}.items():
        sharded = engine.sharded and name in frozen
        if parameter.is_meta or engine.is_shard(parameter) != sharded:
            raise TrainingError(
                f"{name} is not placed as strategy {strategy} says",
                where="parallel.strategy",
                remedy="please report this",
            )
    expected = gather_objects(engine.expected_bytes(frozen))
    resident = gather_objects(engine.resident_bytes(frozen))
    wrong = [rank for rank, (e, h) in enumerate(zip(expected, resident, strict=True)) if e != h]
    if wrong:
        rank = wrong[0]
        raise TrainingError(
            f"rank {rank} holds {resident[rank]} bytes of the base, {expected[rank]} expected",
            where="parallel.strategy",
            remedy="please report this",
        )
    if not trained:
        raise ModelError("nothing to train", where="method", remedy="choose other targets")
    return engine.total_bytes(frozen), resident


def verify_one_base(fingerprint: dict[str, int]) -> None:
    """Compare the base that each process, or each group of shards, has loaded. Collective.

    Raises:
        ModelError: Naming a rank whose base is not rank 0's.
    """
    digest = hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()
    everyone = gather_objects([digest, os.uname().nodename])
    other = next((rank for rank, one in enumerate(everyone) if one[0] != everyone[0][0]), None)
    if other is not None:
        raise ModelError(
            f"rank {other} on host {everyone[other][1]} has loaded another base than rank 0 on "
            f"host {everyone[0][1]}",
            where="model.name",
            remedy="give every node the same model, or remove its copy of the packed base",
        )
