"""Compile Triton kernels for each generation of NVIDIA's cards, without one; list what they take.

Registers, bytes spilled and shared memory are what ptxas made; bytes and times are a model of
Llama-3.1-8B: what memory moves at 85 % of the bandwidth, products at 70 % of the peak.

    python benchmarks/weight_kernel.py       # needs Triton, which torch brings for CUDA
"""

import functools
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peft_dist.model.fused_lora import fewest_tokens
from peft_dist.model.nf4_kernel import STAGES, WARPS, compiled_for, weight_kernel

CARDS = {80: "A100", 89: "L4, RTX 40", 90: "H100", 100: "B200"}
"""By compute capability."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (16, 64)
LINEARS = {
    "q, o": (4096, 4096, 2),
    "k, v": (1024, 4096, 2),
    "gate, up": (14336, 4096, 2),
    "down": (4096, 14336, 1),
}
"""Of a block of Llama-3.1-8B: out, in, and how many there are."""
LAYERS = 32
BYTES_PER_S, FLOPS_PER_S = 0.85 * 3.35e12, 0.7 * 989e12
"""Of an H100."""
TILE_CYCLES = (720, 982)
"""Of an H100 for a tile of 256 x 128 x 64 in a product that dequantizes what it needs: issuing the
instructions of its loop, as compiled; multiplying, at the peak. Times no tile overlaps another."""


class Use(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


@functools.cache
def compiled(capability: int, dtype: str, rank: int, block_size: int) -> tuple[Use, str]:
    """Compile the kernel that makes updated weights; return what it takes, and its PTX."""
    pointers = ("packed", "scales", "levels", "a", "b", "out")
    types = ["*u8", *["*fp32"] * 4, f"*{dtype}", "i32", "i32", "i32", "fp32"]
    names = (*pointers, "n_rows", "n_columns", "rank", "factor")
    constants = compiled_for(rank, block_size, DTYPES[dtype])
    source = ASTSource(
        weight_kernel,
        dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        # As at run time: addresses and sizes that are multiples of 16.
        attrs={(place,): [["tt.divisibility", 16]] for place in range(len(names) - 1)},
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": WARPS, "num_stages": STAGES}
    kernel = triton.compile(source, target=target, options=options)
    with TemporaryDirectory(prefix="peft-dist-") as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        listed = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listed)
    assert found is not None, listed
    use = Use(int(found[1]), int(found[2]), kernel.metadata.shared)
    return use, kernel.asm["ptx"]


def uses() -> list[str]:
    """Return the table of what the kernel takes, in Markdown."""
    lines = [
        "| card | weights | rank | registers | spilled | shared memory |",
        "|---|---|---|---|---|---|",
    ]
    for capability, card in CARDS.items():
        for dtype in ("bf16", "fp32"):
            for rank in RANKS:
                use, _ = compiled(capability, dtype, rank, 64)
                cells = [f"sm_{capability} ({card})", dtype, str(rank), str(use.registers)]
                cells += [f"{use.spilled_bytes} B", f"{use.shared_bytes / 1024:.0f} KiB"]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


class Cost(NamedTuple):
    """Milliseconds of all linears of a model, forward and backward, gradients of A and B too."""

    apart: float
    fused: float
    in_product: float
    fp8: float


def cost(tokens: int, rank: int) -> Cost:
    """Return what the model says of some ways, for 16-bit numbers.

    apart: dequantize, and products of their own for A and B. fused: the update is added while the
    weight is dequantized. in_product: a product that dequantizes each tile of the weight for each
    tile of tokens, with the low-rank product at its end. fp8: apart, but for products of the weight
    in 8 bits at twice the rate; what rounds tokens reads and writes 9 bytes of each number that a
    weight is given, and 13 of its gradient, as kernels of torch.
    """
    apart = fused = in_product = fp8 = 0.0
    for rows, columns, count in LINEARS.values():
        weights = rows * columns
        multiply = max(
            2 * tokens * weights / FLOPS_PER_S,
            2 * (tokens * (rows + columns) + weights) / BYTES_PER_S,
        )
        dequantize = (0.5625 + 2) * weights / BYTES_PER_S
        # x A^T, grad B, and the gradients of A and B read x and grad twice; both ways have them.
        gradients = 4 * tokens * (rows + columns) / BYTES_PER_S
        # The sum with the output; the gradient of x from A, and its sum with the other.
        sums = tokens * (4 * rows + 8 * columns) / BYTES_PER_S
        added = rank * weights / 8 / BYTES_PER_S  # both passes; see fused_lora.fewest_tokens
        chosen = tokens >= fewest_tokens(torch.Size((rows, columns // 2)), rank, torch.bfloat16)
        issued, multiplied = TILE_CYCLES
        by_tile = max(
            2 * tokens * weights / 989e12 * (issued + multiplied) / multiplied,
            (2 * tokens * (rows + columns) + 0.5625 * weights) / BYTES_PER_S,
        )
        apart += count * (2 * (multiply + dequantize) + gradients + sums)
        spared = count * (sums - added) if chosen else 0.0
        fused += count * (2 * (multiply + dequantize) + gradients + sums) - spared
        in_product += count * (2 * by_tile + gradients)
        # A weight is read once more and written in 8 bits in each pass, and turned in backward.
        in_8_bits = (2 * 3 + 2) * weights / BYTES_PER_S + 2 * tokens * weights / FLOPS_PER_S
        in_8_bits += tokens * (9 * columns + 13 * rows) / BYTES_PER_S
        fp8 += count * (in_8_bits + 2 * dequantize + gradients + sums)
    return Cost(*(1e3 * LAYERS * seconds for seconds in (apart, fused, in_product, fp8)))


def costs() -> list[str]:
    """Return the table of the ways, in Markdown."""
    lines = [
        "| tokens | rank | apart | fused | product that dequantizes | fp8 |",
        "|---|---|---|---|---|---|",
    ]
    for rank in RANKS:
        for tokens in (256, 512, 1024, 2048, 8192):
            cells = [str(tokens), str(rank), *(f"{ms:.0f} ms" for ms in cost(tokens, rank))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> int:
    """Print both tables; return 1 where a kernel spills."""
    print("\n".join([*uses(), "", *costs()]))
    every = (compiled(card, "bf16", rank, 64)[0] for card in CARDS for rank in RANKS)
    return int(any(use.spilled_bytes for use in every))


if __name__ == "__main__":
    sys.exit(main())
