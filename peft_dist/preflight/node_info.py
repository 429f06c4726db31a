"""What one node says of itself before training: its code, its disk, its devices, its clock.

Gathers what needs no torch; the pre-flight adds devices and clock. Judges nothing: see `checks`.
"""

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from peft_dist.common import paths
from peft_dist.common.time_limit import within
from peft_dist.run.provenance import versions

SILENT = "stopped answering"
"""The error of a node that has come and then let a limit pass."""
PROBE_BYTES = 1 << 16
"""What a node writes to the run directory to see that it can; a ledger grows by less at once."""


@dataclass(frozen=True)
class NodeFacts:
    """One node."""

    index: int
    """Its place among the nodes of the job; 0 is the head."""
    host: str
    devices: int | None = None
    """None where they were not counted."""
    free_device_bytes: int | None = None
    """Of the device with the least free memory; None where no device was looked at."""
    device_bytes: int | None = None
    """All memory of that device."""
    device_kind: str = ""
    """What its driver calls the devices; empty where none was looked at."""
    code: str = ""
    """Digest of the installed peft-dist; empty where it could not be read."""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """Of the packages that decide what a run computes."""
    clock_offset_s: float = 0.0
    """How much its clock is ahead of the head's."""
    clock_uncertainty_s: float = 0.0
    """Half of the shortest round trip in which that was seen."""
    free_bytes: int | None = None
    """Where the run directory is."""
    write_s: float | None = None
    """How long a small write took there, fsync included."""
    write_error: str | None = None
    """Why nothing could be written there."""
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
            return cls(**{name: value for name, value in raw.items() if name in known})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"no facts of a node: {text[:100]}") from error


def gather(index: int, host: str, run_dir: Path, *, limit_s: float) -> NodeFacts:
    """Return what a node can say without torch; `limit_s` bounds the look at the run directory."""
    free_bytes = write_s = write_error = error = None
    code = ""
    try:
        free_bytes, write_s = within(limit_s, lambda: _probe(run_dir))
    except TimeoutError:  # an OSError too
        write_error = f"a write to {run_dir} does not end within {limit_s:.3g} s"
    except OSError as problem:
        write_error = f"cannot write to {run_dir}: {problem.strerror}"
    try:
        code = code_digest()
    except OSError as problem:
        error = f"cannot read peft-dist itself: {problem}"
    return NodeFacts(
        index,
        host,
        code=code,
        python=sys.version.split()[0],
        versions=versions(),
        free_bytes=free_bytes,
        write_s=write_s,
        write_error=write_error,
        error=error,
    )


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


def _probe(run_dir: Path) -> tuple[int, float]:
    """Return the free bytes of a folder, and the seconds that a small write there takes."""
    stat = os.statvfs(run_dir)
    started = time.perf_counter()
    with tempfile.TemporaryFile(prefix=".pre-flight-", dir=run_dir) as file:
        file.write(os.urandom(PROBE_BYTES))  # zeros might take no room at all
        file.flush()
        os.fsync(file.fileno())
    return stat.f_bavail * stat.f_frsize, time.perf_counter() - started
