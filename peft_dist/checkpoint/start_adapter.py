"""Start a training from an adapter that there is, such as preferences from supervised tuning."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from peft import PeftConfig

from peft_dist.checkpoint.adapter_file import ADAPTER_FILE, config_facts, load_adapter
from peft_dist.common.errors import RecipeError
from peft_dist.common.paths import ADAPTER_FILES
from peft_dist.config import Recipe
from peft_dist.config.method import hub_adapter
from peft_dist.distributed.collectives import gather_objects
from peft_dist.model.hub import download
from peft_dist.model_setup import ModelSetup

log = logging.getLogger(__name__)

_MAY_DIFFER = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",  # that the tensors fit is looked at; a base may have moved
        "inference_mode",
        "init_lora_weights",  # how the other training began
        "lora_dropout",
        "peft_version",
        "prompt_tuning_init",
        "revision",
    )
)


def load_start(setup: ModelSetup) -> None:
    """Put the adapter that `method.start_from` names in place of a new one, if any. Collective.

    Raises:
        RecipeError: Where there is none, or it is not one that the recipe's method makes.
        RunDirError: Where its file is broken or holds other tensors than the model trains.
    """
    named = setup.recipe.method.start_from
    if named is None:
        return
    folder = start_folder(named)
    try:
        theirs = config_facts(PeftConfig.from_pretrained(str(folder)))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _refusal(f"adapter_config.json cannot be read: {error}", folder) from error
    ours = config_facts(setup.method.saved_config(setup.peft))
    _require_same_kind(ours, theirs, folder)
    state = load_adapter(folder, setup.method, setup.peft, setup.adapter)
    setup.note_base()
    setup.engine.load_adapter_state(state)
    with (folder / ADAPTER_FILE).open("rb") as file:
        setup.start_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if len(set(gather_objects(setup.start_sha256))) > 1:
        raise _refusal("not every node finds the same adapter there", folder)
    setup.check_adapters_agree()
    if setup.world.is_main:
        log.info("starts from the adapter %s", folder)


def with_start_commit(recipe: Recipe) -> Recipe:
    """Return the recipe with the commit of an adapter of the hub, which is downloaded.

    A branch may be moved, and a run that goes on starts from the same adapter.

    Raises:
        ModelError, RecipeError: As `start_folder`.
    """
    named = recipe.method.start_from
    hub = None if named is None else hub_adapter(named)
    if named is None or hub is None:
        return recipe
    pinned = f"{hub[0]}@{start_folder(named).name}"
    method = recipe.method.model_copy(update={"start_from": pinned})
    return recipe.model_copy(update={"method": method})


def start_folder(named: str) -> Path:
    """Return the folder of the adapter that `method.start_from` names; downloads one of the hub.

    Raises:
        ModelError: It is on no hub that can be reached.
        RecipeError: It holds no adapter in safetensors.
    """
    hub = hub_adapter(named)  # local paths are absolute
    if hub is None:
        return _adapter_folder(Path(named))
    # Nothing else is fetched: adapter_model.bin is a pickle.
    return _adapter_folder(download(*hub, ADAPTER_FILES, kind="adapter", field="method.start_from"))


def _adapter_folder(path: Path) -> Path:
    """Return the adapter of a run or of a checkpoint, or the adapter folder itself."""
    for folder in (path / "adapter", path):
        if (folder / ADAPTER_FILE).is_file():
            return folder
    raise _refusal(f"holds no {ADAPTER_FILE}", path)


def _require_same_kind(ours: dict[str, Any], theirs: dict[str, Any], folder: Path) -> None:
    kinds = theirs.get("peft_type"), ours.get("peft_type")
    if kinds[0] != kinds[1]:
        raise _refusal(f"holds a {kinds[0]} adapter, but the recipe trains {kinds[1]}", folder)
    for field in sorted((ours.keys() | theirs.keys()) - _MAY_DIFFER):
        if ours.get(field) != theirs.get(field):
            raise _refusal(
                f"has {field} {theirs.get(field)!r}, but the recipe's method {ours.get(field)!r}",
                folder,
            )


def _refusal(problem: str, folder: Path) -> RecipeError:
    return RecipeError(
        f"{folder} {problem}",
        where="method.start_from",
        remedy="name a finished run, an adapter folder or a hub id, and its own method settings",
    )
