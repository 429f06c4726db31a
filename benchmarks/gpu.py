"""Train LoRA on a random Llama-8B-shaped base made on the card, and print speed and memory.

The base never exists in host memory or on disk: every tensor is drawn and quantized on the card
through the product's own start. The steps are the trainer's own, with its packing, attention,
metrics and optimizer. Random weights cost what real ones cost, so the loss means nothing. Needs
torch, transformers, peft and bitsandbytes; no data, no tokenizer, no network.

    PYTHONPATH=. python benchmarks/gpu.py
    PYTHONPATH=. torchrun --nproc-per-node 8 benchmarks/gpu.py --strategy fsdp

MFU here is 4 FLOPs per token and base parameter (2 forward, 2 for the gradient of activations; a
frozen base has no weight gradient), over all parameters with the input embedding, as published
LoRA figures count. Attention scores, adapters, dequantizing and recomputation are not counted; a
second figure adds the causal attention scores.
"""

import argparse
import json
import os
import sys
import zlib
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from peft_dist.config import Recipe
from peft_dist.data.counts import SourceRows
from peft_dist.data.token_cache import TokenizedRows
from peft_dist.distributed import process_group
from peft_dist.distributed.world import World, read_world
from peft_dist.ledger.events import LedgerEvent, StepEvent
from peft_dist.metrics.mfu import FLOPS_PER_TOKEN_AND_PARAMETER, peak_flops
from peft_dist.model.architectures import bare_model, build_skeleton
from peft_dist.model.source import BaseSource
from peft_dist.model.weights import StoredTensor, WeightFiles
from peft_dist.model_setup import set_up_model
from peft_dist.trainer import Trainer
from peft_dist.worker.process import set_allocator

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

    def __init__(self, folder: Path, model: torch.nn.Module, device: torch.device) -> None:
        """Pretend that a folder holds every parameter of the model in bfloat16."""
        self.folder, self.files = folder, ()
        self._device = device
        self.tensors = {
            name: StoredTensor(self.folder, tuple(parameter.shape), "BF16")
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


class Steps:
    """Keeps the events of the steps."""

    def __init__(self) -> None:
        """Begin with none."""
        self.events: list[StepEvent] = []

    def write(self, event: LedgerEvent) -> None:
        """Take an event."""
        if isinstance(event, StepEvent):
            self.events.append(event)

    def close(self) -> None:
        """Nothing is open."""


def gigabytes(value: float) -> str:
    """Format bytes as decimal gigabytes."""
    return f"{value / 1e9:.2f} GB"


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("--shape", choices=SHAPES, default="llama-8b")
    made.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    made.add_argument("--strategy", choices=("ddp", "fsdp"), default="fsdp")
    made.add_argument("--rank", type=int, default=16, help="LoRA rank; alpha is twice that")
    made.add_argument("--fused", action="store_true", help="method.fused: auto")
    made.add_argument("--fp8", action="store_true", help="model.fp8: true")
    made.add_argument(
        "--dequantized", type=int, default=0, metavar="N", help="parallel.dequantized_blocks"
    )
    made.add_argument("--length", type=int, default=4096, help="tokens of the longest row")
    made.add_argument("--shortest", type=int, help="of the shortest; default: all are as long")
    made.add_argument("--rows", type=int, default=1, help="rows per GPU and step, packed")
    made.add_argument("--steps", type=int, default=15)
    made.add_argument("--activation-checkpointing", action="store_true")
    made.add_argument("--deterministic", action="store_true")
    made.add_argument("--attention", choices=("auto", "sdpa", "flash_attention_2"), default="auto")
    made.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a card not listed")
    made.add_argument("--json", type=Path, help="also write the figures to this file")
    return made


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    reader = parser()
    args = reader.parse_args(words)
    if args.steps <= SETTLING_STEPS:
        reader.error(f"--steps {args.steps}: give more than the {SETTLING_STEPS} settling steps")
    return args


def random_rows(args: argparse.Namespace, world: World) -> TokenizedRows:
    """Return random rows for all steps of all processes, every token a target."""
    source = np.random.default_rng(0)
    count = args.rows * world.size * args.steps
    lengths = source.integers(args.shortest or args.length, args.length + 1, count)
    total = int(lengths.sum())
    return TokenizedRows(
        tokens=source.integers(0, SHAPES[args.shape]["vocab_size"], total).astype(np.int32),
        trained=np.ones(total, dtype=np.bool_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        class_ids=None,
        label_names=(),
        pad_id=0,
        sources=(SourceRows("random", count, 0, 0, 0, 0, 0, ()),),
        fingerprint="",
    )


def make_trainer(args: argparse.Namespace, world: World, folder: Path) -> Trainer:
    """Start as a run starts, with a base that is drawn on the card.

    Args:
        args: The command line.
        world: This process's place; the process group has been started.
        folder: Gets the model's config.json.
    """
    config = LlamaConfig(
        **SHAPES[args.shape],
        max_position_embeddings=max(8192, args.length),
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    recipe = Recipe.model_validate(
        {
            "model": {"name": str(folder), "attention": args.attention, "fp8": args.fp8},
            "quantization": args.quantization,
            "method": {
                "kind": "lora",
                "rank": args.rank,
                "alpha": 2.0 * args.rank,
                "fused": "auto" if args.fused else "off",
            },
            "data": {"train": str(folder / "random.jsonl"), "max_length": args.length},
            "train": {
                "steps": args.steps,
                "global_batch_size": args.rows * world.size,
                "micro_batch_size": args.rows,
                "activation_checkpointing": args.activation_checkpointing,
                "deterministic": args.deterministic,
            },
            "parallel": {"strategy": args.strategy, "dequantized_blocks": args.dequantized},
        }
    )
    skeleton = build_skeleton(config, task="causal-lm", dtype=torch.bfloat16, attention="auto")
    files = RandomFiles(folder, skeleton, world.device)
    setup = set_up_model(recipe, world, BaseSource(files, None, folder))
    return Trainer(setup, random_rows(args, world), None)


def measure(args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Start, train and return the figures. Collective."""
    cuda = world.device.type == "cuda"
    with TemporaryDirectory(prefix="peft-dist-") as folder:
        trainer = make_trainer(args, world, Path(folder))
    setup, memory = trainer.setup, {}
    if cuda:
        memory = {
            "after_load": torch.cuda.memory_allocated(),
            "peak_load": torch.cuda.max_memory_allocated(),
        }
        torch.cuda.reset_peak_memory_stats()
    seen = Steps()
    trainer.trackers = [seen]
    trainer.run()
    if cuda:
        memory["peak_train"] = torch.cuda.max_memory_allocated()
        memory["peak_reserved"] = torch.cuda.max_memory_reserved()
        memory["allocator_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
    counted = {
        "base_parameters": setup.base_parameters,
        "base_bytes_expected": setup.engine.expected_bytes(setup.base),
        "base_bytes_per_rank": setup.base_bytes_by_rank,
    }
    found = figures(args, world, counted, seen.events) | counted
    found |= {"load_s": setup.load_seconds, "memory_bytes": memory, "processes": world.size}
    found |= {"attention": str(bare_model(setup.peft).config._attn_implementation)}
    found |= {"loss": [event.loss for event in seen.events]}
    return found | {"settings": {name: str(value) for name, value in vars(args).items()}}


def figures(
    args: argparse.Namespace, world: World, counted: dict[str, Any], events: list[StepEvent]
) -> dict[str, Any]:
    """Turn the events of the steps into tokens/s and MFU."""
    shape = SHAPES[args.shape]
    measured = events[SETTLING_STEPS:]
    step_s = median((event.tokens or 0) / event.tokens_per_s for event in measured)
    tokens_per_s = median(event.tokens_per_s for event in measured) / world.size
    base_flops = FLOPS_PER_TOKEN_AND_PARAMETER * counted["base_parameters"]
    # QK^T and PV, each 2 * length * hidden FLOPs a token and layer, half of it under the causal
    # mask; once forward, twice backward.
    length = (args.length + (args.shortest or args.length)) / 2
    attention_flops = 6 * length * shape["hidden_size"] * shape["num_hidden_layers"]
    result: dict[str, Any] = {"step_s": step_s, "tokens_per_s_per_gpu": tokens_per_s}
    listed = peak_flops(world.device_name)
    peak = args.peak_tflops or (None if listed is None else listed / 1e12)
    if peak is not None:
        result["mfu_4n"] = tokens_per_s * base_flops / (peak * 1e12)
        result["mfu_4n_and_attention"] = (
            tokens_per_s * (base_flops + attention_flops) / (peak * 1e12)
        )
    return result | {"device": world.device_name, "peak_tflops": peak}


def main() -> int:
    """Measure and print."""
    args = arguments()
    set_allocator(os.environ)
    world = read_world()
    process_group.start(world)
    report = measure(args, world)
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
