"""The adapter on disk, in PEFT's format, whole or not there.

Only trained tensors are gathered and written; the base is never touched.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_dist.errors import RunDirError, TrainingError

ADAPTER_FILE = "adapter_model.safetensors"


def saved_names(peft: PeftModel, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the name each trained tensor has in PEFT's file, by its name in the model.

    Raises:
        TrainingError: Where PEFT's format would lose one.
    """
    # PEFT's own function decides; our tensors are recognised again by identity.
    stand_ins = {name: torch.empty(0) for name in state}
    name_of = {id(tensor): name for name, tensor in stand_ins.items()}
    kept = get_peft_model_state_dict(peft, state_dict=stand_ins, save_embedding_layers=False)
    names = {name_of[id(tensor)]: saved for saved, tensor in kept.items() if id(tensor) in name_of}
    lost = [name for name in state if name not in names]
    if lost:
        raise TrainingError(
            f"{lost[0]} is trained, but PEFT would not save it",
            where="method",
            remedy="please report this",
        )
    return names


def load_adapter(
    folder: Path, peft: PeftModel, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, by their names in the model.

    Raises:
        RunDirError: Where the file is broken, or holds other tensors than the model trains.
    """
    file = folder / ADAPTER_FILE
    names = saved_names(peft, parameters)
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunDirError(f"cannot be read: {error}", where=str(file)) from error
    different = found.keys() ^ set(names.values())
    if different:
        raise RunDirError(
            f"{sorted(different)[0]} stands in the file or in the model, but not in both",
            where=str(file),
            remedy="use the adapter with the recipe it was trained with",
        )
    for name, saved in names.items():
        if found[saved].shape != parameters[name].shape:
            raise RunDirError(
                f"{saved} has shape {list(found[saved].shape)}, "
                f"but the model trains {list(parameters[name].shape)}",
                where=str(file),
                remedy="use the adapter with the recipe it was trained with",
            )
    return {name: found[saved] for name, saved in names.items()}


def save_adapter(folder: Path, peft: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Write an adapter folder in one step: a reader finds the old one or the whole new one.

    Args:
        folder: Where; replaced if it exists.
        peft: The model the tensors belong to, for its configuration and names.
        state: Every trained tensor, whole, by its name in `peft`.

    Raises:
        TrainingError: Where the disk is full, or PEFT's format would lose a trained tensor.
    """
    names = saved_names(peft, state)
    config = peft.peft_config[peft.active_adapter]
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, set):
        # A set is written in an order that changes from process to process.
        setattr(config, "target_modules", sorted(targets))  # noqa: B010 - not every method has it
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        tensors = {saved: state[name].contiguous() for name, saved in names.items()}
        save_file(tensors, partial / ADAPTER_FILE, metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        for file in partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        old = partial.with_name(f"{partial.name}-old")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the latter is safetensors' word for a full disk
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise TrainingError(
            f"the adapter cannot be written: {getattr(error, 'strerror', None) or error}",
            where=str(folder),
            remedy="free space; earlier copies are under checkpoints/",
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_newest(checkpoints: Path, count: int) -> None:
    """Remove all but the newest `count` copies."""
    for old in sorted(checkpoints.glob("step-*"))[:-count]:
        shutil.rmtree(old, ignore_errors=True)
