"""Four ranks, each with a GPU of its own: NCCL is asked for the same by all of them.

On a card a rank that asks for another collective, or for one more, is a hang without a word.
"""

import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.fakecuda.all_ranks import OVERLAPPED, PASSES
from tests.fakecuda.trace import COMPUTES, Asked, read_trace
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
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let four ranks live on every engine, and trace a step; return where they have written."""
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
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Calls]:
    """Return what each rank has asked NCCL for."""
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


LAYERS = OVERLAPPED["num_hidden_layers"]
AHEAD = 3


@pytest.fixture
def trace(folder: Path) -> list[Asked]:
    """Return what the streams of rank 0 were asked for in a step."""
    return read_trace(folder / "trace-0")


def marked(trace: list[Asked], name: str) -> list[Asked]:
    return [one for one in trace if one.what == "mark" and one.detail == name]


def gathers(trace: list[Asked]) -> tuple[list[list[Asked]], list[Asked]]:
    """Return the gathers of blocks, by micro-batch, and those of the head."""
    found = [one for one in trace if one.what == "all-gather"]
    sizes = Counter(one.detail for one in found)
    block = max(sizes, key=lambda size: sizes[size])
    blocks = [one for one in found if one.detail == block]
    of_pass = 2 * LAYERS
    assert len(blocks) == PASSES * of_pass
    width = OVERLAPPED["vocab_size"] * OVERLAPPED["hidden_size"] // RANKS
    heads = [one for one in found if one.detail == str(width)]
    assert len(heads) == PASSES
    return [blocks[start : start + of_pass] for start in range(0, len(blocks), of_pass)], heads


def test_gathers_are_on_their_way_while_the_blocks_before_compute(trace: list[Asked]) -> None:
    blocks, heads = gathers(trace)
    for index, (of_pass, head) in enumerate(zip(blocks, heads, strict=True)):
        begins = [marked(trace, f"forward-{i}")[index] for i in range(LAYERS)]
        ends = [marked(trace, f"forward-{i}-ends")[index] for i in range(LAYERS)]
        forward, backward = of_pass[:LAYERS], of_pass[LAYERS:][::-1]
        for i in range(LAYERS):
            later = [*forward[i + 1 :], head]
            asked_for = [one for one in later[:AHEAD] if one.place < begins[i].place]
            assert len(asked_for) == min(AHEAD, LAYERS - i), i
            assert begins[i].waits_for(forward[i])
            assert not any(ends[i].waits_for(one) for one in later), i
            assert all(one.stream != COMPUTES for one in later)
        after = [one for one in trace if one.place > ends[-1].place and one.what == "kernel"]
        assert next(one for one in after if one.waits_for(head)).place < backward[-2].place
        # One for the feed-forward of a block and one for its attention.
        for i in range(LAYERS):
            of_block = marked(trace, f"backward-{i}")[2 * index : 2 * index + 2]
            assert all(one.waits_for(backward[i]) for one in of_block)
            if i > 0:
                assert backward[i - 1].place < of_block[0].place
                assert not any(one.waits_for(backward[i - 1]) for one in of_block)


def test_one_sum_of_the_adapter_begins_when_its_last_gradient_is_there(
    trace: list[Asked], folder: Path
) -> None:
    sums = [one for one in trace if one.what == "all-reduce"]
    assert [one.detail for one in sums] == [(folder / "reduced-0").read_text(encoding="utf-8")]
    (summed,), (end,) = sums, marked(trace, "passes-end")
    last = marked(trace, "backward-0")[-1]
    assert last.place < end.place < summed.place and summed.waits_for(last)
    between = [one for one in trace if last.place < one.place < summed.place]
    assert {one.what for one in between} == {"kernel", "mark"}, "no collective stands before it"
    metrics = [one for one in between if one.place > end.place]
    assert len(metrics) < 24, "kernels of the metrics and flags that it carries"
