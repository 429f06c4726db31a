"""The packed base on disk, so that the next start reads 4-bit rows instead of quantizing.

A cache entry is a model folder in bitsandbytes' own safetensors naming, which transformers loads
too. Its name is a hash of the source's content; a manifest, written last, names the source, so that
an entry under another one's name is no entry, and holds the fingerprint of every tensor, which
each load checks against the rows it really read.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from peft_dist.common.atomic import FolderTaken, folder_beside, put_in_place, remove_unfinished
from peft_dist.common.locks import lock_file
from peft_dist.distributed.collectives import Shard, broadcast_object, gather_objects
from peft_dist.distributed.world import World
from peft_dist.model.fill_base import CopyInto, copy_rows, fill_base
from peft_dist.model.packed_file import (
    code_map,
    config_text,
    header_of,
    layout_of,
    quant_state,
    raw_bytes,
)
from peft_dist.model.plan import BasePlan, BaseTensor
from peft_dist.model.stored import Stored
from peft_dist.model.weights import QUANT_STATE, WeightFiles

log = logging.getLogger(__name__)

MANIFEST = "peft_dist_manifest.json"
_FORMAT = 2
STALE_AFTER_S = 24 * 3600.0
"""Age past which a half-written entry has no writer any more."""


def file_sha256(path: Path, memo_folder: Path) -> str:
    """Return the sha256 of a file's content, remembered by path, size and modification time.

    Hashing 140 GB takes minutes; doing it once per file is what a restart can afford.
    """
    facts = path.resolve().stat()
    identity = f"{path.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{facts.st_ino}"
    memo = memo_folder / hashlib.sha256(identity.encode()).hexdigest()
    try:
        return memo.read_text()
    except OSError:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        memo_folder.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}")
        partial.write_text(digest)
        partial.replace(memo)
    except OSError:
        return digest  # A read-only cache costs another hash next time and nothing else.
    return digest


def entry_folder(cache: Path, files: WeightFiles, head: str) -> Path:
    """Return where the packed form of these files belongs, whether or not it is there.

    Each head has its own, as the tensors that it needs are others.

    Call it before the process group exists: the first process of a node hashes, the others wait
    for its lock and read what it remembered.
    """
    with ExitStack() as stack:
        with suppress(OSError):  # a read-only cache
            cache.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(cache / "sha256.lock"))
        name = _name_of(_source(cache, files))
        return cache / "packed" / (name if head == "causal-lm" else f"{name}-{head}")


def _source(cache: Path, files: WeightFiles) -> dict[str, str]:
    """Return the sha256 of every file that decides what the packed form is, by name."""
    memo = cache / "sha256"
    return {
        file.name: file_sha256(file, memo) for file in (files.folder / "config.json", *files.files)
    }


def _name_of(source: Mapping[str, str]) -> str:
    """Return the name of the entry that holds the packed form of a source."""
    digest = hashlib.sha256(f"peft-dist packed base {_FORMAT}\n".encode())
    for name, sha256 in source.items():
        digest.update(f"{name} {sha256}\n".encode())
    return digest.hexdigest()[:32]


def read_manifest(entry: Path, plan: BasePlan, files: WeightFiles) -> dict[str, int] | None:
    """Return the fingerprints of a complete entry; None where there is none to use.

    Fingerprints guard the rows, which every process checks as it reads them. All else in an entry
    follows from the plan, and is compared with it here.
    """
    try:
        manifest = json.loads((entry / MANIFEST).read_text())
        fingerprints = {name: int(value) for name, value in manifest["fingerprints"].items()}
        whole = (
            manifest["format"] == _FORMAT
            and _name_of(manifest["source"]) == entry.name.partition("-")[0]
            and all((entry / n).stat().st_size == size for n, size in manifest["bytes"].items())
            and (entry / "config.json").read_text() == config_text(files, plan)
            and _frame_is_intact(entry / "model.safetensors", plan, files)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return fingerprints if whole else None


def _frame_is_intact(file: Path, plan: BasePlan, files: WeightFiles) -> bool:
    """Compare everything in a packed file but its rows: header, code maps and quant states."""
    pieces = [(piece, tensor) for tensor in plan.tensors for piece in layout_of(tensor)]
    header = header_of([piece for piece, _ in pieces])
    with file.open("rb") as stream:
        if stream.read(len(header)) != header:
            return False
        for (key, _, _, size), tensor in pieces:
            if key.endswith(".quant_map"):
                intact = stream.read(size) == raw_bytes(code_map())
            elif QUANT_STATE in key:
                intact = stream.read(size) == raw_bytes(quant_state(tensor))
            else:
                stream.seek(size, os.SEEK_CUR)
                continue
            if not intact:
                return False
    return True


def discard(entry: Path) -> None:
    """Remove an entry that failed its check: at once for whoever looks, then its bytes."""
    aside = entry.with_name(f".{entry.name}-discarded-{os.getpid()}")
    with suppress(OSError):  # another process may have been faster
        entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def fill_through_cache(
    parameters: dict[str, nn.Parameter],
    plan: BasePlan,
    files: WeightFiles,
    shard: Shard,
    *,
    world: World,
    entry: Path,
    copy_into: CopyInto = copy_rows,
) -> Path | None:
    """Fill the base from its packed form where that is whole, else from the files. Collective.

    Reading from the files writes the packed form for the next start, by rank 0.

    Returns:
        The cache entry that now holds the base; None where it could not be written.
    """
    stood_there = entry.exists()  # asked before it is read: another job may be publishing it
    expected = broadcast_object(read_manifest(entry, plan, files) if world.is_main else None)
    if expected is None and world.is_main and stood_there:
        log.warning("packed base %s is incomplete or damaged; made anew", entry)
        discard(entry)
    # Nodes may have caches of their own, and this entry on only some of them.
    everywhere = all(
        gather_objects(expected is not None and read_manifest(entry, plan, files) == expected)
    )
    if everywhere:
        assert expected is not None
        packed_files = WeightFiles(entry)
        packed_plan = packed_form(plan, packed_files)
        found = fill_base(
            parameters, packed_plan, packed_files, shard, device=world.device, copy_into=copy_into
        )
        # Replicas read on their own, so one may find what the others did not, or not yet.
        differs = next((name for name, value in expected.items() if found.get(name) != value), "")
        damaged = next(filter(None, gather_objects(differs)), None)
        if damaged is None:
            if world.is_main:
                log.info("the 4-bit base was read from the cache: %s", entry)
            return entry
        if world.is_main:
            log.warning("packed base %s is damaged at %s; made anew", entry, damaged)
            discard(entry)
    writes = world.is_main and (everywhere or expected is None)
    sink = PackedWriter(entry, plan, files) if writes else DiscardRows()
    found = fill_base(
        parameters, plan, files, shard, device=world.device, copy_into=copy_into, sink=sink
    )
    sink.publish(found)
    failure = broadcast_object(sink.failure)
    if world.is_main and failure:
        log.warning(failure)
    elif world.is_main:
        log.info("the base was quantized, once for all runs; kept in the cache: %s", entry)
    return None if failure else entry


def packed_form(plan: BasePlan, files: WeightFiles) -> BasePlan:
    """Return the plan that reads the same tensors from a cache entry."""
    tensors = tuple(
        replace(t, source=Stored(files, t.name), packing=files.packing(t.name))
        for t in plan.tensors
    )
    return replace(plan, tensors=tensors)


class DiscardRows:
    """The part of the other processes in writing a cache entry: take part in the exchange."""

    failure = ""

    def add(self, tensor: BaseTensor, parts: tuple[torch.Tensor, ...]) -> None:
        """Drop the tensor."""

    def publish(self, fingerprints: dict[str, int]) -> None:
        """Leave publishing to rank 0."""


class PackedWriter:
    """Streams the packed base to disk, one tensor at a time, and publishes it when complete.

    A cache is a convenience: when the disk is full or read-only, `failure` says so and every
    later call does nothing.
    """

    def __init__(self, entry: Path, plan: BasePlan, files: WeightFiles) -> None:
        """Open a temporary folder beside the entry and write the header."""
        self.entry, self.failure = entry, ""
        self._stream: BinaryIO | None = None
        self._temporary = entry
        self._source: dict[str, str] = {}
        layout = [spec for tensor in plan.tensors for spec in layout_of(tensor)]
        try:
            self._source = _source(entry.parent.parent, files)
            remove_unfinished(entry, older_than_s=STALE_AFTER_S)
            self._temporary = folder_beside(entry)
            self._stream = (self._temporary / "model.safetensors").open("wb")
            self._stream.write(header_of(layout))
            (self._temporary / "config.json").write_text(config_text(files, plan))
        except OSError as error:
            self._give_up(error)

    def add(self, tensor: BaseTensor, parts: tuple[torch.Tensor, ...]) -> None:
        """Append one whole tensor, in the order of the plan."""
        if self._stream is None:
            return
        pieces = [*parts]
        if tensor.block_size is not None:
            pieces += [code_map(), quant_state(tensor)]
        try:
            for piece in pieces:
                self._stream.write(raw_bytes(piece))
        except OSError as error:
            self._give_up(error)

    def publish(self, fingerprints: dict[str, int]) -> None:
        """Write the manifest and rename the folder into place, as one step for readers."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            manifest = {
                "format": _FORMAT,
                "source": self._source,
                "bytes": {p.name: p.stat().st_size for p in sorted(self._temporary.iterdir())},
                "fingerprints": {name: str(value) for name, value in fingerprints.items()},
            }
            (self._temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            put_in_place(self._temporary, self.entry, replace=False)
        except FolderTaken:  # another job published it meanwhile
            shutil.rmtree(self._temporary, ignore_errors=True)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failure = f"the packed base is not cached: {error}"
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        shutil.rmtree(self._temporary, ignore_errors=True)
