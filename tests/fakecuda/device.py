"""What the fake CUDA runtime has counted; see `stub/runtime.c`."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_ROOM = 1 << 16
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
_RUNTIME = ("cuda", "copy ")
_PRODUCT = "GEMM "


@dataclass
class Counted:
    """Calls by name."""

    calls: Counter[str] = field(default_factory=Counter)

    @property
    def kernels(self) -> int:
        """Kernels that are no matrix products of cuBLAS."""
        others = (*_RUNTIME, _PRODUCT)
        return sum(n for name, n in self.calls.items() if not name.startswith(others))

    @property
    def products(self) -> int:
        """Matrix products of cuBLAS."""
        return sum(n for name, n in self.calls.items() if name.startswith(_PRODUCT))

    @property
    def waits(self) -> int:
        """Calls in which the host waits for the device."""
        return sum(n for name, n in self.calls.items() if name in _WAITS)

    def kernels_named(self, part: str) -> int:
        """Return how many kernels have this in their names."""
        return sum(n for name, n in self.calls.items() if part in name)


def _stub() -> ctypes.CDLL:
    found = ctypes.CDLL(None)  # it is in front of all other libraries
    found.fake_counts.restype = found.fake_pinned_bytes.restype = ctypes.c_size_t
    found.fake_used_bytes.restype = ctypes.c_size_t
    return found


def is_here() -> bool:
    """Whether this process has the fake runtime in front of CUDA's own."""
    return hasattr(ctypes.CDLL(None), "fake_counts")


def pinned_bytes() -> int:
    """Return the bytes of host memory that are page-locked."""
    return int(_stub().fake_pinned_bytes())


def used_bytes(device: int) -> int:
    """Return the bytes of a device that this process has taken."""
    return int(_stub().fake_used_bytes(device))


@contextmanager
def counting() -> Iterator[Counted]:
    """Count what is called inside."""
    counted, stub = Counted(), _stub()
    stub.fake_reset_counts()
    try:
        yield counted
    finally:
        names, counts = (ctypes.c_char_p * _ROOM)(), (ctypes.c_ulong * _ROOM)()
        for index in range(stub.fake_counts(names, counts, ctypes.c_size_t(_ROOM))):
            name = names[index]
            assert name is not None
            counted.calls[name.decode(errors="replace")] += counts[index]


@contextmanager
def tracing(file: Path) -> Iterator[None]:
    """Write what is asked of streams inside, in order, into a file that `trace.py` reads."""
    stub = _stub()
    stub.fake_trace_to(str(file).encode())
    try:
        yield
    finally:
        stub.fake_trace_to(None)


def mark(name: str) -> None:
    """Let a trace show when the host has come to a place; the name has no blank."""
    _stub().fake_trace(f"mark (nil) {name}".encode())
