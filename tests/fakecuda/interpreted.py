"""Values of the kernel by Triton's interpreter, on the CPU; run by `test_kernels.py`.

Prints one JSON: what is wrong for each case, empty where nothing is; what is found to be wrong with
kernels that are.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from peft_dist.methods.fused import Shape, find_problem
from peft_dist.model import nf4_kernel
from peft_dist.model.fused_lora import WeightUpdate, updated_weight
from peft_dist.model.nf4 import dequantize, quantize_rows

CPU = torch.device("cpu")
SHAPES = [
    Shape(7, 96, 32, 1),
    Shape(1, 64, 64, 3),
    Shape(130, 192, 64, 8),
    Shape(64, 128, 64, 16),
    Shape(65, 320, 64, 17),
    Shape(200, 416, 32, 70),
]
"""Rows, columns and ranks that fill a tile, and that do not."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

own_kernel = nf4_kernel.updated_weight
by_triton = interpreter._convert_float


def rounded(value: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
    """Round float32 to bfloat16 as a GPU does, where the interpreter cuts digits off."""
    if (str(source), str(target)) != ("fp32", "bf16"):
        return by_triton(value, source, target, mode)
    bits = torch.from_numpy(np.array(value, dtype=np.float32)).to(torch.bfloat16)
    return bits.view(torch.uint16).numpy()


interpreter._convert_float = rounded


def is_the_dequantized_weight(shape: Shape, dtype: torch.dtype) -> bool:
    """Whether an update of zero leaves bitsandbytes' own weight, to the bit.

    Rounded by torch: of its two libraries for CPUs, one rounds halves to float16 otherwise.
    """
    rows, columns, block_size, rank = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight[0, :block_size] = 0.0
    packed, absmax = quantize_rows(weight, block_size)
    nothing = WeightUpdate(torch.randn(rank, columns), torch.zeros(rows, rank), 2.0)
    found = updated_weight(packed, absmax, nothing, block_size=block_size, dtype=dtype)
    wanted = dequantize(packed, absmax, block_size=block_size, dtype=torch.float32)
    return torch.equal(found, wanted.to(dtype))


def with_kernel(kernel: Callable[..., torch.Tensor]) -> str:
    """Return what is found wrong with another kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4_kernel, "updated_weight", kernel)
        return find_problem(SHAPES[-1], CPU, torch.bfloat16)


def wrong_in_one_tile(*arguments: Any, **settings: Any) -> torch.Tensor:
    """Leave the update out of one tile of the weight."""
    weight, packed, absmax = own_kernel(*arguments, **settings), *arguments[:2]
    del settings["factor"]
    weight[64:128, 128:256] = dequantize(packed, absmax, **settings)[64:128, 128:256]
    return weight


def without_compiler(*_: Any, **__: Any) -> torch.Tensor:
    """Fail as Triton does where it finds no C compiler."""
    raise RuntimeError("no compiler")


def main() -> None:
    """Compare all shapes in all dtypes."""
    problems, unchanged = {}, {}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        case = f"{tuple(shape)} {dtype}"
        problems[case] = find_problem(shape, CPU, dtype)
        unchanged[case] = is_the_dequantized_weight(shape, dtype)
    wrong = {
        "one tile": with_kernel(wrong_in_one_tile),
        "no compiler": with_kernel(without_compiler),
    }
    print(json.dumps({"problems": problems, "unchanged": unchanged, "wrong": wrong}))
    sys.stdout.flush()
    os._exit(0)
