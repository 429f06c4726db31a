"""Copy a model to this node's own disk, once for all its processes and for later jobs.

A copy is used only when it is whole: it gets its name last, and with it a manifest of what every
file must be. Whatever goes wrong, training can read the model where it lies.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from peft_dist.common.atomic import remove_unfinished, whole_folder
from peft_dist.common.console import say
from peft_dist.common.errors import EXIT_DONE
from peft_dist.common.locks import lock_file
from peft_dist.common.paths import MODEL_FILES
from peft_dist.common.sharing import set_run_umask

MANIFEST = "peft_dist_staged.json"
"""In a copy: the size and sha256 of each of its files."""
LOCK_WAIT_S = 3600.0
"""How long to wait for another process that copies the same model."""
UNUSED_S = 14 * 24 * 3600.0
"""A copy that no job began with for so long is removed; no job lasts as long."""
LOOK_EVERY_S = 0.2
"""Seconds between two looks at its lock."""
SPARE_BYTES = 1 << 28
"""What must stay free beside a copy, for everybody else on the node."""
CHUNK_BYTES = 1 << 23


class CannotStage(Exception):
    """Why a model is read where it lies instead."""


@dataclass(frozen=True)
class StagedModel:
    """A model folder as it is now."""

    folder: Path
    files: dict[str, os.stat_result]
    """What training reads of it, by name."""

    @classmethod
    def of(cls, folder: Path) -> "StagedModel":
        """Look at a folder.

        Raises:
            CannotStage: For one that holds no model.
            OSError: For one that cannot be read.
        """
        found = (path for pattern in MODEL_FILES for path in folder.glob(pattern))
        names = {path.name for path in found if path.is_file()}
        index = folder / "model.safetensors.index.json"
        weights = (
            set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if index.is_file()
            else {"model.safetensors"}
        )
        # Folders may hold the weights in another form beside the one that is read.
        kept = {name for name in names if not name.endswith(".safetensors")} | weights
        if not all((folder / name).is_file() for name in weights):
            raise CannotStage(f"{folder} holds no whole model")
        if any(Path(name).name != name for name in kept):
            raise CannotStage(f"{folder} keeps weights in other folders")
        return cls(folder, {name: (folder / name).stat() for name in sorted(kept)})

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(stat.st_size for stat in self.files.values())

    @property
    def digest(self) -> str:
        """What tells it from itself after any file was changed."""
        facts = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in self.files.items()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the folder on this node that holds a model; the model's own where there is no copy."""
    parser = argparse.ArgumentParser(prog="peft_dist.slurm.stage_model", description=main.__doc__)
    parser.add_argument("source", help="the model's folder")
    parser.add_argument("folder", help="where copies are kept, on the node's own disk")
    parser.add_argument("--verify", action="store_true", help="hash a copy that is there already")
    parser.add_argument("--json", action="store_true", help="print the value of PEFT_DIST_STAGED")
    options = parser.parse_args(argv)
    set_run_umask()
    try:
        folder = own_folder(expand(options.folder))
        path = str(stage(Path(options.source), folder, verify=options.verify))
        remove_unused(folder, keep=Path(path))
    except (CannotStage, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        say(f"peft-dist: warning: the model is not copied to this node: {reason}", sys.stderr)
        path = options.source
    # What a script reads, as it is.
    print(json.dumps({options.source: path}) if options.json else path)  # noqa: T201
    return EXIT_DONE


def stage(source: Path, folder: Path, *, verify: bool = False) -> Path:
    """Return a whole copy of a model, which is made where there is none.

    Args:
        source: The model's folder.
        folder: Where copies are kept.
        verify: Whether to hash a copy that is there, instead of comparing sizes.

    Raises:
        CannotStage, OSError: Where there can be no copy; nothing is left of it then.
    """
    model = StagedModel.of(source)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy = folder.absolute() / f"{source.absolute().name[:100]}-{model.digest}"
    with ExitStack() as stack:
        lock = folder / f".{copy.name}.lock"
        if not stack.enter_context(lock_file(lock, wait_s=LOCK_WAIT_S)):
            raise CannotStage(f"another process holds {lock}")
        if copy.is_symlink() or (copy.exists() and copy.stat().st_uid != os.getuid()):
            raise CannotStage(f"{copy} is somebody else's")
        problem = find_damage(copy, model.files, verify=verify)
        if problem is None:
            os.utime(lock)
            return copy
        if copy.exists():
            say(f"peft-dist: warning: {copy} is made again: {problem}", sys.stderr)
        remove_unfinished(copy)
        _make(model, copy)
    return copy


def expand(folder: str) -> Path:
    """Return a folder of this node, with the variables that a cluster file may name.

    Raises:
        CannotStage: Where the node has no such variable.
    """
    user = os.environ.get("USER") or str(os.getuid())

    def value(found: re.Match[str]) -> str:
        name = found[1]
        text = user if name == "USER" else os.environ.get(name, "")
        if not text:
            raise CannotStage(f"${name} is not set on this node")
        return text

    return Path(re.sub(r"\$(SLURM_TMPDIR|TMPDIR|LOCAL_SCRATCH|USER)(?=/|$)", value, folder))


def own_folder(folder: Path) -> Path:
    """Return this user's part of a folder that all users of a node may name."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another user was first
            folder.mkdir()
            folder.chmod(0o1777)  # as /tmp: all may add, and nobody removes what is another's
    return folder / str(os.getuid())


def remove_unused(folder: Path, *, keep: Path) -> None:
    """Remove this user's copies that no job has used for a while.

    Args:
        folder: Where they are.
        keep: The one that is about to be used.
    """
    for lock in folder.glob(".*.lock"):
        copy = folder / lock.name.removeprefix(".").removesuffix(".lock")
        with suppress(OSError), ExitStack() as stack:
            if copy == keep or time.time() - lock.stat().st_mtime < UNUSED_S:
                continue
            if stack.enter_context(lock_file(lock, wait_s=0.0)):
                remove_unfinished(copy)
                if copy.is_dir() and not copy.is_symlink():
                    shutil.rmtree(copy)
                lock.unlink()


def find_damage(copy: Path, names: Iterable[str], *, verify: bool) -> str | None:
    """Return what is wrong with a copy, or None.

    Args:
        copy: Its folder.
        names: The files that it must have.
        verify: Whether to read and hash all of them.
    """
    try:
        files = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))["files"]
        if sorted(files) != sorted(names):
            return "its manifest names other files"
        for name, facts in files.items():
            if (copy / name).stat().st_size != facts["bytes"]:
                return f"{name} has another size"
            if verify and _sha256(copy / name) != facts["sha256"]:
                return f"{name} has other bytes"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def _make(model: StagedModel, copy: Path) -> None:
    """Copy a model, all of it or nothing."""
    free = shutil.disk_usage(copy.parent).free
    if free < model.size + SPARE_BYTES:
        raise CannotStage(
            f"{free / 1e9:.3g} GB free in {copy.parent}, {model.size / 1e9:.3g} GB needed"
        )
    started = time.monotonic()
    with whole_folder(copy, replace=True) as partial:
        files = {
            name: {"bytes": stat.st_size, "sha256": _copy(model.folder / name, partial / name)}
            for name, stat in model.files.items()
        }
        for name, facts in files.items():
            if _sha256(partial / name) != facts["sha256"]:
                raise CannotStage(f"{copy.parent} gives back other bytes of {name} than it took")
        if StagedModel.of(model.folder).digest != model.digest:
            raise CannotStage(f"{model.folder} was changed meanwhile")
        manifest = {"source": str(model.folder.absolute()), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    seconds = time.monotonic() - started
    say(f"peft-dist: {model.size / 1e9:.3g} GB copied to {copy} in {seconds:.1f} s", sys.stderr)


def _copy(source: Path, target: Path) -> str:
    """Copy a file to a disk, past its cache; return the sha256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
        # So that the check reads what the disk holds.
        os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
