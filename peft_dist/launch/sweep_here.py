"""Train the runs of an array on this machine, one after the other."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_dist.common.errors import EXIT_DONE, EXIT_INTERRUPTED, RunDirError
from peft_dist.common.logs import NOTICE
from peft_dist.common.sharing import folder_mode
from peft_dist.config import Recipe, load_recipe
from peft_dist.launch.run_here import LocalLaunch, train_here
from peft_dist.run.directory import RunDir
from peft_dist.run.sweep import Element, grid, refuse_another_array, write_array

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalSweep:
    """An array that is ready to be trained here."""

    folder: Path
    elements: Sequence[Element]
    starts: Sequence[LocalLaunch]
    """One for each element."""


def prepare_sweep(
    recipe: Path,
    overrides: Sequence[str],
    specifications: Sequence[str],
    folder: Path,
    *,
    prepare: Callable[[Recipe, Path], LocalLaunch],
) -> LocalSweep:
    """Check every run of an array; make and start nothing.

    Args:
        recipe: The recipe that they share.
        overrides: Settings that they share.
        specifications: What sets them apart, as `grid` reads it.
        folder: What will hold a folder for each of them.
        prepare: Works out what starts one of them, from its recipe and its folder.

    Raises:
        PeftDistError: For settings that make no recipe, and a folder that holds something else.
    """
    folder = folder.absolute()
    elements: list[Element] = []
    starts = []
    for number, settings in enumerate(grid(specifications)):
        name = f"{number:03}"
        elements.append({"run_dir": name, "settings": list(settings)})
        starts.append(prepare(load_recipe(recipe, [*overrides, *settings]), folder / name))
    RunDir(folder).require_writable()
    refuse_another_array(folder, elements)
    return LocalSweep(folder, elements, starts)


def train_sweep(sweep: LocalSweep, *, fresh: bool = False) -> int:
    """Train every run that has not finished; return the first exit code that is not 0.

    A run that fails is left behind, as in an array of a cluster; a stop ends them all.
    """
    try:
        sweep.folder.mkdir(mode=folder_mode(), parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"cannot be made: {error.strerror}",
            where=str(sweep.folder),
            remedy="choose another folder with --run-dir",
        ) from error
    write_array(sweep.folder, sweep.elements, limit=1)
    codes = []
    for number, (element, start) in enumerate(zip(sweep.elements, sweep.starts, strict=True), 1):
        settings = " ".join(element["settings"])
        log.log(NOTICE, "run %d of %d: %s", number, len(sweep.elements), settings)
        codes.append(train_here(start, fresh=fresh))
        if codes[-1] == EXIT_INTERRUPTED:
            log.log(NOTICE, "the same command goes on with run %d", number)
            break
    return next((code for code in codes if code != EXIT_DONE), EXIT_DONE)
