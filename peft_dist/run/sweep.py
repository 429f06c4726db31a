"""Arrays: many runs of one recipe, each in a folder of its own, submitted as one job.

Makes the list of runs and reads it back; knows nothing of Slurm.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_dist.common.errors import RecipeError, RunDirError
from peft_dist.config.load import read_mapping
from peft_dist.run.directory import RunDir, write_text_atomic
from peft_dist.run.paths import ARRAY_FILE

MAX_ELEMENTS = 1000
"""Elements of an array, which are numbered with three digits; Slurm's own MaxArraySize is 1001."""

Element = dict[str, Any]
"""`run_dir`, the name of a run's folder, and `settings`, what sets it apart."""


def grid(specifications: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the settings of each run: every combination, the last key changing fastest.

    Args:
        specifications: `key=v1,v2,...`, or a YAML file that maps keys to lists of values.

    Raises:
        RecipeError: For one that is neither, a key that comes twice, or too many runs.
    """
    axes: dict[str, list[str]] = {}
    for specification in specifications:
        key, equals, text = specification.partition("=")
        found = {key: _values(text)} if equals else _grid_file(specification)
        for name, values in found.items():
            if name in axes or len(set(values)) < len(values):
                raise RecipeError(
                    f"{specification!r} gives {name!r}, or one of its values, twice",
                    where="--array",
                    remedy="write it like train.seed=1,2,3",
                )
            axes[name] = values
    runs = [
        tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]
    if len(runs) > MAX_ELEMENTS:
        raise RecipeError(
            f"makes {len(runs)} runs", where="--array", remedy=f"at most {MAX_ELEMENTS} at once"
        )
    return runs


def array_elements(folder: Path) -> list[Element]:
    """Return the elements of an array; none for a run.

    Raises:
        RunDirError: Where the list cannot be read.
    """
    return list(_read(folder)["elements"])


def array_limit(folder: Path) -> int | None:
    """Return how many elements of an array run at once; None for all.

    Raises:
        RunDirError: As `array_elements`.
    """
    limit: int | None = _read(folder)["limit"]
    return limit


def refuse_another_array(folder: Path, elements: Sequence[Element]) -> None:
    """Refuse a folder that holds a run, or an array of other elements.

    Raises:
        RunDirError: As `array_elements` too.
    """
    held = "a run" if RunDir(folder).run_facts.exists() else "another array"
    if held == "a run" or array_elements(folder) not in ([], list(elements)):
        raise RunDirError(
            f"holds {held}", where=str(folder), remedy="choose another folder with --run-dir"
        )


def write_array(folder: Path, elements: Sequence[Element], limit: int | None) -> None:
    """Write an array's list of runs.

    Raises:
        RunDirError: Where it cannot be written.
    """
    text = json.dumps({"elements": list(elements), "limit": limit}, indent=2) + "\n"
    write_text_atomic(folder / ARRAY_FILE, text)


def _read(folder: Path) -> dict[str, Any]:
    file = folder / ARRAY_FILE
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        for element in read["elements"]:
            if Path(element["run_dir"]).name != element["run_dir"]:
                raise ValueError(f"{element['run_dir']!r} is no folder in it")
            if not all(isinstance(setting, str) for setting in element["settings"]):
                raise ValueError("settings must be texts")
        limit = read.get("limit")
        return {"elements": read["elements"], "limit": None if limit is None else int(limit)}
    except FileNotFoundError:
        return {"elements": [], "limit": None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(
            f"is no list of an array's runs: {error}", where=str(file), remedy="submit it anew"
        ) from error


def _values(text: str) -> list[str]:
    values = text.split(",")
    if not all(values) or re.search(r"[][{}\"']", text):
        raise RecipeError(
            f"cannot tell the values of {text!r} apart",
            where="--array",
            remedy="write train.seed=1,2,3, or a YAML file of lists for any other value",
        )
    return values


def _grid_file(path: str) -> dict[str, list[str]]:
    if not Path(path).is_file():
        raise RecipeError(
            f"{path!r} is neither key=v1,v2,... nor a file",
            where="--array",
            remedy="write it like train.seed=1,2,3",
        )
    remedy = "write train.seed: [1, 2, 3]"
    raw = read_mapping(path, remedy=remedy)
    if not all(isinstance(values, list) and values for values in raw.values()):
        raise RecipeError("is no mapping of keys to lists", where=path, remedy=remedy)
    return {key: [json.dumps(value) for value in values] for key, values in raw.items()}
