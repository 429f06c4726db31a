"""The recipes that come with the program: what they are, and copies that stand on their own."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_dist.common.errors import PeftDistError, nearest
from peft_dist.common.paths import SHARED_FOLDERS, root
from peft_dist.config.load import load_recipe
from peft_dist.config.recipe import Recipe

CLUSTER_FILE = "slurm/clusters/example.yaml"
"""Goes with what is for Slurm."""
ROWS = re.compile(r"\.\./data/([\w.-]+)")
"""How a recipe names its rows."""


@dataclass(frozen=True)
class Shipped:
    """One recipe that comes with the program."""

    name: str
    path: Path
    recipe: Recipe

    @property
    def purpose(self) -> str:
        """Return the first sentence of what it says of itself."""
        text = ""
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            text += line.removeprefix("#")
        return re.split(r"\.\s", text.strip() + " ")[0]


def shipped_recipes() -> Iterator[Shipped]:
    """Return all of them, by name."""
    for path in _files():
        yield Shipped(path.stem, path, load_recipe(path, check_paths=False))


def copy_recipe(
    name: str, folder: Path, *, called: str | None = None, for_slurm: bool = False
) -> list[Path]:
    """Copy a recipe and its rows into a folder, and return the files, the recipe first.

    Args:
        name: Of the recipe.
        folder: Made where it is not there.
        called: Name of the copy, without its ending (default: the recipe's own).
        for_slurm: Whether a cluster file goes with it.

    Raises:
        PeftDistError: For a name that none has, a file that is there, or a folder that cannot be
            written to.
    """
    name = name.removesuffix(".yaml")
    recipes = {path.stem: path for path in _files()}
    if name not in recipes:
        near = nearest(name, recipes)
        remedy = near if near.startswith("did you mean") else "see `peft-dist recipes ls`"
        raise PeftDistError(f"there is no recipe {name!r}", remedy=remedy)
    text = recipes[name].read_text(encoding="utf-8")
    rows = sorted(set(ROWS.findall(text)))
    if any(file.startswith("wordnet") for file in rows):
        rows.append("NOTICE")  # as its licence asks
    target = folder / f"{called or name}.yaml"
    contents = {target: ROWS.sub(r"data/\1", text).encode()}
    contents |= {
        folder / "data" / row: (root() / "configs/data" / row).read_bytes() for row in rows
    }
    if for_slurm:
        contents[folder / "cluster.yaml"] = (root() / CLUSTER_FILE).read_bytes()
    _write(folder, contents)
    return list(contents)


def copy_all(folder: Path) -> list[Path]:
    """Copy launchers, recipes and templates into a folder, and return the folders that it has then.

    Raises:
        PeftDistError: For a file that is there, or a folder that cannot be written to.
    """
    sources = [root() / name for name in SHARED_FOLDERS if (root() / name).is_dir()]
    contents = {
        folder / file.relative_to(root()): file.read_bytes()
        for source in sources
        for file in sorted(source.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }
    _write(folder, contents)
    return [folder / source.name for source in sources]


def _files() -> list[Path]:
    return sorted((root() / "configs" / "recipes").glob("*.yaml"))


def _write(folder: Path, contents: Mapping[Path, bytes]) -> None:
    """Write files, and none where one of them is there."""
    try:
        taken = [file for file in contents if file.exists() or file.is_symlink()]
        if taken:
            raise PeftDistError("already there", where=str(taken[0]), remedy="choose a new folder")
        for file, content in contents.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    except (OSError, ValueError) as error:
        raise PeftDistError(
            f"cannot be written: {error}", where=str(folder), remedy="choose another folder"
        ) from error
