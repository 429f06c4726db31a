"""Damage that disks, copies and people do to a checkpoint, one seeded piece at a time."""

import random
from collections.abc import Callable
from pathlib import Path


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage one checkpoint, for sure, and say how.

    `between` also damages the checkpoint before it; no other one is ever touched.
    """
    kind = rng.choice(list(KINDS))
    return f"{kind}: {KINDS[kind](folder, rng)}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_with_bytes(folder: Path, rng: random.Random) -> Path:
    return rng.choice([path for path in _files(folder) if path.stat().st_size])


def _truncate(folder: Path, rng: random.Random) -> str:
    path = _file_with_bytes(folder, rng)
    data = path.read_bytes()
    kept = rng.randrange(len(data))
    path.write_bytes(data[:kept])
    return f"{path.name} to {kept} of {len(data)} bytes"


def _flip(folder: Path, rng: random.Random) -> str:
    path = _file_with_bytes(folder, rng)
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"{path.name} at bit {bit}"


def _empty(folder: Path, rng: random.Random) -> str:
    path = _file_with_bytes(folder, rng)
    path.write_bytes(b"")
    return path.name


def _append(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 9)))
    return path.name


def _remove(folder: Path, rng: random.Random) -> str:
    path = rng.choice(_files(folder))
    path.unlink()
    return path.name


def _add(folder: Path, rng: random.Random) -> str:
    path = rng.choice([folder, *(sub for sub in folder.iterdir() if sub.is_dir())])
    path /= rng.choice([".hidden", "manifest.json.bak", "state.json~", "extra"])
    kind = rng.choice(["file", "folder", "link", "dangling link"])
    match kind:
        case "file":
            path.write_bytes(rng.randbytes(rng.randrange(9)))
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(_files(folder)[0])
        case _:
            path.symlink_to("nowhere")
    return f"{kind} {path.name}"


def _swap(one: Path, other: Path) -> str:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name}"


def _swap_within(folder: Path, rng: random.Random) -> str:
    files = _files(folder)
    one = rng.choice(files)
    different = [path for path in files if path.read_bytes() != one.read_bytes()]
    return _swap(one, rng.choice(different))


def _swap_between(folder: Path, rng: random.Random) -> str:
    before = max(path for path in folder.parent.glob("step-*") if path < folder)
    pairs = [(path, before / path.relative_to(folder)) for path in _files(folder)]
    different = [(one, other) for one, other in pairs if one.read_bytes() != other.read_bytes()]
    return _swap(*rng.choice(different))


def _rename(folder: Path, rng: random.Random) -> str:
    step = int(folder.name.removeprefix("step-"))
    name = f"step-{step + rng.choice([-1, 1, 10, 1000]):08d}"
    folder.rename(folder.with_name(name))
    return f"{folder.name} to {name}"


def _link(folder: Path, rng: random.Random) -> str:
    """Put a link in a file's or a folder's place, to the very same bytes."""
    path = rng.choice([*_files(folder), *(sub for sub in folder.iterdir() if sub.is_dir()), folder])
    moved = path.rename(folder.parent / f"moved-{path.name}")
    path.symlink_to(moved)
    return path.name


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "truncated": _truncate,
    "bit flipped": _flip,
    "0 bytes": _empty,
    "appended": _append,
    "missing": _remove,
    "extra": _add,
    "within": _swap_within,
    "between": _swap_between,
    "renamed": _rename,
    "link": _link,
}
"""Every kind of damage, by name."""
