"""A base that was released quantized has the values that its own quantizer gives it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from peft_dist.common.errors import ModelError
from peft_dist.distributed.world import World
from peft_dist.entrypoints.check_models import _difference, build_tiny
from peft_dist.model.prequantized import FP4, Dequantized, quantized_weights
from peft_dist.model.source import find_base
from peft_dist.model.weights import WeightFiles
from peft_dist.model_setup import set_up_model
from tests.tiny import tiny_model, tiny_recipe

Tensors = dict[str, torch.Tensor]
Quantizer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]
"""From the name of a weight and its values, what is stored, and the values that it stands for."""


def fp8_blocks(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    scales = torch.rand(-(-rows // 24), -(-columns // 48)) + 0.5
    codes = (weight * 8).to(torch.float8_e4m3fn)
    blocks = scales.repeat_interleave(24, 0)[:rows].repeat_interleave(48, 1)[:, :columns]
    return {name: codes, f"{name}_scale_inv": scales}, codes.float() * blocks


def fp8_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales


def fp8_whole(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    more = {name.replace("weight", "input_scale"): torch.tensor(1.0)}
    return {name: codes, f"{name}_scale": scale, **more}, codes.float() * scale


def int8_rows(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    return {name: codes, f"{name}_scale": scales}, codes.float() * scales


def integer_groups(name: str, weight: torch.Tensor, *, bits: int) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    half, of_word = 1 << (bits - 1), 32 // bits
    grouped = weight.view(rows, columns // 32, 32)
    scales = grouped.abs().amax(2) / (half - 1)
    codes = (grouped / scales[..., None]).round().to(torch.int64).clamp(-half, half - 1)
    words = ((codes.view(rows, -1, of_word) + half) << (bits * torch.arange(of_word))).sum(2)
    packed = torch.from_numpy(words.numpy().astype(np.uint32).view(np.int32))
    stored = {
        f"{name}_packed": packed,
        f"{name}_scale": scales,
        f"{name}_shape": torch.tensor([rows, columns]),
    }
    return stored, (codes * scales[..., None]).view(rows, columns)


def fp4(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes and values of what is nearest, low half first."""
    table = torch.tensor(FP4)
    codes = (values[..., None] - table).abs().argmin(-1)
    pairs = codes.view(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8), table[codes]


def nvfp4(name: str, weight: torch.Tensor, *, of: str) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // 16, 16)
    whole = torch.tensor([0.01])
    scales = (grouped.abs().amax(2) / 6 / whole).to(torch.float8_e4m3fn)
    factors = (
        scales.float()[..., None] * whole
        if of == "modelopt"
        else scales.float()[..., None] / (1 / whole)
    )
    packed, values = fp4(grouped / factors)
    packed, values = packed.view(rows, columns // 2), (values * factors).view(rows, columns)
    if of == "modelopt":
        return {name: packed, f"{name}_scale": scales, f"{name}_scale_2": whole[0]}, values
    stored = {f"{name}_packed": packed, f"{name}_scale": scales, f"{name}_global_scale": 1 / whole}
    return stored, values


def mxfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    grouped = weight.view(rows, columns // 32, 32)
    powers = torch.floor(torch.log2(grouped.abs().amax(2))) - 2
    packed, values = fp4(grouped / torch.exp2(powers)[..., None])
    stored = {
        f"{name}_packed": packed.view(rows, columns // 2),
        f"{name}_scale": (powers + 127).to(torch.uint8),
    }
    return stored, (values * torch.exp2(powers)[..., None]).view(rows, columns)


def gpt_oss(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Return experts [E, in, out] as [E, out, groups, bytes]."""
    experts, columns, rows = weight.shape
    stored, values = mxfp4(name, weight.transpose(1, 2).reshape(-1, columns))
    return {
        f"{name}_blocks": stored[f"{name}_packed"].view(experts, rows, columns // 32, 16),
        f"{name}_scales": stored[f"{name}_scale"].view(experts, rows, columns // 32),
    }, values.view(experts, rows, columns).transpose(1, 2).contiguous()


QUANTIZERS: dict[str, tuple[str, Quantizer]] = {
    "fp8-blocks": ("fp8", fp8_blocks),
    "fp8-rows": ("compressed-tensors", fp8_rows),
    "fp8-whole": ("modelopt", fp8_whole),
    "int8": ("compressed-tensors", int8_rows),
    "int4": ("compressed-tensors", partial(integer_groups, bits=4)),
    "int8-packed": ("compressed-tensors", partial(integer_groups, bits=8)),
    "nvfp4": ("compressed-tensors", lambda name, w: nvfp4(name, w, of="compressed-tensors")),
    "nvfp4-modelopt": ("modelopt", lambda name, w: nvfp4(name, w, of="modelopt")),
    "mxfp4": ("compressed-tensors", mxfp4),
    "gpt-oss": ("mxfp4", gpt_oss),
}


def requantize(folder: Path, kind: str) -> Tensors:
    """Store the linears of a model's blocks as a quantizer does; return their values."""
    method, quantize = QUANTIZERS[kind]
    stored: Tensors = {}
    values: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() == (3 if kind == "gpt-oss" else 2) and "_proj" in name:
            more, values[name] = quantize(name, tensor)
            stored |= more
        else:
            stored[name] = tensor
    save_file({n: t.contiguous() for n, t in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    facts = {"quant_method": method} | (
        {"weight_block_size": [24, 48]} if kind == "fp8-blocks" else {}
    )
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    return values


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind != "gpt-oss"])
def test_rows_have_the_values_of_the_quantizer(tmp_path: Path, kind: str) -> None:
    tiny_model(tmp_path, "llama")
    expected = requantize(tmp_path, kind)
    found, used = quantized_weights(WeightFiles(tmp_path))
    assert found.keys() == expected.keys()
    assert not [key for key in WeightFiles(tmp_path).tensors.keys() - used if "_proj" in key]
    for name, values in expected.items():
        assert found[name].shape == values.shape
        for start, stop in ((0, len(values)), (7, 31), (len(values) - 1, len(values)), (5, 5)):
            torch.testing.assert_close(found[name].rows(start, stop), values[start:stop])


def test_experts_of_gpt_oss_have_the_values_that_transformers_gives_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = torch.randint(256, (5, 12, 3, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (5, 12, 3), dtype=torch.uint8)
    save_file({"x.down_proj_blocks": blocks, "x.down_proj_scales": scales},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text("{}")
    found, used = quantized_weights(WeightFiles(tmp_path))
    assert used == {"x.down_proj_blocks", "x.down_proj_scales"}
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert found["x.down_proj"].shape == expected.shape
    torch.testing.assert_close(found["x.down_proj"].rows(1, 4), expected[1:4])


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_what_bitsandbytes_keeps_has_its_own_values(tmp_path: Path, kind: str) -> None:
    tiny_model(tmp_path / "model", "llama")
    quantizer = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    )
    packed: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=quantizer, device_map="cpu"
    )
    packed.save_pretrained(tmp_path / kind)
    found, used = quantized_weights(WeightFiles(tmp_path / kind))
    assert len(found) == 14
    assert not [key for key in WeightFiles(tmp_path / kind).tensors.keys() - used if "_proj" in key]
    for name, weight in found.items():
        layer: Any = packed.get_submodule(name.removesuffix(".weight"))
        state = layer.state if kind == "int8" else None
        expected = dequantize_bnb_weight(layer.weight, state).float()
        torch.testing.assert_close(weight.rows(3, 17), expected[3:17], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("model_type", "kind", "quantization"),
    [
        ("llama", "fp8-blocks", "none"),
        ("qwen3_moe", "nvfp4", "none"),
        ("gpt_oss", "gpt-oss", "nf4"),
    ],
)
def test_a_quantized_release_trains_as_its_twin_in_full(
    tmp_path: Path, alone: World, model_type: str, kind: str, quantization: str
) -> None:
    build_tiny(model_type).save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = requantize(tmp_path / "model", kind)
    original = load_file(tmp_path / "model" / "model.safetensors")
    twin = tmp_path / "twin"
    twin.mkdir()
    rest = {
        n: t for n, t in original.items() if n in dict(plain.state_dict()) and n not in expected
    }
    plain.config.save_pretrained(twin)
    save_file({**rest, **expected}, twin / "model.safetensors", metadata={"format": "pt"})
    setups = []
    for folder in (tmp_path / "model", twin):
        recipe = tiny_recipe(folder, folder / "none.jsonl", quantization=quantization)
        setups.append(set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache")))
    quantized, full = setups
    assert quantized.released_fingerprint == full.released_fingerprint
    if quantization == "none":
        plain = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
        assert _difference(quantized, plain) is None


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_codes_that_rows_cannot_be_read_from_are_refused_with_the_way_out(
    tmp_path: Path, alone: World, method: str
) -> None:
    tiny_model(tmp_path / "model", "llama")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    facts: dict[str, Any] = {"quantization_config": {"quant_method": method, "bits": 4}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | facts))
    recipe = tiny_recipe(tmp_path / "model", tmp_path / "none.jsonl")
    with pytest.raises(ModelError, match=f"{method}; use its full-precision version") as caught:
        set_up_model(recipe, alone, find_base(recipe, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_no_more_rows_are_read_than_are_kept(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama")
    requantize(tmp_path, "nvfp4")
    files = WeightFiles(tmp_path)
    read: list[int] = []
    whole = files.rows

    def rows(key: str, start: int, stop: int, **more: bool) -> torch.Tensor:
        read.append(stop - start)
        return whole(key, start, stop, **more)

    files.rows = rows  # type: ignore[method-assign]
    weight: Dequantized = next(iter(quantized_weights(files)[0].values()))
    weight.rows(4, 9)
    assert set(read) == {5}
