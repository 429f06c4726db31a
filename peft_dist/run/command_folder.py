"""The folder of a command that was submitted as a job: evaluate, quantize or merge.

It holds scripts, logs and notes of jobs as a run directory does, and `result.json` at the end.
"""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from peft_dist.common.errors import RunDirError
from peft_dist.common.sharing import folder_mode
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.run.paths import ARRAY_FILE

COMMAND_FILE = "command.json"


def is_command(folder: Path) -> bool:
    """Whether a folder is that of a command's job."""
    return (folder / COMMAND_FILE).is_file()


def find_folder(name: str | Path) -> Path:
    """Return the folder of a run, an array or a command's job.

    Raises:
        RunDirError: Where it holds none of them.
    """
    path = Path(name).absolute()
    if (path / ARRAY_FILE).is_file() or is_command(path):
        return path
    return RunDir.open(name).path


def check_command_folder(folder: Path, kind: str) -> None:
    """Refuse a folder that cannot be that of a command's job.

    Raises:
        RunDirError: Where it holds something else, or cannot be written.
    """
    RunDir(folder).require_writable()
    own = is_command(folder) and read_command(folder)[:1] == [kind]
    if folder.is_dir() and any(folder.iterdir()) and not own:
        raise RunDirError(
            f"holds something else than a job of {kind}",
            where=str(folder),
            remedy="choose another folder with --job-dir",
        )


def make_command_folder(folder: Path, words: Sequence[str]) -> None:
    """Make the folder, or make an old one ready for another job of the same kind.

    Args:
        folder: Where.
        words: The command, as a person would type it.

    Raises:
        RunDirError: As `check_command_folder`.
    """
    check_command_folder(folder, words[0])
    run = RunDir(folder)
    run.result.unlink(missing_ok=True)
    try:
        for path in (folder, run.logs, folder / "slurm"):
            path.mkdir(mode=folder_mode(), parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"cannot be made: {error.strerror}", where=str(folder), remedy="choose another folder"
        ) from error
    write_text_atomic(folder / COMMAND_FILE, json.dumps({"command": list(words)}) + "\n")


def read_command(folder: Path) -> list[str]:
    """Return a job's command; none where it cannot be read."""
    try:
        words = json.loads((folder / COMMAND_FILE).read_text(encoding="utf-8"))["command"]
        return [str(word) for word in words]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_result(folder: Path, began_s: float) -> None:
    """Note that the command has done its work.

    Args:
        folder: The job's.
        began_s: The unix time at which it began.
    """
    facts = {"command": shlex.join(read_command(folder)), "wall_s": round(time.time() - began_s, 1)}
    write_text_atomic(RunDir(folder).result, json.dumps(facts) + "\n")
