"""`peft-dist doctor`: what of this machine, or of a recipe's needs, would end a run or slow it.

Imports neither torch nor any other part of the data plane: what is installed is read from its
metadata, what there is of GPUs from the driver's own tool.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from peft_dist.common.cache_folder import usable_cache_dir
from peft_dist.common.errors import EXIT_DONE, EXIT_USER_ERROR, PeftDistError
from peft_dist.common.locks import NO_LOCKS, lock_file
from peft_dist.common.table import Column, print_lines, stdout_form, table_lines
from peft_dist.config import Recipe, load_recipe
from peft_dist.config.cluster import Cluster, load_cluster
from peft_dist.launch.placement import this_machine
from peft_dist.plan.doctor_network import examine_network
from peft_dist.plan.finding import Finding
from peft_dist.plan.known_faults import driver_fault, installed, keeps, known_faults
from peft_dist.plan.plan import hub_is_off, read_config, subject_of
from peft_dist.plan.settle import cluster_hardware, settle

NETWORK_FILE_SYSTEMS = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "fuse.sshfs")
LEAST_FREE_BYTES = 10 * 10**9
"""Below this a cache has no room for the packed base of a small model."""
QUERY = ["nvidia-smi", "--query-gpu=index,name,memory.total,memory.used,driver_version",
         "--format=csv,noheader,nounits"]  # fmt: skip
BUSY_MIB = 1024
"""Of a GPU's memory that others may use before that is worth a word."""
HANG_MARGIN = 3.0
"""Times a planned step that a watchdog should wait at least."""
STALE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID",
         "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")  # fmt: skip
"""What a launcher exports to its workers; in a shell it is left over from something."""

_STYLES = {"ok": "green", "note": "yellow", "bad": "red"}
_COLUMNS = (Column("", style=lambda level: _STYLES[level]), Column("", wrap=True))


def examine(recipe_file: str | None, cluster_file: str | None) -> int:
    """Print every finding; return 2 where one would end a run.

    Raises:
        PeftDistError: For a cluster file that cannot be used as written.
    """
    cluster = None if cluster_file is None else load_cluster(cluster_file)
    found = [*_packages(), *_gpus(), *_caches(), *_environment(os.environ)]
    found += examine_network(os.environ)
    if recipe_file is not None:
        try:
            found += _recipe(load_recipe(recipe_file), cluster)
        except PeftDistError as error:
            found.append(Finding("bad", str(error)))
    width, colour = stdout_form()
    rows = [(finding.level, finding.text) for finding in found]
    print_lines(table_lines(_COLUMNS, rows, width=width, colour=colour))
    return EXIT_USER_ERROR if any(one.level == "bad" for one in found) else EXIT_DONE


def _packages() -> Iterator[Finding]:
    """Compare what is installed with the ranges that this version is made for."""
    versions = []
    try:
        required = importlib.metadata.requires("peft-dist") or ()
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        yield Finding("note", "peft-dist is not installed: versions were not compared")
        return
    for text in required:
        requirement, _, marker = text.partition(";")
        match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(.*)", requirement)
        if match is None or (marker and not re.search(r"extra\s*==\s*['\"]train['\"]", marker)):
            continue
        name, limits = match[1], match[2].strip()
        if name == "peft-dist":
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("bad", f"{name} is not installed; pip install 'peft-dist[train]'")
            continue
        versions.append(f"{name} {version}")
        broken = [limit for limit in limits.split(",") if limit and not keeps(version, limit)]
        if broken:
            yield Finding("bad", f"{name} {version} is not {limits}; pip install '{name}{limits}'")
    yield Finding("ok", f"installed: {', '.join(versions)}")
    yield from known_faults()


def _gpus() -> Iterator[Finding]:
    """Look at the driver, its GPUs, and whether torch and bitsandbytes are made for them."""
    count = this_machine().gpus
    build = (installed("torch") or "").partition("+")[2]
    if not count:
        yield Finding("ok", "no GPU is visible here: training would run on the CPU")
        return
    if build == "cpu":
        yield Finding(
            "bad",
            f"{count} GPUs, but torch is built for the CPU ({installed('torch')}); "
            "install a CUDA or ROCm build from download.pytorch.org",
        )
    if build.startswith("rocm"):
        yield from _amd_gpus(count)
        return
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is not None and spec.origin is not None:
        built = sorted(Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so"))
        if not built:
            yield Finding("bad", "bitsandbytes has no CUDA library; reinstall it with pip")
    try:
        done = subprocess.run(
            QUERY, capture_output=True, text=True, errors="replace", check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("bad", f"nvidia-smi fails ({type(error).__name__}); repair the driver")
        return
    for line in done.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 5 or not (parts[2].isdecimal() and parts[3].isdecimal()):
            continue
        index, name, total, used, driver = parts
        text = f"GPU {index}: {name}, {total} MiB, {used} in use, driver {driver}"
        busy = int(used) > BUSY_MIB
        yield Finding("note" if busy else "ok", text + ("; end what uses it" if busy else ""))
        fault = driver_fault(build, driver)
        if fault is not None:
            yield fault
    nccl = installed("nvidia-nccl-cu13") or installed("nvidia-nccl-cu12")
    if nccl is not None:
        yield Finding("ok", f"NCCL {nccl}, torch built for {build or 'an unknown CUDA'}")


def _amd_gpus(count: int) -> Iterator[Finding]:
    argv = ["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=20)
        cards = {name: facts for name, facts in json.loads(done.stdout).items() if "card" in name}
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
        yield Finding("note", f"{count} GPUs, and rocm-smi fails ({type(error).__name__})")
        return
    for name, facts in sorted(cards.items()):
        sizes = [int(facts[key]) for key in facts if "VRAM" in key and facts[key].isdecimal()]
        used, total = min(sizes, default=0) >> 20, max(sizes, default=0) >> 20
        kind = facts.get("Card Series") or facts.get("Card series") or "AMD GPU"
        text = f"{name}: {kind}, {total} MiB, {used} in use"
        busy = used > BUSY_MIB
        yield Finding("note" if busy else "ok", text + ("; end what uses it" if busy else ""))


def _caches() -> Iterator[Finding]:
    """Look at the folders that packed bases, rows and downloads go to."""
    try:
        ours = usable_cache_dir()
    except PeftDistError as error:
        yield Finding("bad", str(error))
        return
    hub = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    for name, folder in (("cache", ours), ("Hugging Face cache", Path(hub))):
        try:
            there = next(place for place in (folder, *folder.parents) if place.exists())
            free, kind = shutil.disk_usage(there).free, _file_system(there)
        except OSError as error:
            told = error.strerror or str(error)
            yield Finding("bad", f"{name} {str(folder)[:100]}: {told}; name another folder")
            continue
        text = f"{name} {folder}: {free / 1e9:,.0f} GB free, {kind}"
        if free < LEAST_FREE_BYTES:
            yield Finding("note", f"{text}; free some, or move it")
        elif kind in NETWORK_FILE_SYSTEMS:
            yield Finding("note", f"{text}: shared by nodes, and slower than a disk of their own")
        else:
            yield Finding("ok", text)
    if not _locks(ours):
        yield Finding("note", f"{ours} has no locks: two starts may pack one base at a time")


def _locks(folder: Path) -> bool:
    """Whether the file system of a folder takes locks; a folder that is not there counts as so."""
    if not folder.is_dir():
        return True
    file = folder / f".doctor-{os.getpid()}.lock"
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


def _environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Look for what a launcher left behind."""
    stale = [name for name in STALE if name in environ]
    if stale:
        yield Finding(
            "bad",
            f"{', '.join(stale)} of a launcher is set in this shell; unset {' '.join(stale)}",
        )
    if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
        yield Finding(
            "note",
            f"this shell is inside Slurm job {environ['SLURM_JOB_ID']}: "
            "`submit` from a login node, or `train` on this node alone",
        )


def _recipe(recipe: Recipe, cluster: Cluster | None) -> Iterator[Finding]:
    """Look whether a recipe's model can be found, and whether it fits."""
    try:
        config = read_config(recipe.model.name, recipe.model.revision, network=not hub_is_off())
    except PeftDistError as error:
        yield Finding("bad", str(error))
        return
    try:
        subject = subject_of(recipe, config)
    except PeftDistError as error:
        yield Finding("note", f"no plan: {error}")
        return
    yield Finding("ok", f"model {recipe.model.name}: {subject.shape.parameters:,} parameters")
    hardware = None if cluster is None else cluster_hardware(cluster)
    if hardware is None:
        return
    settled = settle(recipe, hardware, 1)
    if settled.estimate is None:
        return
    if not settled.fits:
        yield Finding("bad", f"does not fit on one node: {settled.remedy}")
    step_s, limit_s = settled.estimate.seconds.total, recipe.watchdog.min_s
    if HANG_MARGIN * step_s > limit_s:
        yield Finding(
            "note",
            f"a step is planned to take {step_s:.0f} s, and counts as hung after {limit_s:g}; "
            f"raise watchdog.min_s to {HANG_MARGIN * step_s:.0f}",
        )
