"""Versions that work, but with a fault that upstream knows: each with where that is told."""

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft_dist.checks.finding import Finding


@dataclass(frozen=True)
class KnownFault:
    """One fault of some versions of a package."""

    package: str
    limits: str
    """The versions that have it, as a requirement says so: `<2.12`, or `==2.29.2`."""
    text: str
    """What goes wrong, and what to do."""
    told_in: str
    """Repository and number."""


KNOWN_FAULTS = (
    KnownFault(
        "torch",
        "<2.12",
        "its torchrun kills workers 30 s after SIGTERM; use 2.12 where saving takes longer",
        "pytorch/pytorch#119856",
    ),
    KnownFault(
        "nvidia-nccl-cu12", "==2.29.2", "collectives may hang; use 2.29.3", "pytorch/pytorch#174338"
    ),
    KnownFault(
        "nvidia-nccl-cu13", "==2.29.2", "collectives may hang; use 2.29.3", "pytorch/pytorch#174338"
    ),
    KnownFault(
        "bitsandbytes",
        "==0.48.0",
        "8-bit models that were stored quantized generate nonsense; use 0.48.1",
        "bitsandbytes-foundation/bitsandbytes#1775",
    ),
)
LEAST_DRIVER = {"12": 525, "13": 580}
"""Driver that a CUDA of this major version needs, by table 1 of
https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html."""


def known_faults() -> Iterator[Finding]:
    """Name what is installed and has a known fault."""
    for fault in KNOWN_FAULTS:
        version = installed(fault.package)
        if version is not None and all(keeps(version, one) for one in fault.limits.split(",")):
            text = f"{fault.package} {version}: {fault.text} ({fault.told_in})"
            yield Finding("note", f"fault of {fault.package}", text)


def driver_fault(build: str, driver: str) -> Finding | None:
    """Return what is wrong where a driver is too old for a build of torch, such as cu130."""
    match = re.fullmatch(r"cu(\d{2})\d", build)
    least = None if match is None else LEAST_DRIVER.get(match[1])
    own = numbers(driver)
    if match is None or least is None or not own or own[0] >= least:
        return None
    return Finding(
        "bad",
        "device driver",
        f"driver {driver} is too old for CUDA {match[1]} of this torch",
        f"take driver {least} or newer, or a torch that was built for an older CUDA",
    )


def installed(name: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """Return the first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def keeps(version: str, limit: str) -> bool:
    """Whether a version keeps one limit, such as `<6` or `>=5.17`."""
    match = re.fullmatch(r"\s*(>=|<=|==|!=|<|>)\s*([0-9.]+)\s*", limit)
    if match is None:
        return True
    own, other = numbers(version), numbers(match[2])
    width = max(len(own), len(other))
    own, other = (found + (0,) * (width - len(found)) for found in (own, other))
    return {
        ">=": own >= other, "<=": own <= other, "==": own == other,
        "!=": own != other, "<": own < other, ">": own > other,
    }[match[1]]  # fmt: skip
