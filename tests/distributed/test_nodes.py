"""A run on two nodes, which are two launchers here: the ledger tells of the machine of each."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peft_dist.common.env import STORE_SECRET
from peft_dist.ledger.events import EndEvent, StartEvent, SystemEvent
from peft_dist.ledger.goodput import goodput
from peft_dist.ledger.reader import LedgerReader
from peft_dist.report.page import render_page
from peft_dist.report.run_data import read_runs
from peft_dist.status.progress import read_progress
from peft_dist.tracking.wandb.rows import LedgerRows
from tests.distributed.test_commands import RECIPE
from tests.processes import ROOT, environment, free_port, run
from tests.tiny import completion_rows, tiny_model, write_jsonl

pytestmark = pytest.mark.distributed


def test_the_machine_of_every_node_stands_in_the_ledger(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "llama")
    write_jsonl(tmp_path / "rows.jsonl", completion_rows(32))
    write_jsonl(tmp_path / "held.jsonl", completion_rows(11, seed=1))
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    rendezvous = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    commands = [
        [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node),
         "--nproc-per-node", "1", *rendezvous, str(ROOT / "launch" / "train.py"), "recipe.yaml",
         "--run-dir", "run", "train.steps=40", "evaluate.every_steps=20",
         "tracking.system_every_s=0.1", "tracking.system_nodes=true"]
        for node in range(2)
    ]  # fmt: skip
    # A secret that is there does not hinder a launcher whose store is torch's own.
    variables = environment(tmp_path / "cache", **{STORE_SECRET: "of another start"})
    with ThreadPoolExecutor() as nodes:
        ended = list(
            nodes.map(lambda argv: run(argv, environment=variables, cwd=tmp_path), commands)
        )
    for done in ended:
        assert done.returncode == 0, done.stderr[-4000:]
        assert "could not be sampled" not in done.stderr
        assert "cannot be read" not in done.stderr
    path = tmp_path / "run" / "ledger.jsonl"
    events = list(LedgerReader(path).all())
    samples = [event for event in events if isinstance(event, SystemEvent)]
    own = [sample for sample in samples if sample.node is None]
    other = [sample for sample in samples if sample.node == 1]
    assert own and other and len(own) + len(other) == len(samples)
    assert own[0].fields().keys() == other[0].fields().keys() - {"node"}
    assert {sample.attempt for sample in samples} == {1}
    assert all(0 <= sample.step <= 40 for sample in samples)
    resident = [{sample.process_rss_bytes for sample in node} for node in (own, other)]
    assert resident[0] != resident[1], "of a process on each"
    assert not (tmp_path / "run" / "system").exists()
    assert isinstance(events[0], StartEvent) and isinstance(events[-1], EndEvent)
    # Whoever reads the ledger takes them for what they are.
    trained = [event for event in events if not isinstance(event, SystemEvent)]
    assert goodput(events).seconds["step"] == pytest.approx(goodput(trained).seconds["step"])
    assert read_progress(path).step == 40
    logged = [one.row for one in LedgerRows(path).new() if "system/node_1/cpu_percent" in one.row]
    assert len(logged) == len(other)
    page = render_page(read_runs([tmp_path / "run"]))
    assert "node of rank 1: processor" in page
    text = str(samples)
    assert not any(host in text for host in events[0].hosts or ())
