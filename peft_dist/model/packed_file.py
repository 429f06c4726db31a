"""The bytes of a packed base's files, in bitsandbytes' own naming, which transformers loads too."""

import json
import math
import struct
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.utils import pack_dict_to_tensor

from peft_dist.model.plan import BasePlan, BaseTensor
from peft_dist.model.weights import FLOATS, QUANT_STATE, WeightFiles

Piece = tuple[str, str, tuple[int, ...], int]
"""Key, safetensors' name of the type, shape, and bytes of one tensor of a file."""


def config_text(files: WeightFiles, plan: BasePlan) -> str:
    """Return the config.json by which transformers loads an entry."""
    config = json.loads((files.folder / "config.json").read_text())
    unquantized = [t.name for t in plan.tensors if t.block_size is None and len(t.shape) == 2]
    skipped = [name.rpartition(".")[0] for name in (*unquantized, *plan.fresh)]
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "llm_int8_skip_modules": list(dict.fromkeys(["lm_head", *skipped])),
    }
    return json.dumps(config, indent=2)


def layout_of(tensor: BaseTensor) -> list[Piece]:
    """Return the pieces that a tensor of the base is written as, in order."""
    if tensor.block_size is None:
        dtype = tensor.source.dtype
        elements = math.prod(tensor.shape)
        return [(tensor.name, dtype, tensor.shape, elements * FLOATS[dtype].itemsize)]
    values = math.prod(tensor.shape)
    blocks = values // tensor.block_size
    state_bytes = quant_state(tensor).numel()
    return [
        (tensor.name, "U8", (values // 2, 1), values // 2),
        (f"{tensor.name}.absmax", "F32", (blocks,), blocks * 4),
        (f"{tensor.name}.quant_map", "F32", (16,), 64),
        (f"{tensor.name}{QUANT_STATE}nf4", "U8", (state_bytes,), state_bytes),
    ]


def header_of(layout: list[Piece]) -> bytes:
    """Return the head of a safetensors file: its length, then JSON padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, dtype, shape, size in layout:
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def code_map() -> torch.Tensor:
    """Return the 16 values of NF4, float32."""
    codes: torch.Tensor = bnb.get_4bit_type("nf4", device="cpu")
    return codes


def quant_state(tensor: BaseTensor) -> torch.Tensor:
    """Return what bitsandbytes wants to know of a tensor, packed as it packs it, uint8 [n]."""
    facts = {
        "quant_type": "nf4",
        "blocksize": tensor.block_size,
        "dtype": "float32",
        "shape": list(tensor.shape),
    }
    packed: torch.Tensor = pack_dict_to_tensor(facts)
    return packed


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor as they stand in a file."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy().data
