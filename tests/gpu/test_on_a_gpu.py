"""What only a CUDA device can show; skips itself without one.

World size 1, so that one card is enough: the wrapping, the kernels and the memory are the same.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from peft_dist.data.pack import pack
from peft_dist.data.token_cache import TokenizedRows, tokenize_rows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.methods.fused import Shape, find_problem
from peft_dist.metrics.mfu import peak_flops
from peft_dist.model.nf4 import dequantize, quantize_rows
from peft_dist.model.source import find_base
from peft_dist.model.weights import WeightFiles
from peft_dist.model_setup import ModelSetup, set_up_model
from peft_dist.sharding.compute_timer import ComputeTimer
from peft_dist.trainer import Trainer
from tests.equivalence.cases import Recorder
from tests.tiny import tiny_model, tiny_recipe, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = [{"text": "the quick brown fox jumps over the lazy dog " * (1 + n % 3)} for n in range(32)]


@pytest.fixture
def world() -> Iterator[World]:
    place = read_world()
    assert place.device.type == "cuda"
    process_group.start(place)
    yield place
    process_group.stop()


def opened(
    tmp_path: Path, world: World, *, strategy: str, quantization: str
) -> tuple[ModelSetup, TokenizedRows, Path]:
    model = tmp_path / "model"
    tiny_model(model, "llama")
    recipe = tiny_recipe(
        model,
        write_jsonl(tmp_path / "rows.jsonl", ROWS),
        model={"name": str(model), "dtype": "bfloat16"},
        quantization=quantization,
        parallel={"strategy": strategy},
        train={"steps": 5, "global_batch_size": 4, "learning_rate": 1e-2},
    )
    rows = tokenize_rows(recipe, "train", tmp_path / "cache")
    return set_up_model(recipe, world, find_base(recipe, tmp_path / "cache")), rows, model


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_nf4_agrees_with_a_bf16_model_of_the_same_weights(
    tmp_path: Path, world: World, strategy: str
) -> None:
    setup, rows, model = opened(tmp_path, world, strategy=strategy, quantization="nf4")
    batch = pack(rows, torch.arange(4).numpy(), packing=True).to(world.device)
    with torch.no_grad(), setup.autocast():
        ours = setup.model(batch).nll
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(world.device)
    files = WeightFiles(model)
    with torch.no_grad():
        for name, parameter in setup.base.items():
            if not name.endswith(".packed"):
                continue
            plain = name.removeprefix("base_model.model.").replace(".base_layer.packed", ".weight")
            packed, absmax = quantize_rows(files.full_tensor(plain).to(world.device), 64)
            assert torch.equal(packed, local(parameter)), plain
            weight = dequantize(packed, absmax, block_size=64, dtype=torch.bfloat16)
            reference.get_parameter(plain).copy_(weight)
        # With a cache transformers would not look for rows in the positions.
        logits = reference(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        ).logits
    picked = logits[0, batch.label_positions].float()
    theirs = torch.nn.functional.cross_entropy(picked, batch.targets, reduction="none")
    assert torch.allclose(ours, theirs, atol=0.05), (ours - theirs).abs().max()


def test_a_gpu_packs_weights_of_bfloat16_to_the_bytes_of_a_cpu() -> None:
    """Of float32, some codes in a million may differ: it divides by a reciprocal of less digits."""
    full = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    full[7] = full[9, :64] = 0.0
    full = full.to(torch.bfloat16)
    for on_cpu, on_gpu in zip(quantize_rows(full, 64), quantize_rows(full.cuda(), 64), strict=True):
        assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_updated_while_they_are_dequantized(dtype: torch.dtype) -> None:
    shapes = [Shape(130, 192, 64, 8), Shape(65, 416, 32, 70), Shape(4096, 14336, 64, 16)]
    assert [find_problem(shape, torch.device("cuda", 0), dtype) for shape in shapes] == [""] * 3


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_the_packed_base_is_byte_exact_after_a_wrap_and_some_steps(
    tmp_path: Path, world: World, strategy: str
) -> None:
    setup, rows, _ = opened(tmp_path, world, strategy=strategy, quantization="nf4")
    before = {name: local(parameter).clone() for name, parameter in setup.base.items()}
    adapter = setup.engine.adapter_state()
    outcome = Trainer(setup, rows, None).run()
    assert outcome.final_loss == outcome.final_loss
    setup.check_integrity()
    for name, parameter in setup.base.items():
        assert torch.equal(before[name], local(parameter)), name
    moved = setup.engine.adapter_state()
    assert any(not torch.equal(adapter[name], moved[name]) for name in adapter)


def test_the_time_of_a_step_is_the_devices_and_is_not_waited_for() -> None:
    own, cycles = ComputeTimer(torch.device("cuda")), 200_000_000  # about 0.1 s
    own.begin()
    torch.cuda._sleep(cycles)
    with own.gathering():
        torch.cuda._sleep(5 * cycles)
    own.end()
    assert own.latest_s() is None, "the device has not come to it"
    torch.cuda.synchronize()
    found_s = own.latest_s()
    assert found_s is not None
    assert 0.05 < found_s < 0.3


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_records_have_time_memory_and_mfu_of_the_device(
    tmp_path: Path, world: World, strategy: str
) -> None:
    setup, rows, _ = opened(tmp_path, world, strategy=strategy, quantization="nf4")
    trainer, records = Trainer(setup, rows, None), Recorder()
    trainer.trackers = [records]
    trainer.run()
    assert [len(record["rank_memory_bytes"]) for record in records.records] == [1] * 5
    peak = torch.cuda.max_memory_allocated()
    assert records.records[-1]["rank_memory_bytes"][0] <= 1.001 * peak
    assert all(record["rank_step_s"][0] > 0 for record in records.records[3:])
    known = peak_flops(world.device_name) is not None
    assert all((record["mfu"] is not None) == known for record in records.records)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_memory_after_loading_is_the_bytes_that_were_counted(
    tmp_path: Path, world: World, quantization: str
) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    setup, _, _ = opened(tmp_path, world, strategy="ddp", quantization=quantization)
    held = torch.cuda.memory_allocated() - before
    trained = sum(parameter.numel() for parameter in setup.adapter.values())
    counted = setup.base_bytes_total + 2 * 4 * trained  # values and gradients, float32
    # CUDA hands memory out in 512-byte pieces, so every small tensor may cost one more.
    tensors = len(setup.base) + len(list(setup.model.buffers())) + 8
    assert counted <= held <= counted + tensors * 1024 + (1 << 20)
