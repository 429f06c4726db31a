"""How a run directory and its files are made: privately, atomically, once.

Knows no schedule and no process group. Whoever writes (rank 0, the launcher) decides when.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Self

from peft_dist.common.atomic import FolderTaken, remove_unfinished, replace_file, whole_folder
from peft_dist.common.errors import EXIT_DO_NOT_RETRY, PeftDistError, RunDirError
from peft_dist.common.folders import find_fault, readable_name
from peft_dist.common.sharing import folder_mode
from peft_dist.config import Recipe, load_recipe, render_recipe
from peft_dist.config.resume_rules import differences, learning_settings, refuse_changes
from peft_dist.config.run_date import date_in, with_date
from peft_dist.run.paths import RunPaths
from peft_dist.run.provenance import run_facts


def write_text_atomic(path: Path, text: str) -> None:
    """Write a private file that is either the old one or the whole new one, even after a crash.

    Raises:
        RunDirError: Where the disk is full or the folder cannot be written.
    """
    try:
        replace_file(path, text)
    except OSError as error:
        raise _cannot_write(path, error) from error


class RecordedFailure(NamedTuple):
    """Why starting a run again cannot help."""

    exit_code: int
    error: str
    time: str
    """When that was found, in ISO 8601."""


class RunDir(RunPaths):
    """One run's folder."""

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, *, command: Sequence[str] = ()) -> Self:
        """Make a run directory with its resolved recipe and run facts, all at once or not at all.

        Args:
            path: Where; missing parent folders are made. A folder that exists must be empty.
            recipe: What `recipe.yaml` will say; without a date, with today's.
            command: The command line to record.

        Raises:
            RunDirError: Where the folder is taken or cannot be written; then nothing is left.
        """
        run = cls(Path(path).absolute())
        run.require_writable()
        try:
            # A new folder cannot be renamed over a link to an empty one, but over that itself.
            with whole_folder(run._behind_link()) as making:
                cls(making).logs.mkdir(mode=folder_mode())
                write_text_atomic(cls(making).recipe, render_recipe(with_date(recipe)))
                write_text_atomic(
                    cls(making).run_facts, json.dumps(run_facts(command), indent=2) + "\n"
                )
        except FolderTaken as error:  # were it made just now
            names = {entry.name for entry in run.path.iterdir()}
            held = "another run" if run.run_facts.is_file() else f"{min(names)!r} already"
            raise _taken(run.path, held) from error
        except OSError as error:
            raise _cannot_write(run.path, error) from error
        return run

    @classmethod
    def claim(
        cls,
        path: str | Path,
        recipe: Recipe,
        *,
        command: Sequence[str] = (),
        fresh: bool = False,
        allow_changed: Collection[str] = (),
    ) -> Self:
        """Return the run in a folder to go on with, or a new one where there is none.

        Args:
            path: Where.
            recipe: What to train. It replaces the run's own recipe, which may differ in what does
                not change what is learned; where there are checkpoints, by `accept_recipe`. Without
                a date, it gets the run's.
            command: The command line to record in a new run.
            fresh: Set a run that is there aside, and make a new one.
            allow_changed: Fields that may differ all the same.

        Raises:
            RunDirError: Where the run has finished, learns by other settings or cannot be written.
        """
        run = cls(Path(path).absolute())
        run.require_writable()
        try:
            there = run.run_facts.is_file()
        except OSError as error:
            raise _cannot_write(run.path, error) from error
        if there and fresh:
            run._set_aside()
            there = False
        if not there:
            return cls.create(path, recipe, command=command)
        if run.is_finished:
            raise RunDirError(
                "holds a run that has finished",
                where=str(run.path),
                remedy="choose another folder with --run-dir, or start it anew with --fresh",
            )
        cls.open(path)  # raises where its recipe is gone
        recipe = with_date(recipe, date_in(run.recipe))
        text = render_recipe(recipe)
        is_changed = text != run.recipe.read_text(encoding="utf-8")
        if is_changed and run.has_checkpoints:
            old = learning_settings(load_recipe(run.recipe, check_paths=False))
            refuse_changes(
                differences(old, learning_settings(recipe)), allow_changed, where=str(run.path)
            )
            write_text_atomic(run.next_recipe, text)
            return run
        if is_changed:
            write_text_atomic(run.recipe, text)
        run.drop_next_recipe()
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Return the run in a folder.

        Raises:
            RunDirError: Where the folder holds no run.
        """
        run = cls(Path(path).absolute())
        try:
            missing = [file.name for file in (run.recipe, run.run_facts) if not file.is_file()]
        except (OSError, ValueError) as error:
            raise RunDirError(
                f"cannot be read: {error}", where=str(path), remedy="name a run directory"
            ) from error
        if missing:
            problem = "holds no run" if run.path.is_dir() else "is no folder"
            raise RunDirError(
                f"{problem} ({' and '.join(missing)} missing)",
                where=str(path),
                remedy="name a folder that `peft-dist train` made",
            )
        return run

    @classmethod
    def enclosing(cls, recipe_path: str | Path) -> Self | None:
        """Return the run directory whose own recipe this is, or None for any other recipe."""
        path = Path(recipe_path).absolute()
        run = cls(path.parent)
        return run if path.name == run.recipe.name and run.run_facts.is_file() else None

    def require_writable(self) -> None:
        """Refuse a folder that the run's files cannot be written to, whether it is there or not.

        Raises:
            RunDirError: Naming the reason.
        """
        fault = find_fault(self.path)
        if fault is not None:
            raise RunDirError(
                fault,
                where=readable_name(self.path),
                remedy="choose another folder with --run-dir",
            )

    def accept_recipe(self, *, start_from: str | None = None) -> None:
        """Let the recipe that this start goes on by be the run's own.

        Args:
            start_from: The hub id of its `method.start_from` with a commit, if it has one.
        """
        with suppress(FileNotFoundError):
            self.next_recipe.replace(self.recipe)
        if start_from is None:
            return
        recipe = load_recipe(self.recipe, check_paths=False)
        if recipe.method.start_from != start_from:
            method = recipe.method.model_copy(update={"start_from": start_from})
            text = render_recipe(recipe.model_copy(update={"method": method}))
            write_text_atomic(self.recipe, text)

    def drop_next_recipe(self) -> None:
        """Forget a recipe that the run does not go on by."""
        self.next_recipe.unlink(missing_ok=True)

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, whole or not; 0 where there is none."""
        steps = [int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")]
        return max(steps, default=0)

    def read_failure(self) -> RecordedFailure | None:
        """Return why starting the run again cannot help, if that is so."""
        try:
            facts = json.loads(self.failure.read_text(encoding="utf-8"))
            return RecordedFailure(int(facts["exit_code"]), str(facts["error"]), str(facts["time"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            return RecordedFailure(EXIT_DO_NOT_RETRY, f"{self.failure} cannot be read: {error}", "")

    def record_failure(self, error: PeftDistError, *, by: str = "") -> None:
        """Note what must change (and who says so) before the run can go on; the first stays."""
        if not self.failure.exists():
            now = datetime.now(UTC).isoformat()
            facts = {"exit_code": error.exit_code, "error": f"{by}{error}", "time": now}
            write_text_atomic(self.failure, json.dumps(facts) + "\n")

    def remove_leftovers(self) -> None:
        """Remove what attempts that were killed had begun to write, and their machines' samples.

        For the run's holder alone; `checkpoints/` and `attempts/` are not looked at.
        """
        files = (self.recipe, self.next_recipe, self.result, self.failure)
        names = [".adapter.", *(f".{file.name}." for file in files)]
        begun = [path for path in self.path.iterdir() if path.name.startswith(tuple(names))]
        for path in begun:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    path.unlink()
        remove_unfinished(self._behind_link())  # whoever still makes this run comes too late
        shutil.rmtree(self.system, ignore_errors=True)

    def _behind_link(self) -> Path:
        """Return the folder that the run's path stands for, where it is a link."""
        return self.path.resolve() if self.path.is_symlink() else self.path

    def _set_aside(self) -> None:
        """Rename the whole run, so that nothing of it is lost."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        try:
            self.path.rename(aside)
        except OSError as error:
            raise _cannot_write(aside, error) from error


def _taken(path: Path, held: str) -> RunDirError:
    return RunDirError(
        f"holds {held}", where=str(path), remedy="choose another folder with --run-dir"
    )


def _cannot_write(path: Path, error: OSError) -> RunDirError:
    return RunDirError(
        f"cannot be written: {error.strerror}",
        where=str(path),
        remedy="free space or choose another folder with --run-dir",
    )
