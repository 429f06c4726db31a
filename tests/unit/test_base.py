"""Planning and loading the base: what is refused before a weight is read, and what is loaded."""

import json
import shlex
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import ModelError
from peft_dist.distributed.collectives import Shard
from peft_dist.model import architectures
from peft_dist.model.fill_base import fill_base, materialize, read_rows
from peft_dist.model.nf4 import FrozenLinear4bit
from peft_dist.model.plan import BasePlan, plan_base
from peft_dist.model.weights import WeightFiles, model_folder
from tests.tiny import ARCHITECTURES, tiny_model

CPU = torch.device("cpu")


def task_of(architecture: str) -> str:
    return "sequence-classification" if architecture == "bert" else "causal-lm"


def planned(
    folder: Path, *, task: str = "causal-lm", quantization: str = "nf4"
) -> tuple[torch.nn.Module, WeightFiles, BasePlan]:
    """Do all that happens before weights are read."""
    config = architectures.read_config(folder, task=task)
    files = WeightFiles(folder)
    model = architectures.build_skeleton(config, task=task, dtype=torch.float32, attention="auto")
    return model, files, plan_base(model, files, quantization=quantization)


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace or remove tensors of a saved model, named with dots as double underscores."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."))
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny_model(tmp_path / "llama", "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_has_a_source_and_every_block_linear_is_swapped(
    tmp_path: Path, architecture: str, quantization: str
) -> None:
    tiny_model(tmp_path, architecture)
    task = task_of(architecture)
    model, files, plan = planned(tmp_path, task=task, quantization=quantization)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert {tensor.key for tensor in plan.tensors} == files.tensors.keys()
    filled = {name for tensor in plan.tensors for name in tensor.parameters()}
    assert filled == dict(model.named_parameters()).keys()
    assert plan.fresh == plan.warnings == ()
    blocks = architectures.transformer_blocks(model)
    assert len(blocks) == 2
    for block in blocks.values():
        kinds = {type(m) for m in block.modules()}
        left = kinds & {torch.nn.Linear, Conv1D}
        assert (FrozenLinear4bit in kinds) == (quantization == "nf4")
        assert bool(left) == (quantization == "none")


@pytest.mark.usefixtures("alone")
def test_a_tied_matrix_is_read_once(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen2")
    model, files, plan = planned(tmp_path)
    materialize(model, CPU)
    fill_base(dict(model.named_parameters()), plan, files, Shard(0, 1), device=CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [t.name for t in plan.tensors if "embed" in t.name or "head" in t.name] == [
        "model.embed_tokens.weight"
    ]


def test_a_file_with_both_names_of_a_tied_matrix_is_fine(tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen2")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert len(planned(tmp_path)[2].tensors) == len(tensors) - 1


def test_a_classifier_that_is_not_stored_is_fresh(tmp_path: Path) -> None:
    tiny_model(tmp_path, "bert", trunk_only=True)
    _, files, plan = planned(tmp_path, task="sequence-classification")
    assert plan.fresh == ("classifier.weight", "classifier.bias")
    assert all(tensor.name == f"bert.{tensor.key}" for tensor in plan.tensors)
    assert len(plan.tensors) == len(files.tensors)


def test_old_names_of_norms_are_found(tmp_path: Path) -> None:
    tiny_model(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file)
    _, _, plan = planned(tmp_path, task="sequence-classification")
    assert {tensor.key for tensor in plan.tensors} == renamed.keys()


def test_quantized_rows_of_two_shards_are_those_of_one(llama: Path) -> None:
    wholes = {}
    for count in (1, 2):
        for index in range(count):
            model, files, plan = planned(llama)
            shard = Shard(index, count)
            for tensor in plan.tensors:
                for name, part in zip(
                    tensor.parameters(), read_rows(tensor, files, shard, CPU), strict=True
                ):
                    wholes.setdefault((count, name), []).append(part)
    for (count, name), parts in wholes.items():
        if count == 2:
            assert torch.equal(torch.cat(parts), wholes[1, name][0]), name


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("double", [False, True])
def test_a_packed_checkpoint_has_the_weights_bitsandbytes_computes_with(
    llama: Path, tmp_path: Path, double: bool
) -> None:
    quantizer = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    theirs = AutoModelForCausalLM.from_pretrained(llama, quantization_config=quantizer)
    theirs.save_pretrained(tmp_path / "packed")
    model, files, plan = planned(tmp_path / "packed")
    materialize(model, CPU)
    fill_base(dict(model.named_parameters()), plan, files, Shard(0, 1), device=CPU)
    compared = 0
    for name, module in theirs.named_modules():
        if isinstance(module, Linear4bit):
            expected = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
            found = model.get_submodule(name)
            assert isinstance(found, FrozenLinear4bit)
            torch.testing.assert_close(found.weight, expected.float(), rtol=0, atol=0)
            compared += 1
    assert compared == 14


def refused(folder: Path, expected: str, **options: str) -> None:
    with pytest.raises(ModelError) as caught:
        planned(folder, **options)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unsupported_architecture_is_named_with_the_supported_ones(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    refused(tmp_path, "architecture 'vit' is not supported for causal-lm; `peft-dist models` lists")
    refused(
        tmp_path,
        "'vit' is not supported for sequence-classification",
        task="sequence-classification",
    )


@pytest.mark.parametrize("text", [None, "{", '{"model_type": "never-heard-of-it"}', "[]", "{}"])
def test_a_config_that_says_nothing_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    refused(tmp_path, "model.name: config.json")


def test_a_missing_tensor_is_named(llama: Path) -> None:
    change_tensors(llama, model__layers__1__mlp__up_proj__weight=None)
    refused(llama, "no tensor for model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_wrong_shape_is_named_with_both(llama: Path, quantization: str) -> None:
    change_tensors(llama, model__layers__1__mlp__up_proj__weight=torch.zeros(127, 64))
    refused(
        llama,
        "model.layers.1.mlp.up_proj.weight has shape [127, 64] in the file, "
        "but config.json says [128, 64]",
        quantization=quantization,
    )


def test_integers_are_no_weights(llama: Path) -> None:
    change_tensors(
        llama, model__layers__0__mlp__up_proj__weight=torch.zeros(128, 64, dtype=torch.int8)
    )
    refused(llama, "model.layers.0.mlp.up_proj.weight is stored as I8")


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000])
def test_a_truncated_file_is_named(llama: Path, kept: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(llama, f"{file} is not a readable safetensors file")


def test_a_missing_file_of_several_is_named(tmp_path: Path) -> None:
    tiny_model(tmp_path, "llama", max_shard_size="60KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[3]
    gone.unlink()
    refused(tmp_path, f"{gone} does not exist")


def test_an_index_that_is_none_is_named(llama: Path) -> None:
    for text in ("{", "[]", "{}"):
        (llama / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        refused(llama, "is not a safetensors index")


def test_a_folder_without_safetensors_is_refused(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, "holds .bin files, which are programs to whoever loads them; where you trust")
    (llama / "pytorch_model.bin").unlink()
    refused(llama, "the model must be stored as safetensors")


def test_the_command_for_bin_files_makes_of_them_what_is_read(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_file(llama / "model.safetensors")
    torch.save(before, llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        WeightFiles(llama)
    python, option, code, folder = shlex.split(str(caught.value).rpartition("them: ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", folder])
    exec(code, {})
    after = {name: WeightFiles(llama).full_tensor(name) for name in WeightFiles(llama).tensors}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_packed_weights_are_not_taken_for_full_ones(llama: Path, tmp_path: Path) -> None:
    quantizer = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(llama, quantization_config=quantizer)
    packed.save_pretrained(tmp_path / "packed")
    refused(
        tmp_path / "packed",
        "is stored in 4 bits, but quantization none needs it in full; set quantization: nf4",
        quantization="none",
    )


def test_packed_blocks_that_cross_rows_are_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "odd", "llama", hidden_size=96, num_attention_heads=3,
               num_key_value_heads=3)  # fmt: skip
    quantizer = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "odd", quantization_config=quantizer)
    packed.save_pretrained(tmp_path / "packed")
    refused(tmp_path / "packed", "which cross rows, so its rows cannot be sharded")


def test_a_model_that_is_nowhere_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (str(tmp_path / "absent"), "nobody/nothing", "a b c"):
        with pytest.raises(ModelError, match="is neither a folder here nor a hub model") as caught:
            model_folder(name, None)
        assert "\n" not in str(caught.value)


def test_the_vocabulary_size_in_config_must_be_the_stored_one(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    (llama / "config.json").write_text(json.dumps(config | {"vocab_size": 7}), encoding="utf-8")
    refused(llama, "model.embed_tokens.weight has shape [320, 64] in the file")


def test_a_model_that_another_quantizer_computes_is_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "online"}
    (llama / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(llama, "the model is stored for the quantizer bitnet; use its full-precision version")


def test_rows_up_to_a_length_have_rotary_positions_of_their_own() -> None:
    changing = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", max_position_embeddings=64, rope_parameters=changing)
    assert architectures.rope_limit(config) == 64
    assert architectures.rope_limit(AutoConfig.for_model("llama")) is None
