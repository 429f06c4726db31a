"""The folders of a run: its own, the cache, and that of Hugging Face's libraries."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from peft_dist.checks.context import CheckContext
from peft_dist.checks.finding import Finding
from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.errors import PeftDistError
from peft_dist.common.locks import NO_LOCKS, lock_file
from peft_dist.common.time_limit import within

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs")
LEAST_FREE_BYTES = 10 * 10**9
"""Below this a cache has no room for the packed base of a small model."""
PROBE_BYTES = 1 << 16
"""What is written to a run directory to see that it can be; a ledger grows by less at once."""
SLOW_WRITE_S = 1.0
"""A small durable write that takes longer is worth a word: each checkpoint makes several."""


def check_run_dir(context: CheckContext) -> Iterator[Finding]:
    """Write a little to the run's folder, durably, and see how much room there is."""
    folder = context.run_dir
    if folder is None:
        return
    remedy = "fix its permissions, free space there, or choose another --run-dir"
    try:
        free_bytes, write_s = within(context.limit_s, lambda: _probe(folder))
    except TimeoutError:  # an OSError too
        text = f"a write to {folder} does not end within {context.limit_s:.3g} s"
        yield Finding("bad", "write", text, remedy)
        return
    except OSError as error:
        yield Finding("bad", "write", f"cannot write to {folder}: {error.strerror}", remedy)
        return
    if free_bytes < context.min_free_bytes:
        yield Finding(
            "bad",
            "space",
            f"{free_bytes / 1e9:.3g} GB free for the run directory, "
            f"{context.min_free_bytes / 1e9:.3g} GB expected",
            "free space there, or lower preflight.min_free_gb in the cluster file",
        )
    if write_s > SLOW_WRITE_S:
        text = f"a small durable write to the run directory takes {write_s:.1f} s"
        yield Finding("note", "slow write", text)


def check_caches(context: CheckContext) -> Iterator[Finding]:
    """Look at the folders that packed bases, rows and downloads go to."""
    try:
        ours = usable_cache_dir()
    except PeftDistError as error:
        yield Finding("bad", "cache", str(error))
        return
    hub = context.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    for name, folder in (("cache", ours), ("Hugging Face cache", Path(hub))):
        try:
            there = next(place for place in (folder, *folder.parents) if place.exists())
            free, kind = shutil.disk_usage(there).free, _file_system(there)
        except OSError as error:
            text = f"{name} {str(folder)[:100]}: {error.strerror or error}"
            yield Finding("bad", name, text, "name another folder")
            continue
        text = f"{name} {folder}: {free / 1e9:,.0f} GB free, {kind}"
        if free < LEAST_FREE_BYTES:
            yield Finding("note", name, text, "free some, or move it")
        elif kind in NETWORK_FILE_SYSTEMS:
            yield Finding(
                "ok", name, f"{text}: shared by nodes, and slower than a disk of their own"
            )
        else:
            yield Finding("ok", name, text)
    if not _locks(ours):
        text = f"{ours} has no locks: two starts may pack one base at a time"
        yield Finding("note", "locks", text)


def _probe(run_dir: Path) -> tuple[int, float]:
    """Return the free bytes of a folder, and the seconds that a small write there takes."""
    stat = os.statvfs(run_dir)
    started = time.perf_counter()
    with tempfile.TemporaryFile(prefix=".pre-flight-", dir=run_dir) as file:
        file.write(os.urandom(PROBE_BYTES))  # zeros might take no room at all
        file.flush()
        os.fsync(file.fileno())
    return stat.f_bavail * stat.f_frsize, time.perf_counter() - started


def _locks(folder: Path) -> bool:
    """Whether the file system of a folder takes locks; a folder that is not there counts as so."""
    if not folder.is_dir():
        return True
    file = folder / f".doctor-{os.uname().nodename}-{os.getpid()}.lock"
    try:
        with lock_file(file, wait_s=1) as held:
            return held
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        file.unlink(missing_ok=True)


def _file_system(folder: Path) -> str:
    """Return the kind of file system that a folder lies on, as Linux calls it."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown file system"
    mounts = [line.split()[1:3] for line in lines if len(line.split()) > 2]
    real = folder.resolve()
    above = [(point, kind) for point, kind in mounts if real.is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown file system"))[1]
