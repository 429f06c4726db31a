"""What this node finds of a recipe's local inputs: a cheap digest of each, to be compared.

On several nodes one path can hold several files: a stale copy, a mount that is missing. Every file
counts by name and size, and by what its head and tail hold; ranks compare all that they have read
before they train, but by then the libraries are imported and the rows tokenised. No torch.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from peft_dist.common import paths
from peft_dist.common.errors import PeftDistError
from peft_dist.config import Recipe, load_recipe
from peft_dist.preflight.node_info import NOTHING
from peft_dist.run.paths import RunPaths

INDEX = "model.safetensors.index.json"
WHOLE_BYTES = 1 << 20
"""Size up to which a file is read to its end."""
END_BYTES = 1 << 16
"""What is read of the head, and of the tail, of a larger one."""
MOST_FILES = 64
"""How many files of one input are read at most, evenly spaced; of the others the size counts."""

Inputs = dict[str, str]
"""A few words about each input, by the name a person knows it by."""


def inputs_of_run(run_dir: Path) -> Inputs:
    """Return what this node finds of a run's inputs; nothing where its recipe cannot be read."""
    run = RunPaths(run_dir)
    recipe = run.next_recipe if run.next_recipe.is_file() else run.recipe
    try:
        return local_inputs(load_recipe(recipe, check_paths=False))
    except PeftDistError:  # the start says what is wrong with it
        return {}


def local_inputs(recipe: Recipe) -> Inputs:
    """Return what this node finds of a recipe's inputs; what is on a hub is left out."""
    found: Inputs = {}
    model = paths.staged(recipe.model.name) or Path(recipe.model.name)
    if model.is_absolute():
        found["model.name"] = _of_files(_weights_of(model))
        # not all that lies there: a node's own copy may lack what nobody reads
        read = ("config.json", INDEX, *paths.TOKENIZER_FILES)
        for file in sorted({file for pattern in read for file in model.glob(pattern)}):
            found[f"{file.name} of the model"] = _of_files([file])
    start = recipe.method.start_from
    if start is not None and Path(start).is_absolute():
        folder = Path(start) / "adapter" if (Path(start) / "adapter").is_dir() else Path(start)
        found["method.start_from"] = _of_files([folder / name for name in paths.ADAPTER_FILES])
    held = () if recipe.data.held_out is not None else recipe.data.sources("eval")
    for field, sources in (("data.train", recipe.data.sources("train")), ("data.eval", held)):
        for source in sources:
            if Path(source.path).is_absolute():
                found[f"{field} {source.path}"] = _of_files(_files_of(source.path))
    for path in recipe.data.templates:
        found[f"data.template {path}"] = _of_files([Path(path)])
    return found


def _weights_of(model: Path) -> list[Path]:
    """Return the weight files that are read of a model's folder."""
    try:
        text = (model / INDEX).read_text(encoding="utf-8")
        names = set(json.loads(text)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names = {"model.safetensors"}
    return [model / name for name in sorted(names)]


def _files_of(rows: str) -> list[Path]:
    """Return the files of rows: one, those of a pattern, or all in a folder."""
    path = Path(rows)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else [Path(file) for file in paths.files_like(rows)]


def _of_files(files: Sequence[Path]) -> str:
    """Return number, bytes and a digest of files, wherever they lie."""
    digest, total, count = hashlib.sha256(), 0, 0
    every = max(1, -(-len(files) // MOST_FILES))
    for number, file in enumerate(files):
        try:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode(errors="surrogateescape"))
            digest.update(_some_of(file, size) if number % every == 0 else b"")
        except OSError:  # one that is missing here makes the difference
            continue
        total, count = total + size, count + 1
    if not count:
        return NOTHING
    many = "" if count == 1 else f"{count:,} files, "
    return f"{many}{total:,} bytes with digest {digest.hexdigest()[:12]}"


def _some_of(file: Path, size: int) -> bytes:
    """Return all of a small file, and both ends of a large one."""
    with file.open("rb") as stream:
        if size <= WHOLE_BYTES:
            return stream.read()
        head = stream.read(END_BYTES)
        stream.seek(size - END_BYTES)
        return head + stream.read(END_BYTES)
