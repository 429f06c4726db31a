"""The pre-flight: real processes as nodes, which find out who of them cannot take part."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from peft_dist.config.load import render_yaml
from peft_dist.preflight.node_info import gather
from peft_dist.preflight.verdict import PORT_TAKEN, Report, report_path
from tests.disks import tmpfs
from tests.processes import ROOT, environment, free_port

pytestmark = pytest.mark.distributed

FAULTY = str(ROOT / "tests" / "distributed" / "node_with_a_fault.py")
TIMEOUT_S = 60.0
"""For what does not wait for its end: four interpreters that import torch on a slow machine."""
SHORT_S = 16.0
"""For what does."""
SAID = "peft-dist: pre-flight: "


class Nodes:
    """Some nodes of one job, which are processes here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        self.started: dict[int, subprocess.Popen[str]] = {}
        self.said: dict[int, str] = {}
        self.seconds = 0.0

    def start(
        self,
        count: int,
        *options: str,
        faults: Mapping[int, str] | None = None,
        absent: tuple[int, ...] = (),
        timeout_s: float = TIMEOUT_S,
        port: int | None = None,
        **variables: str,
    ) -> None:
        """Start nodes, all but absent ones, some of them with a fault."""
        hosts = ",".join(f"node{number}" for number in range(1, count + 1))
        port = port or free_port()
        self._began = time.monotonic()
        for index in range(count):
            if index in absent:
                continue
            fault = (faults or {}).get(index)
            script = ["-m", "peft_dist.preflight.main"] if fault is None else [FAULTY, fault]
            self.started[index] = subprocess.Popen(
                [
                    *(sys.executable, *script, "--hosts", hosts, "--index", str(index)),
                    *("--host", f"node{index + 1}", "--head", "127.0.0.1", "--port", str(port)),
                    *("--run-dir", str(self.run_dir), "--timeout-s", str(timeout_s), *options),
                ],
                env=environment(self.folder / "cache", GLOO_SOCKET_IFNAME="lo", **variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def codes(self, *indexes: int) -> list[int]:
        """Wait until some nodes, or all, have ended."""
        found = []
        for index in indexes or self.started:
            process = self.started[index]
            self.said[index], _ = process.communicate(timeout=TIMEOUT_S + 20)
            found.append(process.returncode)
        self.seconds = time.monotonic() - self._began
        return found

    @property
    def report(self) -> Report:
        """What the head left in the run directory."""
        report = Report.read(self.run_dir)
        assert report is not None
        return report

    def lines(self, index: int) -> list[str]:
        """Return what a node has said."""
        return self.said[index].splitlines()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Return what starts nodes; at the end none may be left, and none has shown a traceback."""
    nodes = Nodes(tmp_path)
    yield nodes
    for process in nodes.started.values():
        process.kill()
        process.wait()
    assert not any("Traceback" in text for text in nodes.said.values()), nodes.said


def test_nodes_that_are_fine_are_fine_in_a_few_seconds(nodes: Nodes) -> None:
    nodes.start(4, "--min-free-gb", "0.001")
    assert nodes.codes() == [0, 0, 0, 0], nodes.said
    (line,) = nodes.lines(0)
    assert line.startswith(f"{SAID}4 nodes fine in ")
    assert "all-reduce of 1 MB " in line
    assert line.endswith(" ms, clocks within 0.01 s")
    assert [nodes.said[index] for index in (1, 2, 3)] == ["", "", ""]
    assert nodes.report.ok
    assert nodes.report.nodes == 4
    assert 0 < (nodes.report.all_reduce_s or 0) < 1
    assert nodes.report.seconds < TIMEOUT_S / 2
    assert list(nodes.run_dir.iterdir()) == [nodes.run_dir / "slurm"]


def test_one_node_needs_no_network(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nodes.start(1, port=taken.getsockname()[1])
        assert nodes.codes() == [0], nodes.said
    assert nodes.lines(0)[0].startswith(f"{SAID}1 node fine in ")


def test_nodes_with_other_software_or_a_wrong_clock_are_named(nodes: Nodes) -> None:
    nodes.start(4, faults={1: "fast_clock", 2: "other_version"})
    assert nodes.codes() == [1, 1, 1, 1], nodes.said
    assert nodes.report.bad == ("node2", "node3")
    clock, software = (f"{SAID}{line}" for line in nodes.report.lines)
    assert clock.startswith(f"{SAID}node2: its clock is 3600.0 s ahead, 60 s allowed")
    assert software.startswith(f"{SAID}node3: other code of peft-dist than node1; peft 0.20.1, ")
    assert nodes.lines(0)[:2] == [clock, software]
    assert "2 of 4 nodes failed in " in nodes.lines(0)[2]
    assert [nodes.lines(index) for index in (1, 2, 3)] == [[clock], [software], []]


def test_nodes_that_find_other_files_do_not_train_and_the_input_is_named(nodes: Nodes) -> None:
    recipe = {"model": {"name": "/models/tiny"}, "data": {"train": str(nodes.folder / "no.jsonl")}}
    (nodes.run_dir / "recipe.yaml").write_text(render_yaml(recipe), encoding="utf-8")
    stale = nodes.folder / "stale"
    stale.mkdir()
    (stale / "config.json").write_text("{}", encoding="utf-8")
    nodes.start(2, faults={1: "other_model"}, STALE_MODEL=str(stale))
    assert nodes.codes() == [2, 2]
    (line,) = nodes.lines(0)
    assert line.startswith(
        f"{SAID}node2 has another config.json of the model than node1: 2 bytes with digest "
    )
    assert ", not nothing there; give every node the same files (in " in line


def test_a_node_that_never_comes_is_named(nodes: Nodes) -> None:
    nodes.start(3, absent=(1,), timeout_s=SHORT_S)
    assert nodes.codes() == [1, 1], nodes.said
    assert nodes.lines(0)[0] == f"{SAID}node2: did not come within 8 s"
    assert nodes.report.bad == ("node2",)
    assert nodes.seconds < SHORT_S


def test_a_node_that_is_still_at_its_set_up_is_late_and_not_to_blame(nodes: Nodes) -> None:
    start = {"PEFT_DIST_LOGS": str(nodes.folder), "PEFT_DIST_NONCE": "f00d"}
    nodes.start(3, "--arrival-s", "4", absent=(1,), timeout_s=SHORT_S, **start)
    assert nodes.codes() == [1, 1], nodes.said
    assert nodes.lines(0)[0].startswith(f"{SAID}node2: not ready after 4 s: still at its set-up")
    assert (nodes.report.bad, nodes.report.late) == ((), ("node2",))


@pytest.mark.parametrize("late", [0, 1])
def test_a_node_that_comes_later_than_the_time_limit_is_fine(nodes: Nodes, late: int) -> None:
    start = {"PEFT_DIST_LOGS": str(nodes.folder), "PEFT_DIST_NONCE": "f00d"}
    port = free_port()
    options = ("--min-free-gb", "0.001")
    nodes.start(2, *options, absent=(late,), timeout_s=12, port=port, **start)
    time.sleep(14)
    assert nodes.started[1 - late].poll() is None
    nodes.start(2, *options, absent=(1 - late,), timeout_s=12, port=port, **start)
    assert nodes.codes() == [0, 0], nodes.said


def test_a_node_that_cannot_import_torch_is_named_with_its_words(nodes: Nodes) -> None:
    start = {"PEFT_DIST_LOGS": str(nodes.folder), "PEFT_DIST_NONCE": "f00d"}
    problem = "torch cannot be imported: libcudart.so: cannot open shared object file"
    facts = replace(gather(1, "node2"), error=problem)
    (nodes.folder / "node2.f00d.ready").write_text(facts.to_json(), encoding="utf-8")
    nodes.start(2, absent=(1,), **start)
    assert nodes.codes() == [1], nodes.said
    assert nodes.lines(0)[0] == f"{SAID}node2: {problem}"
    assert nodes.report.bad == ("node2",)


def test_nodes_that_come_and_then_stop_or_die_are_named(nodes: Nodes) -> None:
    nodes.start(4, faults={2: "stops", 3: "dies"}, timeout_s=SHORT_S)
    assert nodes.codes(0, 1) == [1, 1], nodes.said
    assert nodes.lines(0)[:2] == [f"{SAID}node{number}: stopped answering" for number in (3, 4)]
    assert nodes.report.bad == ("node3", "node4")
    assert nodes.said[1] == ""
    assert nodes.seconds < SHORT_S + 2


def test_a_node_that_no_data_reaches_is_named(nodes: Nodes) -> None:
    nodes.start(3, faults={2: "unreachable"}, timeout_s=SHORT_S)
    assert nodes.codes() == [1, 1, 1], nodes.said
    line = f"{SAID}node3: cannot exchange data with node1 by gloo: no route to host"
    assert nodes.lines(0)[0] == line
    assert nodes.lines(2) == [line]
    assert nodes.report.bad == ("node3",)
    assert nodes.seconds < SHORT_S + 2


def test_links_that_all_fail_are_no_nodes_fault(nodes: Nodes) -> None:
    nodes.start(3, faults=dict.fromkeys(range(3), "unreachable"))
    assert nodes.codes() == [2, 2, 2], nodes.said
    (line,) = nodes.lines(0)
    text = "all 3 nodes: no two nodes can exchange data by gloo: no route to host; see that `inter"
    assert line.startswith(SAID + text)
    assert nodes.report.bad == ()
    assert (nodes.report.common or "").startswith(text)


def test_nodes_end_when_the_head_dies(nodes: Nodes) -> None:
    nodes.start(2, faults={0: "dies"})
    assert nodes.codes() == [-signal.SIGKILL, 1], nodes.said
    (line,) = nodes.lines(1)
    assert line.startswith(f"{SAID}node2 has lost node1: ")
    assert nodes.seconds < TIMEOUT_S


def test_a_taken_port_is_told_apart_from_every_other_fault(nodes: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        nodes.start(2, port=port, timeout_s=SHORT_S)
        assert nodes.codes() == [PORT_TAKEN, 1], nodes.said
    assert nodes.lines(0) == [f"{SAID}port {port} of node1 is taken"]
    (line,) = nodes.lines(1)
    # It has found nobody there, or its time was over first.
    words = f"(cannot reach|gave up after 16 s of waiting for) node1 at 127.0.0.1:{port}"
    assert re.match(f"{re.escape(SAID)}node2 {words}", line)


def test_a_run_directory_that_nobody_can_write_is_no_nodes_fault(nodes: Nodes) -> None:
    nodes.run_dir.rmdir()
    nodes.start(2)
    assert nodes.codes() == [2, 2], nodes.said
    *_, unwritten, summary = nodes.lines(0)
    text = f"cannot write to {nodes.run_dir}: No such file or directory"
    assert summary.startswith(f"{SAID}all 2 nodes: {text}; fix its permissions")
    assert unwritten.startswith(f"{SAID}the report cannot be written to ")
    assert nodes.said[1] == ""


def test_a_full_run_directory_is_no_nodes_fault(nodes: Nodes) -> None:
    with tmpfs(nodes.run_dir, "size=64k"):
        report_path(nodes.run_dir).parent.mkdir()
        nodes.run_dir.joinpath("filler").write_bytes(bytes(40 << 10))
        nodes.start(1)
        assert nodes.codes() == [2], nodes.said
        text = f"node1: cannot write to {nodes.run_dir}: No space left on device; fix its permis"
        assert nodes.lines(0)[-1].startswith(SAID + text)
        assert nodes.report.bad == ()


def test_a_disk_with_too_little_room_is_told_with_what_is_there(nodes: Nodes) -> None:
    nodes.start(1, "--min-free-gb", "1e9")
    assert nodes.codes() == [2], nodes.said
    assert " GB free for the run directory, 1e+09 GB expected; free space" in nodes.said[0]


@pytest.mark.parametrize(
    ("fault", "code"), [("hangs", 1), ("holds_the_interpreter", -signal.SIGALRM)]
)
def test_nothing_outlives_the_time_limit(nodes: Nodes, fault: str, code: int) -> None:
    report_path(nodes.run_dir).parent.mkdir()
    report_path(nodes.run_dir).write_text(Report(2, bad=("node2",)).to_json(), encoding="utf-8")
    nodes.start(2, faults={0: fault}, absent=(1,), timeout_s=12)
    assert nodes.codes() == [code], nodes.said
    assert nodes.seconds < 12 + 15
    if code == 1:
        text = "node1 gave up after 12 s of waiting for the other nodes to come"
        assert nodes.lines(0) == [SAID + text]
    assert Report.read(nodes.run_dir) is None, "an older report is taken for this one's"


def test_a_node_without_the_devices_it_should_have_is_told(nodes: Nodes) -> None:
    nodes.start(2, "--devices", "8")
    assert nodes.codes() == [2, 2], nodes.said
    (line,) = nodes.lines(0)
    assert line.startswith(f"{SAID}all 2 nodes: 0 devices, 8 expected; fix gpus_per_node")
