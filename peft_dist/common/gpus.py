"""Count the GPUs of this machine without torch, which would wake the driver."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

DEVICES = Path("/dev")
TOPOLOGY = Path("/sys/class/kfd/kfd/topology/nodes")
"""What AMD's driver says of CPUs and GPUs, a folder for each."""


def visible_gpus(
    environ: Mapping[str, str], device_folder: Path = DEVICES, topology: Path = TOPOLOGY
) -> int:
    """Return how many GPUs CUDA, or else ROCm, would show to a process.

    Args:
        environ: Its environment.
        device_folder: Where the driver puts a file for each.
        topology: Where AMD's driver describes each.
    """
    present = sum(1 for path in device_folder.glob("nvidia[0-9]*") if path.name[6:].isdigit())
    if present:
        return _chosen(environ.get("CUDA_VISIBLE_DEVICES"), present)
    # ROCm leaves out in two steps, and HIP reads CUDA's variable where it has none of its own.
    present = _chosen(environ.get("ROCR_VISIBLE_DEVICES"), _amd_gpus(device_folder, topology))
    chosen = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
    return _chosen(chosen, present)


def _chosen(devices: str | None, present: int) -> int:
    if devices is None or present == 0:
        return present
    count = 0
    for device in devices.split(","):  # CUDA and HIP stop at the first entry they cannot use
        name = device.strip()
        number = int(name) if name.lstrip("-").isdigit() else None
        if not name or (number is not None and not 0 <= number < present):
            break
        count += 1
    return count


def _amd_gpus(device_folder: Path, topology: Path) -> int:
    """Count the GPUs of AMD's driver that this process may open; a container may have a part."""
    found = 0
    for properties in topology.glob("*/properties"):
        with suppress(OSError, ValueError, KeyError):
            if int((properties.parent / "gpu_id").read_text(encoding="ascii") or 0) == 0:
                continue  # a CPU
            text = properties.read_text(encoding="ascii")
            minor = dict(line.split(" ", 1) for line in text.splitlines())["drm_render_minor"]
            found += (device_folder / "dri" / f"renderD{minor.strip()}").exists()
    return found
