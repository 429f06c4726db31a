"""Four ranks, each with a GPU of its own: NCCL is asked for the same by all of them.

On a card a rank that asks for another collective, or for one more, is a hang without a word.
"""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.processes import free_port, run

ENGINES = ("ddp", "fsdp", "hsdp", "zero2", "zero3")
RANKS = 4
Calls = dict[str, list[str]]


def calls_of(path: Path) -> Calls:
    """Return what a rank has asked for, in order, by communicator."""
    found: Calls = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        communicator, _, call = line.split(" ", 2)
        found[communicator].append(call)
    return found


def mismatch(ranks: list[Calls]) -> str | None:
    """Return the first difference between ranks that share a communicator; None for none."""
    for communicator in sorted({name for calls in ranks for name in calls}):
        own = [calls[communicator] for calls in ranks if communicator in calls]
        for place, several in enumerate(zip(*own, strict=False)):
            if len(set(several)) > 1:
                return f"{communicator}, call {place}: {several}"
        if len(set(map(len, own))) > 1:
            return f"{communicator}: {[len(calls) for calls in own]} calls"
    return None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Calls]:
    """Let four ranks live on every engine; return what each has asked NCCL for."""
    folder, script = tmp_path_factory.mktemp("ranks"), "tests.fakecuda.all_ranks"
    port = str(free_port())
    command = [
        "sh", "-c",
        "for rank in 0 1 2 3; do RANK=$rank LOCAL_RANK=$rank FAKE_NCCL_LOG=$0/nccl-$rank "
        '"$@" >$0/out-$rank 2>&1 & done; wait',
        str(folder), sys.executable, "-m", script, str(folder), *ENGINES,
    ]  # fmt: skip
    size = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "FAKE_CUDA_DEVICES": "4"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    run(command, environment={**os.environ, **size, **where}, cwd=Path.cwd(), timeout_s=400)
    said = [(folder / f"out-{rank}").read_text(encoding="utf-8") for rank in range(RANKS)]
    assert all(text.endswith("lived\n") for text in said), said
    return [calls_of(folder / f"nccl-{rank}") for rank in range(RANKS)]


def test_all_ranks_ask_nccl_for_the_same(ranks: list[Calls]) -> None:
    assert mismatch(ranks) is None
    kinds = Counter(call.split()[0] for calls in ranks[0].values() for call in calls)
    assert kinds["all-reduce"] > 20 and kinds["all-gather"] > 20, kinds
    # The world, hsdp's shards of two (which are two communicators), and DeepSpeed's own.
    assert len({name for calls in ranks for name in calls}) > len(ranks[0]) > 1


def test_a_rank_that_asks_for_something_else_is_found(ranks: list[Calls]) -> None:
    world = max(ranks[0], key=lambda name: len(ranks[0][name]))
    calls = ranks[0][world]
    for wrong in (calls[:-1], [*calls[:5], "all-reduce 1 7 0", *calls[6:]], [*calls, calls[-1]]):
        found = mismatch([ranks[0] | {world: wrong}, *ranks[1:]])
        assert found is not None and found.startswith(world)
