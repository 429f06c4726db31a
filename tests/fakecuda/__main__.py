"""Run tests of this folder on CUDA code without a GPU: build the stub, start pytest behind it.

    .venv-cuda/bin/python -m tests.fakecuda [pytest's arguments]

Needs a CUDA build of torch with its libraries, and a C compiler; see `stub/runtime.c`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from peft_dist.worker.process import set_allocator

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "tests.fakecuda"]
STUB = HERE / "stub"
LIBRARIES = {
    "libfakecuda.so": (
        "runtime.c",
        "blas.c",
        "blas_silent.c",
        "solver.c",
        "solver_silent.c",
        "nccl.c",
    ),
    "libcuda.so.1": ("driver.c",),
    "libnvidia-ml.so.1": ("nvml.c",),
}
"""By file name, what each is built from. The first is put in front of all others, the rest are
found by the names that the real ones have."""


def _package(name: str) -> Path:
    """Return the folder of a package, without importing it."""
    found = find_spec(name)
    places = None if found is None else found.submodule_search_locations
    if not places:
        sys.exit(
            f"tests.fakecuda: {sys.executable} has no {name}; `make fakegpu` makes one that has"
        )
    return Path(places[0])


def build() -> Path:
    """Compile the stub, unless it is there already; return its folder."""
    sources = sorted(path for path in STUB.rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"peft-dist-fakecuda-{os.getuid()}-{digest}"
    folder.mkdir(mode=0o700, exist_ok=True)
    headers = [
        STUB / "include",
        _package("nvidia") / "cu13" / "include",
        _package("nvidia") / "nccl" / "include",
        _package("triton") / "backends" / "nvidia" / "include",
    ]
    for name, files in LIBRARIES.items():
        if (folder / name).exists():
            continue
        built = folder / f"{name}.{os.getpid()}"
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w"]
        command += [f"-I{header}" for header in headers]
        command += [*(str(STUB / file) for file in files), "-o", str(built), "-lpthread"]
        subprocess.run(command, check=True)
        built.replace(folder / name)
    return folder


def _halves() -> tuple[list[Path], list[Path]]:
    """Return two lists of test files that take about as long as each other."""
    files = sorted(HERE.glob("test_*.py"))
    longest = HERE / "test_life.py"
    return [longest], [file for file in files if file != longest]


def main() -> None:
    """Start pytest in a process that has the stub in front of CUDA's libraries.

    Without arguments all tests run, in two processes side by side.
    """
    folder = build()
    stub = str(folder / "libfakecuda.so")
    if os.environ.get("LD_PRELOAD") != stub:
        for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            os.environ.pop(name, None)
        set_allocator(os.environ)  # as every rank does
        os.environ["LD_PRELOAD"] = stub
        os.environ["LD_LIBRARY_PATH"] = str(folder)
        os.environ["PYTHONSAFEPATH"] = ""
        os.execv(sys.executable, [*COMMAND, *sys.argv[1:]])
    if not sys.argv[1:]:
        halves = [subprocess.Popen([*COMMAND, "-q", *map(str, half)]) for half in _halves()]
        sys.exit(max(half.wait() for half in halves))
    import pytest

    arguments = sys.argv[1:]
    code = int(pytest.main(["-p", "no:cacheprovider", *arguments]))
    sys.stdout.flush()
    sys.stderr.flush()
    # CUDA's own libraries tear down what the stub never made.
    os._exit(code)


if __name__ == "__main__":
    main()
