"""Train LoRA on a random Llama-8B-shaped base made on the card, and print speed and memory.

The base never exists in host memory or on disk: every tensor is drawn and quantized on the card
through the library's own loading path. Random weights cost what real ones cost, so the loss means
nothing. Needs torch, transformers, peft and bitsandbytes; no data, no tokenizer, no network.

    PYTHONPATH=. python benchmarks/gpu.py
    PYTHONPATH=. torchrun --nproc-per-node 8 benchmarks/gpu.py --strategy fsdp

MFU here is 4 FLOPs per token and base parameter (2 forward, 2 for the gradient of activations; a
frozen base has no weight gradient), over all parameters with the input embedding, as published
LoRA figures count. Attention scores, adapters, dequantizing and recomputation are not counted; a
second figure adds the causal attention scores.
"""

import argparse
import json
import sys
import time
import zlib
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig

from peft_dist.config.method import Lora
from peft_dist.data.pack import Batch
from peft_dist.distributed import process_group
from peft_dist.distributed.collectives import gather_objects
from peft_dist.distributed.world import World, read_world
from peft_dist.methods import BaseAccess
from peft_dist.methods.lora import LoraMethod
from peft_dist.metrics.mfu import FLOPS_PER_TOKEN_AND_PARAMETER, peak_flops
from peft_dist.model.architectures import build_skeleton, transformer_blocks
from peft_dist.model.base import fill_base, materialize
from peft_dist.model.loss import CausalLM
from peft_dist.model.plan import plan_base
from peft_dist.model.weights import Stored, WeightFiles
from peft_dist.sharding import ENGINES, Group

SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {  # runs on CPU: checks this file, measures nothing
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
SETTLING_STEPS = 3
"""First steps left out of the timing: kernels are chosen and memory pools grow in them."""


class RandomFiles(WeightFiles):
    """Stands where a model folder's files would: draws the rows of a tensor on the card."""

    def __init__(self, model: torch.nn.Module, device: torch.device) -> None:
        """Pretend to hold every parameter of the model in bfloat16."""
        self.folder, self.files = Path("random"), ()
        self._device = device
        self.tensors = {
            name: Stored(self.folder, tuple(parameter.shape), "BF16")
            for name, parameter in model.named_parameters()
        }

    def rows(self, key: str, start: int, stop: int, *, transposed: bool = False) -> torch.Tensor:
        """Draw rows [start, stop); norms are ones, as a fresh model has them."""
        shape = (stop - start, *self.tensors[key].shape[1:])
        rows = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if len(shape) == 1:
            return rows.fill_(1.0)
        seed = zlib.crc32(f"{key}:{start}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        return rows.normal_(0.0, 0.02, generator=generator)


def make_batch(
    *, rows: int, length: int, vocabulary: int, seed: int, device: torch.device
) -> Batch:
    """Return `rows` random rows of `length` tokens laid end to end, every token a target."""
    generator = torch.Generator().manual_seed(seed)
    total = rows * length
    ids = torch.randint(vocabulary, (total,), generator=generator)
    position = torch.arange(length).repeat(rows)
    predicting = torch.nonzero(position < length - 1).flatten()
    return Batch(
        input_ids=ids[None].to(device),
        position_ids=position[None].to(device),
        attention_mask=None,
        label_positions=predicting.to(device),
        targets=ids[predicting + 1].to(device),
        target_rows=(predicting // length).to(device),
        n_rows=rows,
        n_tokens=total,
        row_lengths=(length,) * rows,
        row_bounds=torch.arange(rows + 1, dtype=torch.int32, device=device) * length,
    )


def gigabytes(value: float) -> str:
    """Format bytes as decimal gigabytes."""
    return f"{value / 1e9:.2f} GB"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--strategy", choices=("ddp", "fsdp"), default="fsdp")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; alpha is twice that")
    parser.add_argument("--length", type=int, default=4096, help="tokens of one row")
    parser.add_argument("--rows", type=int, default=1, help="rows per GPU and step, packed")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument(
        "--attention", choices=("auto", "sdpa", "flash_attention_2"), default="auto"
    )
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a card not listed")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    if args.steps <= SETTLING_STEPS:
        parser.error(f"--steps {args.steps}: give more than the {SETTLING_STEPS} settling steps")
    return args


def build(args: argparse.Namespace, world: World) -> tuple[Any, CausalLM, dict[str, Any]]:
    """Make base and adapters on the card; return the engine, the model and what was counted."""
    cuda = world.device.type == "cuda"
    config = LlamaConfig(
        **SHAPES[args.shape],
        max_position_embeddings=max(8192, args.length),
        tie_word_embeddings=False,
    )
    skeleton = build_skeleton(
        config,
        task="causal-lm",
        dtype=torch.bfloat16 if cuda else torch.float32,
        attention=args.attention,
    )
    if args.activation_checkpointing:
        skeleton.gradient_checkpointing_enable({"use_reentrant": False})
    files = RandomFiles(skeleton, world.device)
    plan = plan_base(skeleton, files, quantization=args.quantization)
    base = dict(skeleton.named_parameters())
    names = {id(parameter): name for name, parameter in base.items()}
    method = LoraMethod(Lora(rank=args.rank, alpha=2.0 * args.rank))
    adapted = method.attach(skeleton, task="causal-lm", base_name="random", has_conv1d=False)
    # PEFT moves a base linear under `.base_layer`; the plan knows it by its own name.
    wrapped_name = {
        name: names[id(parameter)]
        for name, parameter in adapted.named_parameters()
        if id(parameter) in names
    }
    model = CausalLM(adapted)
    engine = ENGINES[args.strategy](world, shard_size=world.size)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    engine.wrap(model, transformer_blocks(skeleton).values(), trained)
    materialize(model, world.device)
    now = dict(adapted.named_parameters())
    base = {plain: now[name] for name, plain in wrapped_name.items()}
    fill_base(base, plan, files, engine.shard, device=world.device)
    nothing_to_read = BaseAccess(
        engine.full_tensor, engine.copy_into, lambda _: None, lambda _: [], lambda _: None
    )
    method.initialise(adapted, nothing_to_read)
    adapter = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    engine.flatten_adapter(adapter, lambda _: Group(decays=True, rate_factor=1.0))
    parameters = 0
    for tensor in plan.tensors:
        parameters += torch.Size(tensor.shape).numel()
    counted = {
        "base_parameters": parameters,
        "base_bytes_expected": engine.expected_bytes(base),
        "base_bytes_per_rank": gather_objects(engine.resident_bytes(base)),
    }
    return engine, model, counted


def train(
    args: argparse.Namespace, world: World, engine: Any, model: CausalLM
) -> tuple[list[float], list[float]]:
    """Take the steps; return the seconds of each and the losses."""
    cuda = world.device.type == "cuda"
    model.train()
    flat = list(engine.flat_parameters().values())
    optimizer = torch.optim.AdamW(flat, lr=1e-4, weight_decay=0.0, fused=True)
    autocast = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
    vocabulary = SHAPES[args.shape]["vocab_size"]
    seconds, losses = [], []
    for step in range(args.steps):
        batch = make_batch(
            rows=args.rows,
            length=args.length,
            vocabulary=vocabulary,
            seed=step * world.size + world.rank,
            device=world.device,
        )
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with autocast:
            loss = model(batch).nll.mean() / world.size
        loss.backward()
        engine.reduce(torch.zeros(engine.extras, device=world.device))
        engine.clip(1.0)
        optimizer.step()
        engine.zero_gradients()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(loss.item())
    return seconds, losses


def figures(
    args: argparse.Namespace, counted: dict[str, Any], seconds: list[float]
) -> dict[str, Any]:
    """Turn measured seconds into tokens/s and MFU."""
    shape = SHAPES[args.shape]
    step_s = median(seconds[SETTLING_STEPS:])
    tokens_per_s = args.rows * args.length / step_s
    base_flops = FLOPS_PER_TOKEN_AND_PARAMETER * counted["base_parameters"]
    # QK^T and PV, each 2 * length * hidden FLOPs a token and layer, half of it under the causal
    # mask; once forward, twice backward.
    attention_flops = 6 * args.length * shape["hidden_size"] * shape["num_hidden_layers"]
    result = {"step_s": step_s, "tokens_per_s_per_gpu": tokens_per_s}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    listed = peak_flops(name)
    peak = args.peak_tflops or (None if listed is None else listed / 1e12)
    if peak is not None:
        result["mfu_4n"] = tokens_per_s * base_flops / (peak * 1e12)
        result["mfu_4n_and_attention"] = (
            tokens_per_s * (base_flops + attention_flops) / (peak * 1e12)
        )
    return result | {"device": name, "peak_tflops": peak}


def main() -> int:
    """Build, train and print."""
    args = arguments()
    world = read_world()
    process_group.start(world)
    cuda = world.device.type == "cuda"
    started = time.perf_counter()
    engine, model, counted = build(args, world)
    load_s = time.perf_counter() - started
    memory: dict[str, int] = {}
    if cuda:
        memory["after_load"] = torch.cuda.memory_allocated()
        memory["peak_load"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = train(args, world, engine, model)
    if cuda:
        memory["peak_train"] = torch.cuda.max_memory_allocated()
        memory["peak_reserved"] = torch.cuda.max_memory_reserved()
    report = figures(args, counted, seconds) | counted
    report |= {"load_s": load_s, "memory_bytes": memory, "loss": losses, "seconds": seconds}
    report |= {"settings": {k: str(v) for k, v in vars(args).items()}, "processes": world.size}
    if world.is_main:
        print_report(args, report)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
    process_group.stop()
    return 0


def print_report(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the figures, one a line."""
    print(
        f"{args.shape}, {args.quantization} + LoRA r={args.rank} on all linears, {args.strategy} on"
        f" {report['processes']} x {report['device']}, {args.rows} x {args.length} tokens per GPU,"
        f" activation checkpointing {'on' if args.activation_checkpointing else 'off'}"
    )
    print(
        f"tokens/s/GPU      {report['tokens_per_s_per_gpu']:.0f}  ({report['step_s']:.3f} s/step)"
    )
    if report["peak_tflops"]:
        print(
            f"MFU               {report['mfu_4n']:.1%} (4N of {report['base_parameters']:,}),"
            f" {report['mfu_4n_and_attention']:.1%} with causal attention,"
            f" of {report['peak_tflops']:g} TFLOP/s"
        )
    held = max(report["base_bytes_per_rank"])
    print(f"base per GPU      {gigabytes(held)} (from shapes: {report['base_bytes_expected']:,} B)")
    for name, value in report["memory_bytes"].items():
        print(f"memory {name:10} {gigabytes(value)}")
    print(f"load              {report['load_s']:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
