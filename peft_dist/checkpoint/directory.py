"""What a `checkpoints/` folder holds: which one is good, how one gets in, and which ones go.

Every change is a rename of a whole folder, so a process killed anywhere leaves only whole ones
under a step's name. Names beginning with a dot are half made or half removed; `clean` sees to them.
"""

import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from peft_dist.common.atomic import sync_folder
from peft_dist.common.manifest import BadCheckpoint, step_name, verify
from peft_dist.common.sharing import folder_mode

STEP_NAME = re.compile(r"step-([0-9]{8,})")
LEFTOVER_NAME = re.compile(
    r"\.(?P<step>step-[0-9]{8,})-(a[0-9]{8,}-[a-z0-9_]+|gone-[0-9a-f]+|(?P<old>old))"
)


def step_of(folder: Path) -> int:
    """Return the step whose checkpoint a folder is, by its name."""
    match = STEP_NAME.fullmatch(folder.name)
    assert match, folder
    return int(match[1])


def folders(checkpoints: Path) -> list[Path]:
    """Return what stands under a step's name, good or bad, oldest step first.

    Raises:
        OSError: Where the folder is there but cannot be read.
    """
    try:
        found = [path for path in checkpoints.iterdir() if STEP_NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda folder: (step_of(folder), folder.name))


def newest_good(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the checkpoint to go on from.

    Returns:
        The newest one that verifies, or None; and the newer ones that do not, each with why.

    Raises:
        OSError: Where the folder is there but cannot be read.
    """
    bad: list[tuple[Path, str]] = []
    for folder in reversed(folders(checkpoints)):
        try:
            verify(folder)
        except BadCheckpoint as error:
            bad.append((folder, str(error)))
        else:
            return folder, bad
    return None, bad


def set_aside(folder: Path) -> Path:
    """Rename a bad checkpoint, for a person to look at; return its new path.

    Raises:
        OSError: Where it cannot be renamed.
    """
    aside = folder.with_name(f"bad-{folder.name}")
    number = 1
    while os.path.lexists(aside):
        number += 1
        aside = folder.with_name(f"bad-{folder.name}-{number}")
    folder.rename(aside)
    sync_folder(folder.parent)
    return aside


def set_bad_aside(published: Path, whole: set[Path]) -> list[tuple[Path, str, Path]]:
    """Rename what must not count among the newest checkpoints: what is damaged, or not of this run.

    Else one such folder would count in the place of a good one, which `prune` then removes.

    Args:
        published: The checkpoint that was just published; none of this run is newer.
        whole: Checkpoints that are known to verify; others that do are added.

    Returns:
        Each folder that was renamed, why, and its new path.

    Raises:
        OSError: Where one cannot be renamed.
    """
    whole.add(published)
    found = []
    for folder in folders(published.parent):
        why = ""
        if step_of(folder) > step_of(published):
            why = "it is newer than what the run has come to"
        elif folder not in whole:
            try:
                verify(folder)
                whole.add(folder)
            except BadCheckpoint as error:
                why = str(error)
        if why:
            found.append((folder, why, set_aside(folder)))
    return found


def work_folder(checkpoints: Path, step: int, attempt: int) -> Path:
    """Make a hidden, private folder to write a checkpoint in.

    Raises:
        OSError: Where it cannot be made.
    """
    checkpoints.mkdir(mode=folder_mode(), exist_ok=True)
    prefix = f".{step_name(step)}-a{attempt:08d}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=checkpoints))  # mode 0700


def publish(partial: Path, folder: Path) -> None:
    """Rename a sealed folder to its step's name, in place of one that an older attempt left there.

    Killed between the two renames that this takes, it leaves no folder of that name, but the old
    one whole, and `clean` puts it back.

    Raises:
        OSError: Where that cannot be; all names are as before then.
    """
    old = folder.with_name(f".{folder.name}-old")
    if os.path.lexists(folder) and os.path.lexists(old):
        _discard(old)  # the folder that replaced it is there
    with ExitStack() as undo:
        if os.path.lexists(folder):
            folder.rename(old)
            undo.callback(old.rename, folder)
        partial.rename(folder)
        undo.callback(folder.rename, partial)
        sync_folder(folder.parent)
        undo.pop_all()
    with suppress(OSError):  # the new one stands; `clean` tries again
        if os.path.lexists(old):
            _discard(old)


def clean(checkpoints: Path) -> None:
    """Remove what killed attempts left half made or half removed; finish what they left half done.

    Raises:
        OSError: Where the folder cannot be read, or a name in it not be changed.
    """
    for path in sorted(checkpoints.iterdir()) if checkpoints.exists() else []:
        leftover = LEFTOVER_NAME.fullmatch(path.name)
        if leftover is None:
            continue
        folder = checkpoints / leftover["step"]
        if leftover["old"] and not os.path.lexists(folder):
            path.rename(folder)
            sync_folder(checkpoints)
        else:
            _discard(path)


def prune(
    checkpoints: Path, keep_last: int, keep_best: int, score: Callable[[Path], float | None]
) -> None:
    """Remove the checkpoints that are neither among the newest nor among the best.

    Args:
        checkpoints: Where they are.
        keep_last: How many of the newest stay; the newest one always does.
        keep_best: How many of those with the lowest score stay; of equal ones, the newer.
        score: Gives a checkpoint's score, or None (or NaN) where it has none.

    Raises:
        OSError: Where one cannot be renamed; those not yet removed are whole.
    """
    newest_first = folders(checkpoints)[::-1]
    keep = set(newest_first[: max(keep_last, 1)])
    if keep_best > 0:
        scores = [(score(folder), folder) for folder in newest_first]
        scored = [(s, folder) for s, folder in scores if s is not None and not math.isnan(s)]
        scored.sort(key=lambda pair: pair[0])  # stable, so the newer of two equal ones is first
        keep.update(folder for _, folder in scored[:keep_best])
    for folder in newest_first:
        if folder not in keep:
            _discard(folder)


def _discard(path: Path) -> None:
    """Take a folder's name away first, then its files, as far as they can be removed."""
    leftover = LEFTOVER_NAME.fullmatch(path.name)
    step = leftover["step"] if leftover else path.name
    # A writer that still holds the old name cannot publish what is being removed.
    gone = path.rename(path.with_name(f".{step}-gone-{secrets.token_hex(4)}"))
    sync_folder(gone.parent)
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink()
