"""Every path in a run directory, and how its files are made: privately, atomically, once.

Knows no schedule and no process group. Whoever writes (rank 0, the launcher) decides when.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from peft_dist.config import Recipe, render_recipe
from peft_dist.errors import ERROR_PREFIX, PeftDistError, RunDirError

RECORDED_PACKAGES = (
    "peft-dist",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
    "datasets",
    "deepspeed",
    "wandb",
    "numpy",
)
"""Packages whose versions change what a run computes or writes."""


def write_text_atomic(path: Path, text: str) -> None:
    """Write a private file that is either the old one or the whole new one, even after a crash.

    Raises:
        RunDirError: Where the disk is full or the folder cannot be written.
    """
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                Path(temporary).unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def error_in_log(log: Path) -> str | None:
    """Return the first fault that workers told in their log, without its prefix."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    told = (line for line in lines if line.startswith(ERROR_PREFIX))
    line = next(told, None)
    return None if line is None else line.removeprefix(ERROR_PREFIX)


@dataclass(frozen=True)
class RunDir:
    """One run's folder."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe: every default written out, local paths absolute."""
        return self.path / "recipe.yaml"

    @property
    def run_facts(self) -> Path:
        """When, with which versions and by which command the run was made; written last."""
        return self.path / "run.json"

    @property
    def ledger(self) -> Path:
        """One JSON line per optimizer step."""
        return self.path / "ledger.jsonl"

    @property
    def result(self) -> Path:
        """The summary of a finished run."""
        return self.path / "result.json"

    @property
    def adapter(self) -> Path:
        """The final adapter in PEFT format."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        """Copies of the adapter kept during training."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """What the processes said."""
        return self.path / "logs"

    @property
    def launcher_log(self) -> Path:
        """Standard error of the launcher and of all its processes."""
        return self.logs / "launcher.log"

    @property
    def evaluation(self) -> Path:
        """The last scoring of the finished adapter."""
        return self.path / "evaluation.json"

    @property
    def evaluation_log(self) -> Path:
        """Standard error of the last scoring's processes."""
        return self.logs / "evaluation.log"

    @property
    def has_started(self) -> bool:
        """Say whether the run has trained a step, or ended."""
        return self.result.exists() or (self.ledger.exists() and self.ledger.stat().st_size > 0)

    @property
    def failure(self) -> Path:
        """The one-line error of a run that a user's fault stopped."""
        return self.path / "failure.json"

    def checkpoint(self, step: int) -> Path:
        """Return the folder of the copy made after a step."""
        return self.checkpoints / f"step-{step:08d}"

    @classmethod
    def create(cls, path: str | Path, recipe: Recipe, *, command: Sequence[str] = ()) -> Self:
        """Make a run directory with its resolved recipe and run facts.

        A folder that exists must be empty, or hold a run that failed before its first step.

        Args:
            path: Where; missing parent folders are made.
            recipe: What `recipe.yaml` will say.
            command: The command line to record.

        Raises:
            RunDirError: Where the folder is taken or cannot be written; then nothing is left.
        """
        run = cls(Path(path).absolute())
        fresh = run._make_room()
        try:
            # mkdir is exclusive on every file system: of two launches at once one gets the folder.
            run.logs.mkdir(mode=0o700)
        except FileExistsError as error:
            raise _taken(run.path, "another run") from error
        except OSError as error:
            run._abandon(fresh=fresh)
            raise _cannot_write(run.logs, error) from error
        try:
            write_text_atomic(run.recipe, render_recipe(recipe))
            write_text_atomic(run.run_facts, json.dumps(_facts(command), indent=2) + "\n")
        except RunDirError:
            run._abandon(fresh=fresh)
            raise
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

    def record_failure(self, error: PeftDistError) -> None:
        """Note that a user's fault ended the run; the first note stays."""
        if not self.failure.exists():
            facts = {"exit_code": error.exit_code, "error": str(error)}
            write_text_atomic(self.failure, json.dumps(facts) + "\n")

    def _make_room(self) -> bool:
        """Make the folder or see that it may be used; return whether it is new."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise _cannot_write(self.path.parent, error) from error
        try:
            self.path.mkdir(mode=0o700)
            return True
        except FileExistsError:
            pass
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if not self.path.is_dir():
            raise RunDirError(
                "is a file", where=str(self.path), remedy="choose another folder with --run-dir"
            )
        try:
            names = {entry.name for entry in self.path.iterdir()}
            if self._failed_before_first_step(names):
                self._clear()
                names = set()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if names:
            held = "another run" if self.run_facts.is_file() else f"{min(names)!r} already"
            raise _taken(self.path, held)
        return False

    def _failed_before_first_step(self, names: set[str]) -> bool:
        ours = {self.recipe, self.run_facts, self.ledger, self.logs, self.failure}
        if not {self.run_facts.name, self.failure.name} <= names <= {path.name for path in ours}:
            return False
        return not self.ledger.exists() or self.ledger.stat().st_size == 0

    def _clear(self) -> None:
        if self.logs.is_dir() and not self.logs.is_symlink():
            shutil.rmtree(self.logs)
        for path in (self.recipe, self.ledger, self.failure, self.run_facts):
            path.unlink(missing_ok=True)

    def _abandon(self, *, fresh: bool) -> None:
        """Take back what `create` made, so that a full disk leaves no half run."""
        with suppress(OSError):
            self._clear()
            if fresh:
                self.path.rmdir()


def _facts(command: Sequence[str]) -> dict[str, Any]:
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "python": sys.version.split()[0],
        "versions": _versions(),
        "git": _git_state(Path.cwd()),
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return revision and cleanliness of the checkout a run was started from, or None."""
    git = shutil.which("git")
    if git is None:
        return None
    outputs = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(
                [git, "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
        outputs.append(done.stdout.strip())
    return {"revision": outputs[0], "modified": bool(outputs[1])}


def _taken(path: Path, held: str) -> RunDirError:
    return RunDirError(
        f"holds {held}", where=str(path), remedy="choose another folder with --run-dir"
    )


def _cannot_write(path: Path, error: OSError | ValueError) -> RunDirError:
    reason = error.strerror if isinstance(error, OSError) else error
    return RunDirError(
        f"cannot be written: {reason}",
        where=str(path),
        remedy="free space or choose another folder with --run-dir",
    )
