"""Train one QLoRA run with TRL's SFTTrainer, timed; torchrun starts one copy per process.

It is the peer of `peers.py` and `checkpoints.py` and never imports `peft_dist`. It evaluates
nothing, and saves only where `--save-every` says so.

How TRL 1.16 is set up so that it runs as fast as it can on CPU, each choice timed on the same rows:
- No gradient checkpointing: TRL turns it on by default; recomputing costs time and the model fits.
- `ddp_find_unused_parameters=False`: transformers turns it on when checkpointing is off; every
  adapter is used in every step, so the search is a waste.
- `padding_free=True`: one row of tokens without padding. TRL documents it for flash attention
  only, but with position_ids and no mask, transformers builds the block-diagonal mask for sdpa,
  and the loss agrees with `--layout padded`. `packing=True` is left out: it would put an unknown
  number of rows in a step, so the global batch would no longer be the same.
- Adapters are cast back to float32: TRL puts those of a 4-bit base in bfloat16, which is slower
  than float32 on a CPU without AMX and is not the arithmetic the other side is asked for.
- Its fused LM head scores every position on CPU (only labelled ones on Triton devices); no option
  changes that, so part of a CPU ratio is this and does not carry over to GPUs.
- No torch.compile: its first step takes tens of seconds and packed lengths recompile.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import load_dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


class StepClock(TrainerCallback):
    """Note the wall-clock time at which each step has ended, and how long each save took."""

    def __init__(self) -> None:
        """Start with no step done."""
        self.ended: list[float] = []
        self.saves: list[dict[str, float]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long training stood still, and how much was written."""
        stall_s = time.time() - self.ended[-1]
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self.saves.append({"stall_s": stall_s, "bytes": size})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append now; the optimizer has stepped and the loss is not yet logged."""
        self.ended.append(time.time())


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of the distinct storages behind `tensors`."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


def base_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all frozen parameters with their 4-bit scales and code books."""
    tensors = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            continue
        tensors.append(parameter.data)
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [v for v in state.as_dict(packed=False).values() if torch.is_tensor(v)]
    return storage_bytes(tensors)


def assert_base_not_repacked(model: torch.nn.Module) -> None:
    """Check that bitsandbytes left the 4-bit weights in the layout that its backward reads.

    On CPUs with AVX512_BF16, `Linear4bit` repacks its weights at the first forward in eval mode
    and later training is silently wrong; a run where that happened is no peer.
    """
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        assert not getattr(state, "packing_format_for_cpu", False), (
            f"{name} was repacked for inference"
        )


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--rows", required=True, help="JSONL file of prompt/completion rows")
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--global-batch", type=int, required=True, help="rows per step, all ranks")
    parser.add_argument("--save-every", type=int, default=0, help="steps; 0: never")
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--layout", choices=("padding-free", "padded"), default="padding-free")
    parser.add_argument(
        "--adapters",
        choices=("compute", "trl"),
        default="compute",
        help="adapter dtype: as --compute, or bfloat16 as TRL leaves them",
    )
    return parser.parse_args()


def config(args: argparse.Namespace, world_size: int) -> SFTConfig:
    """Return TRL's settings for this benchmark."""
    return SFTConfig(
        output_dir=str(args.out.parent / "trl-output"),
        use_cpu=True,
        ddp_backend="gloo",
        max_steps=args.steps,
        per_device_train_batch_size=args.global_batch // world_size,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        padding_free=args.layout == "padding-free",
        max_length=None,  # the rows are short; TRL refuses a limit together with padding_free
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        bf16=args.compute == "bfloat16",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="steps" if args.save_every else "no",
        save_steps=args.save_every or 500,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )


def main() -> int:
    """Load, train and write the measurements."""
    args = arguments()
    started = time.time()
    dtype = getattr(torch, args.compute)
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            # Same bytes as the other side, and faster than dequantizing the scales in each step.
            bnb_4bit_use_double_quant=False,
        ),
        trust_remote_code=False,
    )
    rows = load_dataset("json", data_files=args.rows, split="train")
    clock = StepClock()
    trainer = SFTTrainer(
        model=model,
        args=config(args, int(os.environ.get("WORLD_SIZE", "1"))),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=AutoTokenizer.from_pretrained(args.model, trust_remote_code=False),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    adapted = trainer.model
    assert isinstance(adapted, torch.nn.Module)
    if args.adapters == "compute":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    loaded = time.time()
    trainer.train()
    assert_base_not_repacked(adapted)

    mine = {
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "base_bytes": base_bytes(adapted),
    }
    per_rank: list[Any] = [mine]
    if dist.is_initialized():
        per_rank *= dist.get_world_size()
        dist.all_gather_object(per_rank, mine)
    if trainer.is_world_process_zero():
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        totals = [entry["num_tokens"] for entry in logs]
        args.out.write_text(
            json.dumps(
                {
                    "step_ended": clock.ended,
                    "saves": clock.saves,
                    "tokens": [b - a for a, b in zip([0, *totals], totals, strict=False)],
                    "loss": [entry["loss"] for entry in logs],
                    "load_seconds": loaded - started,
                    "peak_rss_bytes_per_rank": [rank["peak_rss_bytes"] for rank in per_rank],
                    "base_bytes_per_rank": [rank["base_bytes"] for rank in per_rank],
                }
            )
        )
    if dist.is_initialized():
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
