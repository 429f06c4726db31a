"""The rank that all wait for is seen, on every engine, and not those that wait."""

import json
from pathlib import Path
from statistics import median

import pytest

from tests.distributed.straggler import ENGINES, SLEEP_S, SLEEPER
from tests.processes import ROOT, environment, forked_world, run
from tests.tiny import completion_rows, tiny_model, write_jsonl

pytestmark = pytest.mark.distributed
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which four processes trained on every engine."""
    folder = tmp_path_factory.mktemp("straggler")
    tiny_model(folder / "model", "llama")
    write_jsonl(folder / "rows.jsonl", completion_rows(48))
    script = str(ROOT / "tests" / "distributed" / "straggler.py")
    done = run(
        [*forked_world(4), script, str(folder)],
        environment=environment(folder / "cache"),
        cwd=folder,
        timeout_s=300,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rank_that_sleeps_is_the_slow_one_and_those_that_wait_for_it_are_not(
    folder: Path, engine: str
) -> None:
    steps = json.loads((folder / f"{engine}.json").read_text(encoding="utf-8"))
    assert len(steps) == 5
    assert all(len(step["rank_step_s"]) == 4 for step in steps)
    assert all(len(step["rank_memory_bytes"]) == 4 for step in steps)
    assert all(min(step["rank_memory_bytes"]) > 50e6 for step in steps)
    # The first step pays for everything lazy.
    by_rank = [median(step["rank_step_s"][rank] for step in steps[1:]) for rank in range(4)]
    print(engine, [round(seconds, 3) for seconds in by_rank])
    slow_s = by_rank.pop(SLEEPER)
    assert slow_s >= SLEEP_S
    assert max(by_rank) < slow_s - SLEEP_S / 2, by_rank
