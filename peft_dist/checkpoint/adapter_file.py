"""The adapter on disk, in PEFT's format, whole or not there.

Only trained tensors are gathered and written; the base is never touched.
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from peft_dist.common.atomic import folder_beside, put_in_place, sync_tree
from peft_dist.common.errors import RunDirError, TrainingError
from peft_dist.common.paths import ADAPTER_FILES
from peft_dist.methods import Method

_, ADAPTER_FILE = ADAPTER_FILES
CHECKPOINTS = "checkpoints"
"""Beside the adapter of a run."""
_TARGETS = ("target_modules", "target_parameters")
"""What PEFT keeps as sets, and writes as lists."""
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")
"""Names that DDP, torch.compile and checkpointing put into those of parameters."""


def load_adapter(
    folder: Path, method: Method[Any], peft: PeftModel, parameters: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors, by their names in the model.

    Raises:
        RunDirError: Where the file is broken, or holds other tensors than the model trains.
    """
    file = folder / ADAPTER_FILE
    expected = method.saved(peft, {n: p.detach().cpu() for n, p in parameters.items()})
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RunDirError(f"cannot be read: {error}", where=str(file)) from error
    different = found.keys() ^ expected.keys()
    if different:
        raise RunDirError(
            f"{sorted(different)[0]} stands in the file or in the model, but not in both",
            where=str(file),
            remedy="use the adapter with the recipe it was trained with",
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise RunDirError(
                f"{name} has shape {list(found[name].shape)}, "
                f"but the model trains {list(tensor.shape)}",
                where=str(file),
                remedy="use the adapter with the recipe it was trained with",
            )
    return method.restored(peft, found, parameters)


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: PeftConfig) -> None:
    """Write an adapter into a folder that is there, unsynced and unchecked.

    Args:
        folder: Where.
        tensors: What the file holds, by the names PEFT reads.
        config: What stands beside them.

    Raises:
        OSError, SafetensorError: Where the disk is full; the latter is safetensors' word for it.
    """
    for name in _TARGETS:
        targets = getattr(config, name, None)
        if isinstance(targets, set):
            # A set is written in an order that changes from process to process.
            setattr(config, name, sorted(targets))
    whole: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        # A tied one has several names, under each of which PEFT looks for it.
        whole[name] = tensor.clone() if id(tensor) in seen else tensor.contiguous()
        seen.add(id(tensor))
    save_file(whole, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def write_partial(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    beside: Mapping[str, Path | str] | None = None,
) -> Path:
    """Write an adapter into a folder of its own, beside the one it is for; return it.

    Args:
        folder: Where `replace_adapter` will put it.
        tensors: What the file holds, by the names PEFT reads.
        config: What stands beside them.
        beside: Files that are copied beside them, and texts that are written there, by name.

    Raises:
        TrainingError: Where the disk is full.
    """
    partial: Path | None = None
    try:
        partial = folder_beside(folder)
        write_adapter(partial, tensors, config)
        for name, content in (beside or {}).items():
            if isinstance(content, Path):
                shutil.copyfile(content, partial / name)
            else:
                (partial / name).write_text(content, encoding="utf-8")
        sync_tree(partial)
    except (OSError, SafetensorError) as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise _cannot_write(folder, error) from error
    return partial


def rescue(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: PeftConfig, places: Sequence[Path]
) -> Path | None:
    """Write an adapter somewhere else than where there is no room for it.

    Args:
        folder: Where it should have been.
        tensors: What the file holds, by the names PEFT reads.
        config: What stands beside them.
        places: Folders to try, in order.

    Returns:
        The folder that holds it; None where no place takes it.
    """
    for place in places:
        partial: Path | None = None
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{folder.parent.name}-", dir=place))
            write_adapter(partial, tensors, config)
            sync_tree(partial)
            return partial
        except (OSError, SafetensorError):
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
    return None


def replace_adapter(partial: Path, folder: Path) -> None:
    """Put a partial folder in the place of the adapter that stands there.

    Raises:
        TrainingError: Where that cannot be; the old one is back in its place then.
    """
    try:
        put_in_place(partial, folder, replace=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


def check_file(
    folder: Path, expected: Mapping[str, torch.Tensor], moved: Collection[str]
) -> dict[str, torch.Tensor]:
    """Compare an adapter file with what was trained, to the bit; return its tensors.

    Args:
        folder: The adapter.
        expected: What the file must hold, and nothing else.
        moved: The tensors that training has changed.

    Raises:
        TrainingError: Naming the first tensor that is wrong.
    """
    found = load_file(folder / ADAPTER_FILE)
    for name in sorted(found):
        if any(part in WRAPPERS or part.startswith("_fsdp") for part in name.split(".")):
            raise unsafe(f"{name} stands in the file under the name of a wrapped module")
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise unsafe(f"{name} is trained, but not in the file")
        if name not in expected:
            raise unsafe(f"{name} is in the file, but not trained")
        if name in moved and not bool(found[name].any()):
            raise unsafe(f"{name} was changed by training, but is all zeros in the file")
        if not _same(found[name], expected[name]):
            raise unsafe(f"{name} has other values in the file than in the model")
    return found


def check_with_peft(folder: Path, config: PeftConfig, bare: PreTrainedModel) -> None:
    """Let PEFT itself read an adapter, and see that it misses and ignores nothing.

    Args:
        folder: The adapter.
        config: What it was trained with.
        bare: The base on `meta`, without adapters; not to be used again.

    Raises:
        TrainingError: Naming the first tensor, or field of the configuration, that is wrong.
    """
    wanted, written = config_facts(config), config_facts(PeftConfig.from_pretrained(str(folder)))
    for field in sorted(wanted.keys() | written.keys()):
        if wanted.get(field) != written.get(field):
            raise unsafe(
                f"{field} is {written.get(field)!r} in adapter_config.json, "
                f"but {wanted.get(field)!r} in training"
            )
    # PEFT moves what it reads to the device of the base, and `meta` would lose it: one value that
    # is repeated has a shape and no memory either.
    for module in bare.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    found = load_file(folder / ADAPTER_FILE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is checked here
            peft = PeftModel.from_pretrained(
                bare, str(folder), low_cpu_mem_usage=True, torch_device="cpu"
            )
            read = get_peft_model_state_dict(peft, save_embedding_layers=False)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise unsafe(f"PEFT cannot read it ({error})") from error
    for name in sorted(found):
        if name not in read or read[name].is_meta or not _same(read[name], found[name]):
            raise unsafe(f"PEFT does not read {name} from the file")
    # What PEFT has made and not filled is left on `meta`.
    missing = sorted(name for name, tensor in read.items() if tensor.is_meta)
    if missing:
        raise unsafe(f"PEFT reads {missing[0]}, which is not in the file")


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare to the bit: of two equal tensors both may hold NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*raw)


def config_facts(config: PeftConfig) -> dict[str, Any]:
    """Return a configuration as its file holds it, with sets in order."""

    def plain(value: object) -> Any:
        return sorted(value) if isinstance(value, set | frozenset) else str(value)

    facts: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=plain))
    lists = {name: facts[name] for name in _TARGETS if isinstance(facts.get(name), list)}
    return facts | {name: sorted(targets) for name, targets in lists.items()}


def unsafe(problem: str) -> TrainingError:
    """Return the error of an adapter that would not come back as it was trained."""
    return TrainingError(
        f"the adapter was not saved: {problem}",
        remedy="the copy before it is untouched; please report this",
    )


def _cannot_write(folder: Path, error: OSError | SafetensorError) -> TrainingError:
    return TrainingError(
        f"the adapter cannot be written: {getattr(error, 'strerror', None) or error}",
        where=str(folder),
        remedy="free space" + _earlier(folder),
    )


def _earlier(folder: Path) -> str:
    """Return what a run can go on from whose adapter cannot be written; nothing where it cannot."""
    steps = sorted((folder.parent / CHECKPOINTS).glob("step-*"))
    return f"; the newest checkpoint is {steps[-1]}" if steps else ""
