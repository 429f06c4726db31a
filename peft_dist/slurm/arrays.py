"""Arrays: many runs of one recipe, each in a folder of its own, submitted as one job.

Makes the list of runs and reads it back; knows nothing of Slurm.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_dist.config.yaml_text import parse_yaml
from peft_dist.errors import RecipeError, RunDirError
from peft_dist.run_dir import ARRAY_FILE, write_text_atomic

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
        key, equals, values = specification.partition("=")
        found = {key: values.split(",")} if equals else _grid_file(specification)
        for name, texts in found.items():
            if name in axes or not name or not all(texts):
                raise RecipeError(
                    f"{specification!r} gives {name!r} twice or without a value",
                    where="--array",
                    remedy="write it like train.seed=1,2,3",
                )
            axes[name] = texts
    runs = [
        tuple(f"{key}={value}" for key, value in zip(axes, values, strict=True))
        for values in itertools.product(*axes.values())
    ]
    if len(runs) > MAX_ELEMENTS:
        raise RecipeError(
            f"makes {len(runs)} runs", where="--array", remedy=f"at most {MAX_ELEMENTS} at once"
        )
    return runs if axes else []


def array_elements(folder: Path) -> list[Element]:
    """Return the elements of an array; none for a run.

    Raises:
        RunDirError: Where the list cannot be read.
    """
    file = folder / ARRAY_FILE
    try:
        elements = json.loads(file.read_text(encoding="utf-8"))["elements"]
        if not all(isinstance(element["run_dir"], str) for element in elements):
            raise TypeError("run_dir must be a text")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirError(
            f"is no list of an array's runs: {error}", where=str(file), remedy="submit it anew"
        ) from error
    return list(elements)


def make_array(folder: Path, elements: Sequence[Element], limit: int | None) -> None:
    """Make an array's folder with its list of runs, or see that it is there.

    Raises:
        RunDirError: Where another array is, or the folder cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    file = folder / ARRAY_FILE
    if file.exists() and array_elements(folder) != list(elements):
        raise RunDirError(
            "holds another array", where=str(folder), remedy="choose another folder with --run-dir"
        )
    text = json.dumps({"elements": list(elements), "limit": limit}, indent=2) + "\n"
    write_text_atomic(file, text)


def _grid_file(path: str) -> dict[str, list[str]]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{path!r} is neither key=v1,v2,... nor a file that can be read",
            where="--array",
            remedy="write it like train.seed=1,2,3",
        ) from error
    raw = parse_yaml(text, where=path)
    if not isinstance(raw, dict) or not all(isinstance(v, list) and v for v in raw.values()):
        raise RecipeError(
            "is no mapping of keys to lists", where=path, remedy="write train.seed: [1, 2, 3]"
        )
    return {key: [json.dumps(value) for value in values] for key, values in raw.items()}
