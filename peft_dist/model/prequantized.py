"""Weights that a release keeps quantized, read by rows as floats, whatever wrote them.

What a weight is made of is told by the tensors that stand beside it in the files:

| written by | tensors | value |
|---|---|---|
| fine-grained FP8 (DeepSeek, Qwen) | W, W_scale_inv | W * scale of its block |
| compressed-tensors, ModelOpt: FP8, int8 | W, W_scale | W * scale of its row, group or block |
| compressed-tensors: int4, int8 | W_packed (int32), W_scale, W_shape | the same, offset codes |
| compressed-tensors: NVFP4, MXFP4 | W_packed (bytes), W_scale, W_global_scale | FP4 * s / g |
| ModelOpt: NVFP4, MXFP4 | W (bytes), W_scale, W_scale_2 | FP4 * s * g |
| gpt-oss: MXFP4 | W_blocks, W_scales | FP4 * 2 ** s, transposed |
| bitsandbytes: int8 | W, SCB | W * SCB / 127 |
| bitsandbytes: fp4 | W, W.absmax, W.quant_state | FP4 codes of its own |
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peft_dist.common.errors import ModelError
from peft_dist.model.weights import QUANT_STATE, WeightFiles

Shape = tuple[int, ...]
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of an E2M1 code; the lower half of a byte comes first."""
_FP8 = ("F8_E4M3", "F8_E5M2")
_ENDS = ("_scale_inv", "_scale_2", "_global_scale", "_scale", "_shape", "_zero_point", "_g_idx")
"""What stands behind the name of a quantized weight for what belongs to it."""
_ELSEWHERE = (
    ".input_scale", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale",
    ".weight_format", ".input_scale_2",
)  # fmt: skip
"""What belongs to quantized activations, which are computed in full here, and to no weight."""


@dataclass(frozen=True)
class Dequantized:
    """A quantized weight as floats."""

    key: str
    shape: Shape
    read: Callable[[int, int], torch.Tensor]
    dtype: str = "F32"

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own name."""
        return (self.key,)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop) of codes and scales, and return their values, float32."""
        return self.read(start, max(start, stop))


def quantized_weights(files: WeightFiles) -> tuple[dict[str, Dequantized], set[str]]:
    """Find the weights that are kept quantized, besides those in bitsandbytes' nf4.

    Returns:
        The weights, by the names that they would have in full; and every key that is used up.

    Raises:
        ModelError: For codes that cannot be read by rows.
    """
    config = json.loads((files.folder / "config.json").read_text(encoding="utf-8"))
    facts: dict[str, Any] = config.get("quantization_config") or {}
    found: dict[str, Dequantized] = {}
    used: set[str] = set()
    for key in files.tensors:
        weight = _read(files, key, facts)
        if weight is not None:
            found[weight.key] = weight
            used.add(key)
    stems = {weight.key for weight in found.values()}
    for key in files.tensors:
        stem = next((key.removesuffix(end) for end in _ENDS if key.endswith(end)), "")
        module = key.rpartition(".")[0]
        own = stem in stems or key.endswith("_scales") and key.removesuffix("_scales") in stems
        of_bnb = f"{module}.weight" in stems and key.endswith(".SCB")
        parts = key.partition(".absmax")[0] in stems or key.partition(".quant_")[0] in stems
        if own or of_bnb or parts or (stems and key.endswith(_ELSEWHERE)):
            used.add(key)
    return found, used


def _read(files: WeightFiles, key: str, facts: dict[str, Any]) -> Dequantized | None:
    """Return the weight whose codes a tensor holds; None where it holds none."""
    tensors, stored = files.tensors, files.tensors[key]
    if f"{key}{QUANT_STATE}fp4" in tensors:
        return _bitsandbytes_fp4(files, key)
    if key.endswith("_blocks") and stored.dtype == "U8":
        return _gpt_oss(files, key)
    name = key.removesuffix("_packed")
    _refuse_uneven(files, name)
    scale = next((name + end for end in ("_scale_inv", "_scale") if name + end in tensors), None)
    bnb_scale = key.removesuffix("weight") + "SCB"
    if stored.dtype == "I8" and bnb_scale in tensors:
        return Dequantized(
            key,
            stored.shape,
            lambda a, b: files.rows(key, a, b).float() * files.rows(bnb_scale, a, b)[:, None] / 127,
        )
    if scale is None or len(stored.shape) != 2:
        return None
    if stored.dtype == "I32":
        return _packed_integers(files, key, name, scale, facts)
    if stored.dtype == "U8":
        return _four_bit_floats(files, key, name, scale)
    if stored.dtype in (*_FP8, "I8"):
        block = _block(facts)
        return Dequantized(
            key,
            stored.shape,
            lambda a, b: _scaled(
                files, scale, files.rows(key, a, b).float(), a, stored.shape, block
            ),
        )
    return None


def _refuse_uneven(files: WeightFiles, name: str) -> None:
    for end, what in (("_zero_point", "zero points"), ("_g_idx", "columns in another order")):
        if name + end in files.tensors:
            raise ModelError(
                f"{name} is quantized with {what}, which are not read here",
                where="model.name",
                remedy="use its full-precision version; it can be quantized here",
            )


def _block(facts: dict[str, Any]) -> tuple[int, int]:
    """Return the rows and columns that share a scale, where several rows do."""
    size = facts.get("weight_block_size")
    for group in (facts.get("config_groups") or {}).values():
        size = size or ((group or {}).get("weights") or {}).get("block_structure")
    rows, columns = size or (128, 128)
    return int(rows), int(columns)


def _scaled(
    files: WeightFiles,
    key: str,
    values: torch.Tensor,
    start: int,
    shape: Shape,
    block: tuple[int, int],
) -> torch.Tensor:
    """Multiply rows [n, in] of a matrix with their scales: of all, of rows, groups or blocks."""
    scales = files.tensors[key].shape
    if len(scales) < 2 and (not scales or scales[0] == 1):
        return values * files.full_tensor(key).float()
    by_row = scales[0] == shape[0]
    rows = torch.arange(start, start + len(values)) // (1 if by_row else block[0])
    first = int(rows[0]) if len(rows) else 0
    some = files.rows(key, first, int(rows[-1]) + 1 if len(rows) else 0).float()
    some = some.reshape(len(some), math.prod(scales[1:]))[rows - first]
    columns = -(-shape[1] // some.shape[1]) if by_row else block[1]
    return values * some.repeat_interleave(columns, dim=1)[:, : shape[1]]


def _packed_integers(
    files: WeightFiles, key: str, name: str, scale: str, facts: dict[str, Any]
) -> Dequantized:
    """Return a weight whose codes lie side by side in int32, lowest bits first."""
    out, words = files.tensors[key].shape
    columns = int(files.full_tensor(f"{name}_shape")[1]) if f"{name}_shape" in files.tensors else 0
    bits = next((b for b in (4, 8) if columns and -(-columns * b // 32) == words), 0)
    if not bits:
        raise ModelError(
            f"{key} holds codes of a width that is not known",
            where="model.name",
            remedy="use its full-precision version; it can be quantized here",
        )
    shape = (out, columns)

    def read(start: int, stop: int) -> torch.Tensor:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        codes = (files.rows(key, start, stop)[..., None] >> shifts) & ((1 << bits) - 1)
        values = codes.flatten(1)[:, :columns].float() - (1 << (bits - 1))
        return _scaled(files, scale, values, start, shape, _block(facts))

    return Dequantized(name, shape, read)


def _fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Return the values of two codes a byte, [..., columns]."""
    table = torch.tensor(FP4)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return table[codes.int()]


def _powers(scales: torch.Tensor) -> torch.Tensor:
    """Return what exponents of a biased byte (E8M0) stand for."""
    return torch.exp2(scales.float() - 127)


def _four_bit_floats(files: WeightFiles, key: str, name: str, scale: str) -> Dequantized:
    """Return a weight in FP4 with a scale for each group of 16 (NVFP4) or 32 (MXFP4)."""
    out, half = files.tensors[key].shape
    shape = (out, 2 * half)
    powers = files.tensors[scale].dtype == "U8"

    def read(start: int, stop: int) -> torch.Tensor:
        scales = files.rows(scale, start, stop)
        factors = _powers(scales) if powers else scales.float()
        if f"{name}_scale_2" in files.tensors:
            factors = factors * files.full_tensor(f"{name}_scale_2").float()
        if f"{name}_global_scale" in files.tensors:
            factors = factors / files.full_tensor(f"{name}_global_scale").float()
        values = _fp4_values(files.rows(key, start, stop))
        return values * factors.repeat_interleave(shape[1] // factors.shape[1], dim=1)

    return Dequantized(name, shape, read)


def _gpt_oss(files: WeightFiles, key: str) -> Dequantized:
    """Return experts [E, in, out] whose codes are kept as [E, out, groups, bytes]."""
    name = key.removesuffix("_blocks")
    experts, out, groups, size = files.tensors[key].shape

    def read(start: int, stop: int) -> torch.Tensor:
        values = _fp4_values(files.rows(key, start, stop))
        scaled = values * _powers(files.rows(f"{name}_scales", start, stop))[..., None]
        return scaled.flatten(2).transpose(1, 2).contiguous()

    return Dequantized(name, (experts, groups * size * 2, out), read)


def _bitsandbytes_fp4(files: WeightFiles, key: str) -> Dequantized:
    """Return a weight in bitsandbytes' own FP4, whose blocks must not cross rows."""
    import bitsandbytes.functional as bnb

    packing = files.packing(key, kind="fp4")
    assert packing is not None

    def read(start: int, stop: int) -> torch.Tensor:
        codes, absmax = files.packed_rows(key, packing, start, stop)
        rows = (stop - start, packing.shape[1])
        if not stop > start:
            return torch.empty(rows)
        state = bnb.QuantState(
            absmax=absmax.view(torch.float32).reshape(-1),
            shape=torch.Size(rows),
            blocksize=packing.block_size,
            quant_type="fp4",
            dtype=torch.float32,
        )
        values: torch.Tensor = bnb.dequantize_4bit(codes.reshape(-1, 1), state)
        return values

    return Dequantized(key, packing.shape, read)
