"""What every process must have read alike before any trains: recipe, packages, rows, model.

On several nodes one path can hold several files: a stale copy, a mount that is missing, a template
that prints today's date. Processes that read differently would train a mixture, without an error.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_dist.common.errors import LaunchError
from peft_dist.common.paths import TOKENIZER_FILES
from peft_dist.config import Recipe
from peft_dist.config.load import PATH_FIELDS
from peft_dist.config.resume_rules import all_settings
from peft_dist.data.stream import TrainingRows
from peft_dist.data.template_file import read_template
from peft_dist.distributed.collectives import gather_objects
from peft_dist.model.precision import name_of
from peft_dist.model.weights import WeightFiles
from peft_dist.run.provenance import versions

Inputs = dict[str, str]
"""What one process has read: a few words about each, by the name a person knows it by."""


def describe_inputs(
    recipe: Recipe,
    rows: Mapping[str, TrainingRows | None],
    files: WeightFiles,
    dtype: torch.dtype,
) -> Inputs:
    """Return what this process has read; needs no other process.

    Args:
        recipe: With every default.
        rows: Rows by the field that names them.
        files: The model; of each tensor a few values are read.
        dtype: What this process computes in.
    """
    found = {f"package {name}": version for name, version in versions().items() if name != "wandb"}
    found |= {field: _of_rows(some) for field, some in rows.items()}
    found["tokenizer"] = _of_files(files, TOKENIZER_FILES)
    if recipe.data.templates:
        found["data.template"] = ", ".join(map(_of_template, recipe.data.templates))
    found["config.json"] = _of_files(files, ("config.json",))
    found["model.name"] = f"weights with sample {files.sample()}"
    found["dtype to compute in"] = name_of(dtype)
    # A file may lie elsewhere: its content is what counts.
    settings = all_settings(recipe, without=[".".join(path) for path in PATH_FIELDS])
    return found | {field: json.dumps(value) for field, value in settings.items()}


def refuse_different_inputs(inputs: Inputs) -> None:
    """Compare what all processes have read. Collective.

    Raises:
        LaunchError: On every process, with the first input that differs, and where.
    """
    everyone = gather_objects({"host": os.uname().nodename, "inputs": inputs})
    problem = first_difference(everyone)
    if problem is not None:
        raise LaunchError(problem, remedy="give every node the same files, recipe and packages")


def first_difference(everyone: Sequence[Mapping[str, Any]]) -> str | None:
    """Return in words where a rank has other inputs than rank 0, or None where none has.

    Args:
        everyone: `host` and `inputs` of every rank, in rank order.
    """
    first = everyone[0]
    for name in dict.fromkeys(name for one in everyone for name in one["inputs"]):
        wanted = first["inputs"].get(name, "none")
        others = [
            rank for rank, one in enumerate(everyone) if one["inputs"].get(name, "none") != wanted
        ]
        if others:
            rank, other = others[0], everyone[others[0]]
            more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
            return (
                f"rank {rank} on host {other['host']} has another {name} than rank 0 on host "
                f"{first['host']}: {other['inputs'].get(name, 'none')}, not {wanted}{more}"
            )
    return None


def _of_rows(rows: TrainingRows | None) -> str:
    return (
        "none" if rows is None else f"{rows.n_rows} rows with fingerprint {rows.fingerprint[:16]}"
    )


def _of_template(path: str) -> str:
    text = read_template(path).text.encode()
    return f"a text with sha256 {hashlib.sha256(text).hexdigest()[:16]}"


def _of_files(files: WeightFiles, patterns: Sequence[str]) -> str:
    """Return a digest of small files of the model's folder, by name and content."""
    digest = hashlib.sha256()
    found = files.others(patterns)
    for path in found:
        digest.update(f"{path.name}\n".encode())
        digest.update(path.read_bytes())
    return f"{len(found)} files with sha256 {digest.hexdigest()[:16]}"
