"""Tell one task of a node which of its GPUs is its own, where Slurm does not."""

from collections.abc import Mapping

DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Where Slurm and sites name the GPUs of a task."""


def own_gpu(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variable by which a task sees one GPU of its node, by its place there.

    Nothing where Slurm has bound them (`--gpus-per-task`, `--gpu-bind`), or the task shall have
    none.
    """
    place = int(environ["SLURM_LOCALID"])
    for name in DEVICES:
        if name in environ:
            devices = [word for word in environ[name].split(",") if word]
            return {name: devices[place]} if len(devices) > 1 and place < len(devices) else {}
    return {DEVICES[0]: str(place)}
