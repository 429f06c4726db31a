"""A run on two nodes, which are two launchers here: the ledger tells of the machine of each."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peft_dist.ledger.goodput import goodput, read_ledger
from peft_dist.report.page import render_page
from peft_dist.report.run_data import read_runs
from peft_dist.status.progress import read_tail, standing
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
         "--run-dir", "run", "train.steps=100", "evaluate.every_steps=50",
         "tracking.system_every_s=0.1", "tracking.system_nodes=true"]
        for node in range(2)
    ]  # fmt: skip
    variables = environment(tmp_path / "cache")
    with ThreadPoolExecutor() as nodes:
        ended = list(
            nodes.map(lambda argv: run(argv, environment=variables, cwd=tmp_path), commands)
        )
    for done in ended:
        assert done.returncode == 0, done.stderr[-4000:]
        assert "looked at" not in done.stderr
        assert "cannot be read" not in done.stderr
    path = tmp_path / "run" / "ledger.jsonl"
    records = read_ledger(path)
    machines = [record for record in records if record["event"] == "system"]
    own = [record for record in machines if "node" not in record]
    other = [record for record in machines if record.get("node") == 1]
    assert own and other and len(own) + len(other) == len(machines)
    assert own[0].keys() == other[0].keys() - {"node"}
    assert {record["attempt"] for record in machines} == {1}
    assert all(0 <= record["step"] <= 100 for record in machines)
    held = [{record["process_rss_bytes"] for record in machine} for machine in (own, other)]
    assert held[0] != held[1], "of a process on each"
    assert not (tmp_path / "run" / "system").exists()
    assert records[-1]["event"] == "end"
    # Whoever reads the ledger takes them for what they are.
    trained = [record for record in records if record["event"] != "system"]
    assert goodput(records).seconds["step"] == pytest.approx(goodput(trained).seconds["step"])
    assert standing(read_tail(path)).step == 100
    logged = [one.row for one in LedgerRows(path).new() if "system/node_1/cpu_percent" in one.row]
    assert len(logged) == len(other)
    page = render_page(read_runs([tmp_path / "run"]))
    assert "node of rank 1: processor" in page
    hosts = json.dumps(machines)
    assert not any(host in hosts for host in records[0]["hosts"])
