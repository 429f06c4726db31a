"""A checkpoint's seal: size and sha256 of every file, written last and checked before use.

It finds damage and mix-ups. It is no signature: who can write the folder can write its manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, TypedDict

from peft_dist.common.atomic import sync_folder
from peft_dist.common.sharing import file_mode

MANIFEST_FILE = "manifest.json"
FORMAT = 1

Facts = dict[str, Any]
"""What a manifest says of its checkpoint beside the files: `step` at least."""


class Entry(TypedDict):
    """What a manifest says of a file: its size in bytes and its sha256 in hex."""

    size: int
    sha256: str


class BadCheckpoint(Exception):
    """A checkpoint that is not, byte for byte, what was sealed; says why in a few words."""


def step_name(step: int) -> str:
    """Return the name of a step's folder; it sorts by step."""
    return f"step-{step:08d}"


def seal(folder: Path, facts: Mapping[str, Any]) -> int:
    """Bring a finished checkpoint to the disk for good, and its manifest last.

    Args:
        folder: What to seal, sub-folders included; it has no manifest yet.
        facts: What else the manifest says, as JSON; `step` must be in it.

    Returns:
        The bytes of all files.

    Raises:
        OSError: Where the disk is full or broken; the folder must be thrown away then.
        BadCheckpoint: Where something in the folder is neither a file nor a folder.
    """
    files: dict[str, Entry] = {}
    names = list(_names(folder))
    for name in names:
        if name.endswith("/"):
            continue
        with _open(folder / name) as stream:
            os.fchmod(stream.fileno(), file_mode())
            os.fsync(stream.fileno())
            files[name] = _measured(stream)
    content = {"format": FORMAT, "facts": dict(facts), "files": files}
    data = _canonical({**content, "sha256": hashlib.sha256(_canonical(content)).hexdigest()})
    assert isinstance(facts["step"], int) and _canonical(json.loads(data)) == data, facts
    handle = os.open(folder / MANIFEST_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file_mode())
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    for name in (*reversed(names), ""):
        if not name or name.endswith("/"):
            sync_folder(folder / name)
    return len(data) + sum(entry["size"] for entry in files.values())


def verify(folder: Path) -> Facts:
    """Read every byte of a checkpoint and return the facts in its manifest.

    Raises:
        BadCheckpoint: Where anything is missing, added, changed, unreadable, or not a plain file,
            or where the folder has another step's name.
    """
    try:
        return _verified(folder)
    # A sealed folder is never this deep, and its manifest never nests this far.
    except RecursionError as error:
        raise BadCheckpoint("is nested too deeply") from error
    except OSError as error:
        name = Path(error.filename).name if isinstance(error.filename, str) else "a file"
        raise BadCheckpoint(f"{name} cannot be read: {error.strerror or error}") from error


def _verified(folder: Path) -> Facts:
    if folder.is_symlink() or not folder.is_dir():
        raise BadCheckpoint("is no folder")
    found = set(_names(folder))
    if MANIFEST_FILE not in found:
        raise BadCheckpoint(f"{MANIFEST_FILE} is missing")
    facts, files = _read_manifest(folder / MANIFEST_FILE)
    if folder.name != step_name(facts["step"]):
        raise BadCheckpoint(f"{MANIFEST_FILE} belongs to step {facts['step']}")
    # Found names never lead outside, so a listed one that does is among the missing.
    listed = {MANIFEST_FILE, *files, *(parent for name in files for parent in _parents(name))}
    for name in sorted(found ^ listed):
        raise BadCheckpoint(f"{name} is {'not listed' if name in found else 'missing'}")
    for name, entry in files.items():
        with _open(folder / name) as stream:
            measured = _measured(stream)
        if measured["size"] != entry["size"]:
            raise BadCheckpoint(f"{name} has {measured['size']} bytes, not {entry['size']}")
        if measured["sha256"] != entry["sha256"]:
            raise BadCheckpoint(f"{name} has another sha256")
    return facts


def _read_manifest(path: Path) -> tuple[Facts, dict[str, Entry]]:
    with _open(path) as stream:
        data = stream.read()
    try:
        manifest = json.loads(data)
        canonical = _canonical(manifest)
    except ValueError as error:
        raise BadCheckpoint(f"{MANIFEST_FILE} is no JSON") from error
    if canonical != data:
        raise BadCheckpoint(f"{MANIFEST_FILE} is not as it was written")
    match manifest:
        case {"format": int(number), "sha256": str(sha256)}:
            if number != FORMAT:
                raise BadCheckpoint(f"{MANIFEST_FILE} has the unknown format {number}")
        case _:
            raise BadCheckpoint(f"{MANIFEST_FILE} has no format or no sha256")
    del manifest["sha256"]
    if hashlib.sha256(_canonical(manifest)).hexdigest() != sha256:
        raise BadCheckpoint(f"{MANIFEST_FILE} has another sha256 than it says")
    match manifest:
        case {"facts": {"step": int()}, "files": dict(files)} if all(
            isinstance(entry, dict) and entry.keys() == Entry.__annotations__.keys()
            for entry in files.values()
        ):
            return manifest["facts"], files
    raise BadCheckpoint(f"{MANIFEST_FILE} lacks the step or the files")


def _canonical(value: object) -> bytes:
    """Return the only bytes that may stand for a value.

    Raises:
        ValueError: For NaN and infinities, which are no JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _names(folder: Path, parent: str = "") -> Iterator[str]:
    """Yield what is below a folder, sub-folders with a slash at the end and before what they hold.

    Raises:
        BadCheckpoint: At a link, a pipe or another special file.
    """
    with os.scandir(folder / parent) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = parent + entry.name
            if entry.is_file(follow_symlinks=False):
                yield name
            elif entry.is_dir(follow_symlinks=False):
                yield f"{name}/"
                yield from _names(folder, f"{name}/")
            else:
                raise BadCheckpoint(f"{name} is a link or a special file")


def _parents(name: str) -> Iterator[str]:
    for end, character in enumerate(name, start=1):
        if character == "/":
            yield name[:end]


def _open(path: Path) -> BufferedReader:
    # The flags keep a link that took the file's place from being followed, a pipe from blocking.
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")


def _measured(stream: BufferedReader) -> Entry:
    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": stream.tell(), "sha256": sha256}  # the bytes that were hashed, not stat's
