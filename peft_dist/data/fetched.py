"""What nodes without a network find of models and rows of a hub, in the caches that they share.

Reads the layout of Hugging Face's cache of models itself, and notes of our own on datasets, whose
cache has no layout that others may rely on. Imports no library: a login node asks this.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from peft_dist.common.atomic import replace_file
from peft_dist.common.env import CACHE
from peft_dist.common.paths import ADAPTER_FILES, TOKENIZER_FILES, cache_dir

WEIGHTS = "model.safetensors.index.json"


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder of downloaded models, as huggingface_hub finds it."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    home = environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    general = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(general).expanduser() / "huggingface" / "hub"


def missing_of_model(name: str, revision: str | None, environ: Mapping[str, str]) -> str:
    """Return what a hub model lacks on this machine, in words; nothing where it is whole.

    Args:
        name: Its hub id.
        revision: Branch, tag or commit; None for the default branch.
        environ: The variables that the nodes will have.
    """
    snapshot = _snapshot(name, revision, environ)
    if not snapshot.is_dir():
        return f"is not in {hub_cache(environ)}"
    lacks = [] if (snapshot / "config.json").exists() else ["config.json"]
    if (snapshot / WEIGHTS).exists():
        with suppress(OSError, ValueError, KeyError, AttributeError):
            index = json.loads((snapshot / WEIGHTS).read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
            lacks += [file for file in files if not (snapshot / file).exists()]
    elif not any(file.exists() for file in snapshot.glob("*.safetensors")):
        lacks.append("*.safetensors")
    if not any(file.exists() for pattern in TOKENIZER_FILES for file in snapshot.glob(pattern)):
        lacks.append("its tokenizer")
    return f"lacks {_some(lacks)} in {snapshot}" if lacks else ""


def missing_of_adapter(name: str, revision: str | None, environ: Mapping[str, str]) -> str:
    """Return what an adapter of the hub lacks on this machine; see `missing_of_model`."""
    snapshot = _snapshot(name, revision, environ)
    if not snapshot.is_dir():
        return f"is not in {hub_cache(environ)}"
    lacks = [file for file in ADAPTER_FILES if not (snapshot / file).exists()]
    return f"lacks {_some(lacks)} in {snapshot}" if lacks else ""


def _snapshot(name: str, revision: str | None, environ: Mapping[str, str]) -> Path:
    folder = hub_cache(environ) / f"models--{name.replace('/', '--')}"
    commit = wanted = revision or "main"
    with suppress(OSError):
        commit = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    return folder / "snapshots" / commit


def note_dataset(name: str, split: str, files: Iterable[Path]) -> None:
    """Note where a hub dataset lies on this machine.

    Raises:
        OSError: Where the cache cannot be written.
    """
    note = _note(name, split, cache_dir())
    note.parent.mkdir(parents=True, exist_ok=True)
    facts = {"name": name, "split": split, "files": [str(file) for file in files]}
    replace_file(note, json.dumps(facts) + "\n")


def missing_of_dataset(name: str, split: str, environ: Mapping[str, str]) -> str:
    """Return what of a hub dataset `fetch` has not brought, or is gone; nothing where it is whole.

    Args:
        name: Its hub id.
        split: Split of it, or part of one.
        environ: The variables that the nodes will have.
    """
    own = environ.get(CACHE)
    note = _note(name, split, Path(own).expanduser() if own else cache_dir())
    try:
        files = [str(file) for file in json.loads(note.read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return f"has not been fetched for split {split!r}"
    gone = [file for file in files if not Path(file).exists()]
    return f"was fetched, and has lost {_some(gone)} since" if gone else ""


def _note(name: str, split: str, cache: Path) -> Path:
    digest = hashlib.sha256(f"{name}\n{split}".encode()).hexdigest()[:32]
    return cache / "fetched" / f"{digest}.json"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
