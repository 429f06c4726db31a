"""The 4-bit linear layer: bitsandbytes' bytes, cut at any row, with exact gradients."""

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from peft_dist.model.nf4 import FrozenLinear4bit, block_size_for, dequantize, quantize_rows


def weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)


def layer(rows: int, columns: int, *, bias: bool = False) -> FrozenLinear4bit:
    block_size = block_size_for(columns)
    assert block_size is not None
    made = FrozenLinear4bit(
        columns, rows, block_size=block_size, bias=bias, dtype=torch.float32, device="cpu"
    )
    made.packed.data, made.absmax.data = quantize_rows(weight(rows, columns), block_size)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize(("columns", "expected"), [(64, 64), (96, 32), (4096, 64), (72, None)])
def test_a_block_never_crosses_a_row(columns: int, expected: int | None) -> None:
    assert block_size_for(columns) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "block_size"), [(128, 64), (96, 32)])
def test_the_bytes_are_those_of_bitsandbytes(
    columns: int, block_size: int, dtype: torch.dtype
) -> None:
    full = weight(10, columns, dtype)
    packed, absmax = quantize_rows(full, block_size)
    expected, state = bnb.quantize_4bit(full, blocksize=block_size, quant_type="nf4")
    assert torch.equal(packed.reshape(-1, 1), expected)
    assert torch.equal(absmax.view(torch.float32).reshape(-1), state.absmax)
    assert packed.shape == (10, columns // 2)
    assert packed.dtype == absmax.dtype == torch.uint8
    back = dequantize(packed, absmax, block_size=block_size, dtype=dtype)
    assert torch.equal(back, bnb.dequantize_4bit(expected, state))


@settings(deadline=None)  # a busy machine is not a fault
@given(cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)), columns=st.sampled_from([64, 96]))
def test_some_rows_quantize_to_their_rows_of_the_whole(cuts: tuple[int, int], columns: int) -> None:
    start, stop = sorted(cuts)
    block_size = block_size_for(columns)
    assert block_size is not None
    full = weight(9, columns)
    for part, whole in zip(
        quantize_rows(full[start:stop], block_size), quantize_rows(full, block_size), strict=True
    ):
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_dense_weight(bias: bool) -> None:
    made = layer(24, 128, bias=bias)
    x = torch.randn(3, 5, 128, requires_grad=True)
    dense = x.detach().clone().requires_grad_()
    y, expected = made(x), functional.linear(dense, made.weight, made.bias)
    up = torch.randn_like(y)
    y.backward(up)
    expected.backward(up)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, dense.grad)


def test_the_packed_bytes_never_train() -> None:
    made = layer(8, 64, bias=True)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_an_evaluation_leaves_bytes_and_gradient_alone() -> None:
    # bitsandbytes' own layer repacks its weights at its first evaluation on some CPUs.
    made = layer(32, 128)
    before = made.packed.clone(), made.absmax.clone()

    def gradient() -> torch.Tensor:
        x = torch.ones(2, 128, requires_grad=True)
        made(x).sum().backward()
        assert x.grad is not None
        return x.grad

    first = gradient()
    made.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made(torch.ones(2, 128))
    made.train()
    assert torch.equal(first, gradient())
    assert torch.equal(made.packed, before[0])
    assert torch.equal(made.absmax, before[1])


def test_autocast_computes_in_its_dtype() -> None:
    made = layer(16, 64, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(torch.ones(1, 64)).dtype == torch.bfloat16
    assert made(torch.ones(1, 64)).dtype == torch.float32


def test_no_rows_and_no_memory_are_fine() -> None:
    packed, absmax = quantize_rows(torch.empty(0, 128), 64)
    assert packed.shape == (0, 64)
    assert absmax.shape == (0, 8)
    empty = FrozenLinear4bit(128, 7, block_size=64, bias=True, dtype=torch.bfloat16)
    assert empty.weight.is_meta
    assert empty.weight.shape == (7, 128)


def test_a_block_of_zeros_has_the_bytes_of_a_cpu_where_a_gpu_makes_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU multiplies by 1 / 0 there: no number, for which bitsandbytes' kernel has code 0."""
    full = weight(6, 128)
    full[1] = full[3, 64:] = 0.0
    on_cpu, quantize = quantize_rows(full, 64), bnb.quantize_4bit

    def on_gpu(rows: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, bnb.QuantState]:
        packed, state = quantize(rows, **kwargs)
        packed.view(-1, 32)[state.absmax == 0.0] = 0
        return packed, state

    monkeypatch.setattr(bnb, "quantize_4bit", on_gpu)
    for ours, theirs in zip(quantize_rows(full, 64), on_cpu, strict=True):
        assert torch.equal(ours, theirs)
    assert (on_cpu[0][1] == 0x77).all()


def test_no_rounding_of_a_reciprocal_changes_a_code_of_bfloat16_weights() -> None:
    """So a GPU's fast division packs the bytes that a CPU does: of every two bfloat16 values.

    Codes depend on value / absmax, of which there are few; none is so near to a bound between two
    codes that errors of some units in the last place matter.
    """
    mantissas = torch.arange(128, 256, dtype=torch.float64) / 128
    code = bnb.get_4bit_type("nf4", device="cpu").double()
    bounds = (code[1:] + code[:-1]) / 2
    nearest = 1.0
    for halvings in range(6):  # below 1/32 are no bounds but those around 0
        ratios = (mantissas[:, None] / 2**halvings) / mantissas
        ratios = ratios[ratios <= 1].flatten()
        for bound in bounds:
            nearest = min(nearest, float((ratios / abs(bound) - 1).abs().min()))
    assert nearest > 8 * torch.finfo(torch.float32).eps
