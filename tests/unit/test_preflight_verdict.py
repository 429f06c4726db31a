"""What is said of nodes before training, by their facts: every sentence, and who is to blame."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_dist.checks import folders
from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.checks.folders import check_run_dir
from peft_dist.checks.gpu_tools import GpuState
from peft_dist.checks.gpus import check_gpus
from peft_dist.common.time_limit import within
from peft_dist.preflight.node_info import SILENT, NodeFacts, code_digest, gather, told
from peft_dist.preflight.verdict import PreflightLimits, Report, judge, report_path

GB = 10**9
LIMITS = PreflightLimits(max_clock_offset_s=60, connect_s=30)
FINE = NodeFacts(
    index=0,
    host="",
    code="c0de",
    python="3.11.2",
    versions={"peft": "0.21.0", "torch": "2.13.0"},
    clock_uncertainty_s=0.001,
)


def found_by(check: Callable[[CheckContext], Iterable[Finding]], **around: Any) -> dict[str, Any]:
    """Return the facts of a node with what a check finds in these surroundings."""
    return {"findings": told(check(CheckContext(**around)))}


def with_gpus(count: int, *, free_gb: int = 79) -> dict[str, Any]:
    """Return the facts of a node that has some of eight GPUs."""
    seen = [GpuState(f"GPU {index}", "H100", 80 * GB, free_gb * GB) for index in range(count)]
    return found_by(check_gpus, devices=8, look_at_gpus=lambda _: seen)


SEVEN, FULL = with_gpus(7), with_gpus(8, free_gb=12)
UNWRITTEN = found_by(check_run_dir, run_dir=Path("/nowhere/run"))
NO_ROOM = found_by(check_run_dir, run_dir=Path(tempfile.gettempdir()), min_free_bytes=1e18)
SPACE = NO_ROOM["findings"][0].text


def report_of(*nodes: NodeFacts | None | dict[str, Any]) -> Report:
    """Judge node1, node2, ..., each fine but for some facts; None has not come."""
    hosts = [f"node{number}" for number in range(1, len(nodes) + 1)]
    came = [
        replace(FINE, index=index, host=hosts[index], **(node if isinstance(node, dict) else {}))
        for index, node in enumerate(nodes)
        if node is not None
    ]
    return judge(came, expected_nodes=hosts, limits=LIMITS)


def assert_bad(report: Report, *lines: str) -> None:
    """See that some nodes are blamed, each in one line."""
    assert report.lines == lines
    assert report.bad == tuple(line.partition(":")[0] for line in lines)
    assert report.common is None
    assert not report.ok


def assert_common(report: Report, text: str) -> None:
    """See that no node is blamed."""
    assert report.common == text
    assert report.bad == ()
    assert report.lines == ()
    assert not report.ok


def test_nodes_with_different_gpus_are_told_of_and_train_all_the_same() -> None:
    report = report_of({"device_kind": "A100"}, {"device_kind": "H100"}, {"device_kind": "A100"})
    assert report.ok
    assert report.warnings == (
        "node2: GPUs are H100, node1 has A100: every step takes as long as the slower ones",
    )
    assert report_of({"device_kind": "A100"}, {}).warnings == ()  # of one nothing is known


def test_nodes_that_are_fine_are_fine() -> None:
    report = report_of({}, {"clock_offset_s": 0.2}, {})
    assert report.ok
    assert (report.bad, report.lines, report.warnings, report.common) == ((), (), (), None)
    done = replace(report, seconds=2.14, all_reduce_s=0.003)
    assert done.summary == "3 nodes fine in 2.1 s: all-reduce of 1 MB 3 ms, clocks within 0.20 s"
    assert replace(report_of({}), seconds=1.0).summary == "1 node fine in 1.0 s"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (None, "did not come within 30 s"),
        ({"error": SILENT}, "stopped answering"),
        ({"error": "its devices do not answer"}, "its devices do not answer"),
        (SEVEN, "7 devices, 8 expected"),
        (FULL, "; ".join(f"GPU {index}: H100, 76293 MiB, 64849 in use" for index in range(8))),
        ({"code": "other"}, "other code of peft-dist than node1"),
        ({"versions": {"peft": "0.20.1", "torch": "2.13.0"}}, "peft 0.20.1, node1 has 0.21.0"),
        ({"versions": {"torch": "2.13.0"}}, "no peft, node1 has 0.21.0"),
        ({"versions": FINE.versions | {"wandb": "1.0"}}, "wandb 1.0, node1 has none"),
        ({"python": "3.12.0"}, "Python 3.12.0, node1 has 3.11.2"),
        ({"clock_offset_s": 90.0}, "its clock is 90.0 s ahead, 60 s allowed"),
        ({"clock_offset_s": -90.0}, "its clock is 90.0 s behind, 60 s allowed"),
        pytest.param(NO_ROOM, SPACE, id="no room"),  # workers would disagree about how much is free
        (UNWRITTEN, "cannot write to /nowhere/run: No such file or directory"),
    ],
)  # fmt: skip
def test_a_node_at_fault_is_named_with_its_fault(fault: dict[str, Any] | None, text: str) -> None:
    assert_bad(report_of({}, {}, fault, {}), f"node3: {text}")


def test_a_node_with_several_faults_has_one_line() -> None:
    both = {"findings": (*SEVEN["findings"], *NO_ROOM["findings"]), "python": "3.12.0"}
    (line,) = report_of({}, {}, both).lines
    assert line == f"node3: 7 devices, 8 expected; {SPACE}; Python 3.12.0, node1 has 3.11.2"
    assert SPACE.endswith(" GB free for the run directory, 1e+09 GB expected")


def test_more_devices_than_expected_and_none_looked_at_are_no_fault() -> None:
    assert report_of(with_gpus(16), found_by(check_gpus, devices=0)).ok


def test_other_files_are_a_persons_to_make_alike_and_no_nodes_fault() -> None:
    own, stale = {"config.json of the model": "2 bytes", "rows": "9 bytes"}, {"rows": "8 bytes"}
    blind: dict[str, str] = {}
    report = report_of({"inputs": own}, {"inputs": own}, {"inputs": blind}, {"inputs": stale})
    assert report.common == (
        "node4 has another config.json of the model than node1: nothing there, not 2 bytes; "
        "node4 has another rows than node1: 8 bytes, not 9 bytes; give every node the same files"
    )
    assert report.bad == report.lines == ()
    assert not report.ok
    assert report_of({"inputs": own}, {"inputs": dict(reversed(own.items()))}).ok


def test_the_minority_is_at_fault_though_it_be_the_head() -> None:
    old = {"versions": {"peft": "0.20.1", "torch": "2.13.0"}}
    assert_bad(report_of(old, {}, {}), "node1: peft 0.20.1, node2 has 0.21.0")
    assert_bad(
        report_of({}, old, old, {}, {}),
        "node2: peft 0.20.1, node1 has 0.21.0",
        "node3: peft 0.20.1, node1 has 0.21.0",
    )


def test_in_a_tie_the_head_is_right() -> None:
    assert_bad(report_of({}, {"code": "b"}), "node2: other code of peft-dist than node1")
    assert_bad(
        report_of({"python": "3.12.1"}, {}, {"python": "3.12.1"}, {}),
        "node2: Python 3.11.2, node1 has 3.12.1",
        "node4: Python 3.11.2, node1 has 3.12.1",
    )


def test_a_head_whose_clock_is_wrong_is_named_instead_of_all_others() -> None:
    ahead = {"clock_offset_s": 90.0}
    assert_bad(report_of({}, ahead, ahead), "node1: its clock is 90.0 s behind, 60 s allowed")
    assert report_of({}, ahead).bad == ("node2",)
    assert report_of({}, ahead, ahead, {}).bad == ("node2", "node3")


def test_a_clock_that_may_be_right_is_no_fault() -> None:
    seen_badly = {"clock_offset_s": 61.0, "clock_uncertainty_s": 1.5}
    assert report_of({}, seen_badly, {}).ok
    assert not report_of({}, seen_badly | {"clock_uncertainty_s": 0.5}, {}).ok


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            SEVEN,
            "all 3 nodes: 7 devices, 8 expected; fix gpus_per_node in the cluster file",
        ),
        (
            NO_ROOM,
            f"all 3 nodes: {SPACE}; free space there, or lower preflight.min_free_gb in the "
            "cluster file",
        ),
        (
            UNWRITTEN,
            "all 3 nodes: cannot write to /nowhere/run: No such file or directory; fix its "
            "permissions, free space there, or choose another --run-dir",
        ),
        (
            {"findings": FULL["findings"][:2]},
            "all 3 nodes: GPU 0: H100, 76293 MiB, 64849 in use; GPU 1: H100, 76293 MiB, 64849 in "
            "use; end what uses it, or ask for nodes of your own (exclusive)",
        ),
        ({"error": "no two nodes can talk"}, "all 3 nodes: no two nodes can talk"),
    ],
)
def test_a_fault_of_all_nodes_is_no_nodes_fault(fault: dict[str, Any], text: str) -> None:
    assert_common(report_of(fault, fault, fault), text)


def test_a_fault_of_all_that_came_is_no_nodes_fault_and_absence_still_is_told() -> None:
    report = report_of(NO_ROOM, None, NO_ROOM)
    assert report.common is not None
    assert report.bad == ()
    assert report.lines == ("node2: did not come within 30 s",)


def test_different_errors_are_faults_of_different_nodes() -> None:
    report = report_of({"error": "a"}, {"error": "b"})
    assert_bad(report, "node1: a", "node2: b")


def test_a_head_that_all_others_miss_is_not_their_fault() -> None:
    assert_common(
        report_of({}, None, None),
        "no other node came to node1 within 30 s; see that the others know its name and that no "
        "firewall is between them",
    )
    assert_bad(report_of({}, None), "node2: did not come within 30 s")


@pytest.mark.parametrize(
    "fault",
    [SEVEN, FULL, NO_ROOM, {"error": "its devices hang"}],
)
def test_a_run_of_one_node_never_does_without_it(fault: dict[str, Any]) -> None:
    report = report_of(fault)
    assert report.bad == ()
    assert (report.common or "").startswith("node1: ")


def test_a_node_that_is_left_alone_is_blamed_for_its_own_and_not_for_the_disk() -> None:
    assert report_of(SEVEN, None).bad == ("node1", "node2")
    report = report_of(NO_ROOM, None)
    assert report.bad == ()
    assert (report.common or "").startswith(f"node1: {SPACE}; ")


def test_a_node_at_its_set_up_is_late_and_not_to_blame() -> None:
    report = judge([FINE], expected_nodes=["node1", "node2"], limits=LIMITS, late=[1])
    assert (report.ok, report.bad, report.late, report.common) == (False, (), ("node2",), None)
    (line,) = report.lines
    assert line == "node2: not ready after 1800 s: still at its set-up, staging or imports"
    report = judge(
        [FINE, replace(FINE, index=2, **SEVEN)],
        expected_nodes=["node1", "node2", "node3"],
        limits=LIMITS,
        late=[1],
    )
    assert (report.bad, report.late) == (("node3",), ("node2",))


def test_a_slow_disk_is_worth_a_word_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "_probe", lambda _: (500 * GB, 3.21))
    slow = found_by(check_run_dir, run_dir=Path("/x"))
    report = report_of({}, slow)
    assert report.ok
    text = "a small durable write to the run directory takes 3.2 s"
    assert report.warnings == (f"node2: {text}",)
    assert report_of(slow, slow).warnings == (f"all 2 nodes: {text}",)


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert Report.read(tmp_path) is None
    report = replace(report_of({}, None, SEVEN), seconds=1.5, all_reduce_s=0.1)
    report.write(tmp_path)
    assert Report.read(tmp_path) == report
    assert json.loads(report_path(tmp_path).read_text())["ok"] is False
    for text in ("", "[]", "{}", '{"nodes": 1'):
        report_path(tmp_path).write_text(text, encoding="utf-8")
        assert Report.read(tmp_path) is None


def test_facts_of_another_version_can_still_be_read() -> None:
    assert NodeFacts.from_json(FINE.to_json()) == FINE
    full = replace(FINE, **FULL)
    assert NodeFacts.from_json(full.to_json()) == full
    assert NodeFacts.from_json('{"index": 3, "host": "a", "new": 1}') == NodeFacts(3, "a")
    unknown = '{"index": 3, "host": "a", "findings": [{"worse": 1}]}'
    for text in ("", "[]", "{}", '{"host": "a"}', unknown):
        with pytest.raises(ValueError):
            NodeFacts.from_json(text)


def test_a_node_gathers_its_facts() -> None:
    facts = gather(2, "node3")
    assert (facts.index, facts.host, facts.error) == (2, "node3", None)
    assert facts.code == code_digest()
    assert facts.versions["peft"]


def test_a_look_at_a_run_directory_ends_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    around = CheckContext(run_dir=tmp_path, limit_s=0.1)
    assert not told(check_run_dir(replace(around, limit_s=10)))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(folders, "_probe", lambda _: time.sleep(60))
    (found,) = check_run_dir(around)
    assert found.text == f"a write to {tmp_path} does not end within 0.1 s"


def test_work_within_a_limit_returns_raises_or_is_given_up() -> None:
    assert within(10, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0)
    with pytest.raises(TimeoutError):
        within(0.05, lambda: time.sleep(30))


def test_checks_and_facts_import_no_torch() -> None:
    code = (
        "import peft_dist.preflight.verdict, peft_dist.preflight.main, sys\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
