"""Read rows of tensors from the safetensors files of a model folder.

Knows files, shapes and bitsandbytes' naming of packed tensors. Knows no model and no sharding.
"""

import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from peft_dist.common import paths
from peft_dist.common.errors import ModelError
from peft_dist.config.models import read_model_config
from peft_dist.model.hub import download

QUANT_STATE = ".quant_state.bitsandbytes__"
"""Behind a weight's name: JSON about its packing, stored as bytes."""
PACKED_PARTS = (".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map")
"""Ends of the names of what bitsandbytes keeps beside a packed weight."""
_CONVERT = (
    'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[1])\""
)
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What a weight may be stored as, by safetensors' names."""
_SAMPLED_VALUES = 256
"""At each of three places in a tensor."""


def model_folder(name: str, revision: str | None) -> Path:
    """Return the folder of a model: this node's copy, a local one as it is, a hub id's download.

    Raises:
        ModelError: Where there is neither.
    """
    local = paths.staged(name) or Path(name).expanduser()
    if local.is_dir():
        read_model_config(local / "config.json")
        return local
    return download(name, revision, paths.MODEL_FILES, kind="model", field="model.name")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Packing:
    """How bitsandbytes packed one weight."""

    shape: tuple[int, ...]
    """[out, in], or [experts, rows, columns]."""
    block_size: int
    nested: dict[str, Any] | None


class WeightFiles:
    """The tensors of one model folder, by name."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of every safetensors file in the folder.

        Raises:
            ModelError: For no files, a broken one, or one the index names that is not there.
        """
        self.folder = folder
        self.files = _safetensors_files(folder)
        self._open: dict[Path, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            handle = self._handle(file)
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                piece = handle.get_slice(key)
                self.tensors[key] = StoredTensor(file, tuple(piece.get_shape()), piece.get_dtype())

    @property
    def bytes(self) -> int:
        """Return the size of all weight files."""
        return sum(file.stat().st_size for file in self.files)

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (OSError, RuntimeError, SafetensorError) as error:
                raise ModelError(
                    f"{file} is not a readable safetensors file ({error})",
                    where="model.name",
                    remedy="download or copy the model again",
                ) from None
        return self._open[file]

    def rows(self, key: str, start: int, stop: int, *, transposed: bool = False) -> torch.Tensor:
        """Read rows [start, stop) of a tensor, or of its transpose, in the stored dtype."""
        piece = self._handle(self.tensors[key].file).get_slice(key)
        if transposed:
            columns: torch.Tensor = piece[:, start:stop]
            return columns.t().contiguous()
        rows: torch.Tensor = piece[start:stop]
        return rows

    def full_tensor(self, key: str) -> torch.Tensor:
        """Read a whole tensor; for small ones."""
        tensor: torch.Tensor = self._handle(self.tensors[key].file).get_tensor(key)
        return tensor

    @property
    def packed(self) -> bool:
        """Whether bitsandbytes has quantized any of it to nf4."""
        return any(f"{QUANT_STATE}nf4" in key for key in self.tensors)

    def others(self, patterns: Sequence[str]) -> list[Path]:
        """Return files of the folder besides the weights whose names match, in order."""
        found = {path for pattern in patterns for path in self.folder.glob(pattern)}
        return sorted(path for path in found if path.is_file())

    def sample(self) -> str:
        """Return a digest of names, types, shapes and a few values of every tensor.

        Two models of one shape differ in nearly every value, so a few tell them apart without
        reading what can be hundreds of gigabytes.
        """
        digest = hashlib.sha256()
        for key, stored in sorted(self.tensors.items()):
            digest.update(f"{key} {stored.dtype} {stored.shape} ".encode())
            count = stored.shape[0] if stored.shape else 0
            rows = -(-_SAMPLED_VALUES // max(math.prod(stored.shape[1:]), 1))
            for first in {0: None, count // 3: None, max(count - rows, 0): None} if count else ():
                some = self.rows(key, first, min(first + rows, count)).reshape(-1)
                some = some[:_SAMPLED_VALUES].contiguous()
                digest.update(some.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def is_float(self, key: str) -> bool:
        """Whether a tensor holds floats that can be quantized or cast."""
        return self.tensors[key].dtype in FLOATS

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of a float tensor."""
        return FLOATS[self.tensors[key].dtype]

    def packing(self, key: str, *, kind: str = "nf4") -> Packing | None:
        """Return how bitsandbytes packed this weight; None where it is not packed.

        Args:
            key: Its name.
            kind: The codes that are wanted, nf4 or fp4.

        Raises:
            ModelError: For a packing that rows cannot be cut from.
        """
        states = [name for name in self.tensors if name.startswith(key + QUANT_STATE)]
        if not states:
            return None
        assert states[0] == f"{key}{QUANT_STATE}{kind}", states
        facts = json.loads(bytes(self.full_tensor(states[0]).tolist()))
        in_features = facts["shape"][-1]
        block_size = facts["blocksize"]
        if in_features % block_size:
            raise ModelError(
                f"{key} has {in_features} columns packed in blocks of {block_size}, which cross "
                "rows, so its rows cannot be sharded",
                where="model.name",
                remedy="use the full-precision model",
            )
        nested = facts if f"{key}.nested_absmax" in self.tensors else None
        return Packing(tuple(facts["shape"]), block_size, nested)

    def packed_rows(
        self, key: str, packing: Packing, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read rows of a packed weight as `nf4.quantize_rows` returns them."""
        *inner, columns = packing.shape[1:]
        in_features = math.prod(inner) * columns
        row_bytes, row_blocks = in_features // 2, in_features // packing.block_size
        codes = self.rows(key, start * row_bytes, stop * row_bytes)
        if packing.nested is None:
            scales = self.rows(f"{key}.absmax", start * row_blocks, stop * row_blocks)
        else:
            scales = self._nested_absmax(key, packing.nested)[
                start * row_blocks : stop * row_blocks
            ]
        scales = scales.reshape(stop - start, *inner, columns // packing.block_size).contiguous()
        codes = codes.reshape(stop - start, *inner, columns // 2)
        return codes, scales.view(torch.uint8)

    def _nested_absmax(self, key: str, facts: dict[str, Any]) -> torch.Tensor:
        """Undo double quantization of the scales, as bitsandbytes does at compute time."""
        import bitsandbytes.functional as bnb

        state = bnb.QuantState(
            absmax=self.full_tensor(f"{key}.nested_absmax"),
            blocksize=facts["nested_blocksize"],
            code=self.full_tensor(f"{key}.nested_quant_map"),
            dtype=getattr(torch, facts["nested_dtype"]),
        )
        scales = bnb.dequantize_blockwise(self.full_tensor(f"{key}.absmax"), state)
        offset: float = facts["nested_offset"]
        return (scales + offset).float()


def _safetensors_files(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(
                f"{index} is not a safetensors index",
                where="model.name",
                remedy="download or copy the model again",
            ) from None
        files = tuple(folder / name for name in names)
    else:
        files = (folder / "model.safetensors",)
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None and any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{folder} holds .bin files, which are programs to whoever loads them",
            where="model.name",
            remedy=f"where you trust them: {_CONVERT} {shlex.quote(str(folder))}",
        )
    if missing is not None:
        raise ModelError(
            f"{missing} does not exist",
            where="model.name",
            remedy="the model must be stored as safetensors; convert it with save_pretrained",
        )
    return files
