"""Count the GPUs of this machine without torch, which would wake the driver."""

from collections.abc import Mapping
from pathlib import Path

DEVICES = Path("/dev")


def visible_gpus(environ: Mapping[str, str], device_folder: Path = DEVICES) -> int:
    """Return how many NVIDIA GPUs CUDA would show to a process.

    Args:
        environ: Its environment.
        device_folder: Where the driver puts a file for each.
    """
    present = sum(1 for path in device_folder.glob("nvidia[0-9]*") if path.name[6:].isdigit())
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None or present == 0:
        return present
    count = 0
    for device in chosen.split(","):  # CUDA stops at the first entry it cannot use
        name = device.strip()
        number = int(name) if name.lstrip("-").isdigit() else None
        if not name or (number is not None and not 0 <= number < present):
            break
        count += 1
    return count
