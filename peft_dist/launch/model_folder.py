"""A look at the folder of a model before anything is started: is it one, and has it these layers?

Needs no torch: names of tensors stand at the beginning of safetensors files.
"""

import json
import re
import struct
from pathlib import Path

from peft_dist.common.errors import RecipeError, nearest
from peft_dist.config.models import TESTED, read_model_config
from peft_dist.config.recipe import Recipe

MOST_HEADER_BYTES = 100_000_000
"""As safetensors itself allows."""


def check_model_folder(recipe: Recipe) -> None:
    """Look whether a model's folder holds one, with the layers that a recipe names.

    Hub ids are passed over, and so are layers of models whose files name them otherwise.

    Raises:
        ModelError: There is no config.json, or it is no JSON object.
        RecipeError: For a target that no layer of the model has.
    """
    folder = Path(recipe.model.name).expanduser()
    if not folder.is_dir():
        return
    config = read_model_config(folder / "config.json")
    targets = getattr(recipe.method, "targets", None)
    if not isinstance(targets, tuple) or config.get("model_type") not in TESTED:
        return
    layers = _layers(folder)
    for target in targets:
        if layers and not any(f".{layer}.".find(f".{target}.") >= 0 for layer in layers):
            raise RecipeError(
                f"{target!r} is no layer of this model",
                where="method.targets",
                remedy=nearest(target, {layer.rpartition(".")[2] for layer in layers}),
            )


def _layers(folder: Path) -> set[str]:
    """Return the names of the layers inside the blocks; none where no file tells them."""
    names: set[str] = set()
    try:
        for index in folder.glob("*.safetensors.index.json"):
            names |= json.loads(index.read_text(encoding="utf-8"))["weight_map"].keys()
        for file in () if names else folder.glob("*.safetensors"):
            with file.open("rb") as stream:
                (size,) = struct.unpack("<Q", stream.read(8))
                names |= json.loads(stream.read(min(size, MOST_HEADER_BYTES))).keys()
    except (OSError, ValueError, KeyError, AttributeError, struct.error):
        return set()  # reading the model will say what is wrong with it
    return {name.rpartition(".")[0] for name in names if re.search(r"\.\d+\.", f".{name}")}
