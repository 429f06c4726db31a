"""The records of a run's attempts: one small JSON file each, the highest number the newest."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from peft_dist.common.atomic import replace_file

Record = dict[str, Any]
"""What one attempt says of itself; of a file that cannot be read only `attempt` is known."""


def latest(folder: Path) -> Record | None:
    """Return the record of the newest attempt, the holder if there is one.

    Raises:
        OSError: Where the folder is there and cannot be read.
    """
    numbers = _numbers(folder)
    return _read(folder, numbers[-1]) if numbers else None


def records(folder: Path) -> list[Record]:
    """Return the records of all attempts, the oldest first.

    Raises:
        OSError: Where the folder is there and cannot be read.
    """
    return [_read(folder, number) for number in _numbers(folder)]


def record_path(folder: Path, number: int) -> Path:
    """Return the file of an attempt."""
    return folder / f"{number:08d}.json"


def write_json(path: Path, value: object, *, durable: bool = False) -> None:
    """Replace a private file of JSON as a whole; see `replace_file`."""
    replace_file(path, json.dumps(value) + "\n", durable=durable)


def describe(record: Record) -> str:
    """Return which attempt a record is of, and which process made it, in a few words."""
    name = f"attempt {record['attempt']}"
    if "pid" not in record:
        return name
    job = f" (Slurm job {record['slurm_job_id']})" if record.get("slurm_job_id") else ""
    return f"{name}, process {record['pid']} on host {record['host']}{job}"


def remove_leftovers(folder: Path, *, before: int) -> None:
    """Remove what killed attempts were writing; the files of contenders bear our number."""
    for path in folder.glob(".*.json.*"):
        number = path.name[1:9]
        if number.isdecimal() and int(number) < before:
            with suppress(OSError):
                path.unlink()


def _numbers(folder: Path) -> list[int]:
    try:
        names = [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{8,}\.json", name))


def _read(folder: Path, number: int) -> Record:
    with suppress(OSError, ValueError):
        record = json.loads(record_path(folder, number).read_text(encoding="utf-8"))
        if isinstance(record, dict) and record.get("attempt") == number:
            return record
    return {"attempt": number}
