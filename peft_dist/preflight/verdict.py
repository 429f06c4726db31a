"""Judge from the facts of all nodes which of them cannot take part, and say why in one line each.

Pure, but for reading and writing the report. A fault that every node has is no node's fault.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

from peft_dist.checks.finding import Finding
from peft_dist.common.atomic import replace_file
from peft_dist.common.sharing import folder_mode
from peft_dist.preflight.node_info import NOTHING, SILENT, NodeFacts

PORT_TAKEN = 98
"""Exit code of a pre-flight whose port another program has (EADDRINUSE): choose another one."""
ABSENT = "see that the others know its name and that no firewall is between them"
CLOCK = "set the nodes' clocks, or raise preflight.max_clock_offset_s in the cluster file"
"""What to do about a fault that all nodes have; nodes cannot all differ from each other's code."""

Reasons = dict[str, Finding]
"""Why one node fails, by the kind of fault."""

SHARED = ("space", "write")
"""Faults of what nodes share. Of several nodes, any other fault of one that is left is its own."""
_GONE = {"absent", "late", "silent"}
MOST_INPUTS = 3
"""Inputs that are named where more differ."""


class _Common(NamedTuple):
    kind: str
    text: str


@dataclass(frozen=True)
class PreflightLimits:
    """What a node must have, or may not exceed."""

    max_clock_offset_s: float = 60.0
    connect_s: float = 30.0
    """How long the head waits for a node that is ready."""
    arrival_s: float = 1800.0
    """How long it waits for one that is not."""


@dataclass(frozen=True)
class Report:
    """What a pre-flight found."""

    nodes: int
    bad: tuple[str, ...] = ()
    """Names of the nodes to do without."""
    late: tuple[str, ...] = ()
    """Names of those that were still at their set-up, which is no fault of theirs."""
    common: str | None = None
    """The fault of no node, which a person must fix; then `bad` is empty."""
    lines: tuple[str, ...] = ()
    """One for each node that fails."""
    warnings: tuple[str, ...] = ()
    clock_spread_s: float = 0.0
    """Farthest apart that two clocks were seen."""
    all_reduce_s: float | None = None
    """How long an all-reduce of 1 MB over all nodes took; None where there was none."""
    seconds: float = 0.0
    """How long the pre-flight took."""

    @property
    def ok(self) -> bool:
        """Whether training may start on these nodes."""
        return not self.bad and not self.late and self.common is None

    @property
    def summary(self) -> str:
        """The line that says what came of it."""
        took = f"in {self.seconds:.1f} s"
        if self.common is not None:
            return f"{self.common} ({took})"
        if self.bad:
            return f"{len(self.bad)} of {self.nodes} nodes failed {took}: {', '.join(self.bad)}"
        if self.late:
            return (
                f"{len(self.late)} of {self.nodes} nodes not ready {took}: {', '.join(self.late)}"
            )
        found = []
        if self.all_reduce_s is not None:
            found.append(f"all-reduce of 1 MB {self.all_reduce_s * 1e3:.3g} ms")
        if self.nodes > 1:
            found.append(f"clocks within {max(0.01, self.clock_spread_s):.2f} s")
        fine = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{fine} fine {took}: {', '.join(found)}".removesuffix(": ")

    def to_json(self) -> str:
        """Return it as JSON text."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=2) + "\n"

    def write(self, run_dir: Path) -> None:
        """Leave it in a run directory.

        Raises:
            OSError: Where it cannot be written.
        """
        path = report_path(run_dir)
        path.parent.mkdir(mode=folder_mode(), exist_ok=True)
        replace_file(path, self.to_json())

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        """Return the report of a run directory's newest pre-flight; None where it left none."""
        try:
            raw = json.loads(report_path(run_dir).read_text(encoding="utf-8"))
            values = {item.name: raw[item.name] for item in fields(cls)}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


def report_path(run_dir: Path) -> Path:
    """Return where a run directory keeps the newest report."""
    return run_dir / "slurm" / "preflight.json"


def judge(
    facts: Sequence[NodeFacts],
    *,
    expected_nodes: Sequence[str],
    limits: PreflightLimits,
    late: Sequence[int] = (),
) -> Report:
    """Judge the nodes of a job.

    Args:
        facts: Of every node that has come.
        expected_nodes: Names of all nodes, the head's first.
        limits: What they must have.
        late: Indexes of those that were still at their set-up.
    """
    by_index = {fact.index: fact for fact in facts}
    reasons: dict[str, Reasons] = {
        host: _own_faults(by_index.get(index), limits) for index, host in enumerate(expected_nodes)
    }
    for index in late:
        text = f"not ready after {limits.arrival_s:g} s: still at its set-up, staging or imports"
        reasons[expected_nodes[index]] = {"late": _fault("late", text)}
    came = [(host, by_index[i]) for i, host in enumerate(expected_nodes) if i in by_index]
    for host, fault in (*_odd_ones(came), *_wrong_clocks(came, limits)):
        reasons[host][fault.kind] = fault
    common = _common_fault(reasons, limits) or _other_inputs(came)
    if common:
        for found in reasons.values():
            found.pop(common.kind, None)
    failed = [host for host, found in reasons.items() if found]
    offsets = [fact.clock_offset_s for _, fact in came] or [0.0]
    return Report(
        nodes=len(expected_nodes),
        bad=() if common else tuple(host for host in failed if "late" not in reasons[host]),
        late=tuple(host for host in failed if "late" in reasons[host]),
        common=common.text if common else None,
        lines=tuple(f"{host}: {_in_one_line(reasons[host])}" for host in failed),
        warnings=tuple(_warnings(came)),
        clock_spread_s=max(offsets) - min(offsets),
    )


def _own_faults(fact: NodeFacts | None, limits: PreflightLimits) -> Reasons:
    """Return what is wrong with a node whatever the others say."""
    if fact is None:
        text = f"did not come within {limits.connect_s:.3g} s"
        return {"absent": _fault("absent", text, ABSENT)}
    found: Reasons = {}
    if fact.error is not None:
        kind = "silent" if fact.error == SILENT else "error"
        found[kind] = _fault(kind, fact.error)
    for finding in fact.findings:
        if finding.level == "bad":
            known = found.get(finding.kind)
            found[finding.kind] = finding if known is None else known.and_also(finding)
    return found


def _in_one_line(found: Reasons) -> str:
    return "; ".join(fault.text for fault in found.values())


def _fault(kind: str, text: str, remedy: str = "") -> Finding:
    return Finding("bad", kind, text, remedy)


def _odd_ones(came: Sequence[tuple[str, NodeFacts]]) -> list[tuple[str, Finding]]:
    """Return host and fault for each node whose software is not that of the others."""
    differing = []
    having_code = [(host, fact) for host, fact in came if fact.code]
    for host, other, _, _ in _differing(having_code, lambda fact: fact.code):
        differing.append((host, _fault("code", f"other code of peft-dist than {other}")))
    for host, other, own, usual in _differing(came, lambda fact: fact.python):
        differing.append((host, _fault("python", f"Python {own}, {other} has {usual}")))
    differences: dict[str, list[str]] = {}
    for package in sorted({name for _, fact in came for name in fact.versions}):
        for host, other, own, usual in _differing(came, _version_of(package)):
            here = f"{package} {own}" if own else f"no {package}"
            there = usual or "none"
            differences.setdefault(host, []).append(f"{here}, {other} has {there}")
    return differing + [
        (host, _fault("packages", "; ".join(texts))) for host, texts in differences.items()
    ]


def _version_of(package: str) -> Callable[[NodeFacts], str]:
    return lambda fact: fact.versions.get(package, "")


def _differing(
    came: Sequence[tuple[str, NodeFacts]], value_of: Callable[[NodeFacts], str]
) -> list[tuple[str, str, str, str]]:
    """Return host, a usual host, own value and usual value for each node in the minority.

    Where no value has a majority, the head's is the usual one.
    """
    if not came:
        return []
    values = [(host, value_of(fact)) for host, fact in came]
    (usual, most), *rest = Counter(value for _, value in values).most_common()
    if rest and rest[0][1] == most:
        usual = values[0][1]
    other = next(host for host, value in values if value == usual)
    return [(host, other, value, usual) for host, value in values if value != usual]


def _wrong_clocks(
    came: Sequence[tuple[str, NodeFacts]], limits: PreflightLimits
) -> list[tuple[str, Finding]]:
    """Return host and fault for each clock that is surely wrong by more than the limit."""
    offsets = [fact.clock_offset_s for _, fact in came]
    if not offsets:
        return []
    # Most nodes are right, the head not always; of two it is.
    usual = min(statistics.median_low(offsets), statistics.median_high(offsets), key=abs)
    differing = []
    for host, fact in came:
        ahead_s = fact.clock_offset_s - usual
        if abs(ahead_s) - fact.clock_uncertainty_s > limits.max_clock_offset_s:
            way = "ahead" if ahead_s > 0 else "behind"
            limit = f"{limits.max_clock_offset_s:.3g} s allowed"
            text = f"its clock is {abs(ahead_s):.1f} s {way}, {limit}"
            differing.append((host, _fault("clock", text, CLOCK)))
    return differing


def _common_fault(reasons: Mapping[str, Reasons], limits: PreflightLimits) -> _Common | None:
    """Return the fault of all nodes that are there, with its remedy; None where there is none."""
    head, *others = reasons
    here = {host: found for host, found in reasons.items() if not _GONE & found.keys()}
    if len(others) > 1 and all("absent" in reasons[host] for host in others):
        text = f"no other node came to {head} within {limits.connect_s:.3g} s"
        return _Common("absent", f"{text}; {ABSENT}")
    for kind in dict.fromkeys(kind for found in here.values() for kind in found):
        differing = [found[kind] for found in here.values() if kind in found]
        own = len(differing) == 1 and others and kind not in SHARED
        if len(differing) < len(here) or not differing or own:
            continue
        if kind == "error" and len({fault.text for fault in differing}) > 1:
            continue
        who = head if len(differing) == 1 else f"all {len(differing)} nodes"
        return _Common(kind, f"{who}: {differing[0].line}")
    return None


def _other_inputs(came: Sequence[tuple[str, NodeFacts]]) -> _Common | None:
    """Return which nodes find other files than most; None where none does.

    It is no fault of the nodes: to do without some of them would train on what the others have.
    """
    looked = [(host, fact) for host, fact in came if fact.inputs]
    names = dict.fromkeys(name for _, fact in looked for name in fact.inputs)
    texts = [
        f"{host} has another {name} than {other}: {own}, not {usual}"
        for name in names
        for host, other, own, usual in _differing(looked, _input_of(name))
    ]
    if not texts:
        return None
    more = f"; and {len(texts) - MOST_INPUTS} more" if len(texts) > MOST_INPUTS else ""
    shown = "; ".join(texts[:MOST_INPUTS]) + more
    return _Common("inputs", f"{shown}; give every node the same files")


def _input_of(name: str) -> Callable[[NodeFacts], str]:
    return lambda fact: fact.inputs.get(name, NOTHING)


def _warnings(came: Sequence[tuple[str, NodeFacts]]) -> list[str]:
    looked_at = [(host, fact) for host, fact in came if fact.device_kind]
    mixed = [
        f"{host}: GPUs are {own}, {other} has {usual}: every step takes as long as the slower ones"
        for host, other, own, usual in _differing(looked_at, lambda fact: fact.device_kind)
    ]
    notes: dict[str, list[str]] = {}
    for host, fact in came:
        for finding in fact.findings:
            if finding.level == "note":
                notes.setdefault(finding.line, []).append(host)
    for line, hosts in notes.items():  # what all have is told once
        everywhere = len(hosts) == len(came) > 1
        mixed += [
            f"{who}: {line}" for who in ([f"all {len(hosts)} nodes"] if everywhere else hosts)
        ]
    return mixed
