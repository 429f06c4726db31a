"""What one node says of itself before training: its code, inputs, disk, devices and clock.

Gathers what needs no torch; the pre-flight adds devices and clock. What is wrong with a machine
whatever the others say, the checks of `doctor` find.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from peft_dist.checks.finding import Finding
from peft_dist.common import paths
from peft_dist.run.provenance import versions

NOTHING = "nothing there"
"""What a node finds in the place of an input that it lacks."""
SILENT = "stopped answering"
"""The error of a node that has come and then let a limit pass."""


@dataclass(frozen=True)
class NodeFacts:
    """One node."""

    index: int
    """Its place among the nodes of the job; 0 is the head."""
    host: str
    device_kind: str = ""
    """What its driver calls the devices; empty where none was looked at."""
    code: str = ""
    """Digest of the installed peft-dist; empty where it could not be read."""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that decide what a run computes."""
    inputs: dict[str, str] = field(default_factory=dict)
    """What it finds of the recipe's files, by name; empty where it could not look."""
    clock_offset_s: float = 0.0
    """How much its clock is ahead of the head's."""
    clock_uncertainty_s: float = 0.0
    """Half of the shortest round trip in which that was seen."""
    findings: tuple[Finding, ...] = ()
    """Of the checks, all that is not as it should be."""
    error: str | None = None
    """Any other fault."""

    def to_json(self) -> str:
        """Return it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` of any version wrote: nodes with another one must be told apart.

        Raises:
            ValueError: For text that is no such thing.
        """
        raw = json.loads(text)
        known = {item.name for item in fields(cls)}
        try:
            values = {name: value for name, value in raw.items() if name in known}
            found = tuple(Finding(**one) for one in values.pop("findings", ()))
            return cls(**values, findings=found)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no facts of a node: {text[:100]}") from error


def gather(index: int, host: str) -> NodeFacts:
    """Return what a node can say without torch and without waiting for anything."""
    code, error = "", None
    try:
        code = code_digest()
    except OSError as problem:
        error = f"cannot read peft-dist itself: {problem}"
    return NodeFacts(
        index, host, code=code, python=sys.version.split()[0], versions=versions(), error=error
    )


def told(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return what the head is to know of: not what is as it should be."""
    return tuple(finding for finding in findings if finding.level != "ok")


def code_digest() -> str:
    """Return a hash over every line of Python that training could run of ours.

    Raises:
        OSError: Where a file cannot be read.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_code_files()):
        content = path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _code_files() -> Iterator[tuple[str, Path]]:
    package = Path(__file__).resolve().parents[1]
    for path in package.rglob("*.py"):
        yield f"peft_dist/{path.relative_to(package)}", path
    for path in (paths.root() / "launch").glob("*.py"):
        yield f"launch/{path.name}", path
