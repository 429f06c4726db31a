"""No rank goes on before all are connected: one that ends at once breaks nobody's start."""

import sys
from pathlib import Path

import pytest

from tests.processes import environment, run

# One rank is stopped when its address is known and goes on when the others could have ended.
RANKS = """
import os, signal, sys, time
import torch, torch.distributed as dist
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World

class Stopping(dist.Store):
    def __init__(self, file, stops):
        super().__init__()
        self.inner, self.stops = dist.FileStore(file, 3), stops
    def set(self, key, value):
        self.inner.set(key, value)
        if self.stops:
            self.stops = False
            os.kill(os.getpid(), signal.SIGSTOP)
    def get(self, key): return self.inner.get(key)
    def wait(self, keys, *limit): return self.inner.wait(keys, *limit)
    def add(self, key, number): return self.inner.add(key, number)
    def check(self, keys): return self.inner.check(keys)

for late in range(3):
    ranks = []
    for rank in range(3):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            store = Stopping(os.path.join(sys.argv[1], f"store-{late}"), rank == late)
            process_group.start(World(rank, 3, rank, 3, torch.device("cpu")), store)
            process_group.stop()
            os._exit(0)
    assert os.WIFSTOPPED(os.waitpid(ranks[late], os.WUNTRACED)[1])
    time.sleep(0.5)
    os.kill(ranks[late], signal.SIGCONT)
    if any(os.waitpid(rank, 0)[1] for rank in ranks):
        sys.exit(f"with rank {late} late, a start failed")
"""


@pytest.mark.slow
def test_a_rank_that_ends_right_after_the_start_breaks_no_start(tmp_path: Path) -> None:
    ended = run(
        [sys.executable, "-c", RANKS, str(tmp_path)],
        environment=environment(tmp_path / "cache"),
        cwd=tmp_path,
        timeout_s=60,
    )
    assert ended.returncode == 0, ended.stderr
