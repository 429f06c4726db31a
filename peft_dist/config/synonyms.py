"""What a setting of another tool is called here: the answer to a key that no recipe has."""

from collections.abc import Iterable, Sequence

from peft_dist.common.errors import nearest

_BATCH = "train.global_batch_size (rows per step) and train.micro_batch_size (rows per pass)"
SYNONYMS = {
    "adam_epsilon": "train.epsilon",
    "attn_implementation": "model.attention",
    "base_model": "model.name",
    "batch_size": _BATCH,
    "bf16": "model.dtype: bfloat16",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "datasets": "data.train",
    "eval_batch_size": "evaluate.micro_batch_size",
    "eval_file": "data.eval",
    "eval_steps": "evaluate.every_steps",
    "flash_attention": "model.attention: flash_attention_2",
    "fp16": "model.dtype: float16",
    "gradient_accumulation_steps": "train.global_batch_size, from which accumulation follows",
    "gradient_checkpointing": "train.activation_checkpointing",
    "load_in_4bit": "quantization: nf4",
    "logging_steps": "nothing: every step stands in the ledger",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target_modules": "method.targets",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.schedule",
    "lr_scheduler_type": "train.schedule",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_steps": "train.steps",
    "micro_batch": "train.micro_batch_size",
    "model_name_or_path": "model.name",
    "nproc": "parallel.processes",
    "nproc_per_node": "parallel.processes",
    "num_epochs": "train.epochs",
    "num_processes": "parallel.processes",
    "num_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_workers": "parallel.processes",
    "optim": "train.optimizer",
    "optimizer": "train.optimizer",
    "output_dir": "the option --run-dir",
    "per_device_eval_batch_size": "evaluate.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "precision": "model.dtype",
    "pretrained_model_name_or_path": "model.name",
    "r": "method.rank",
    "report_to": "tracking.wandb.mode",
    "run_name": "the option --run-dir",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep_last",
    "sequence_len": "data.max_length",
    "target_modules": "method.targets",
    "tokenizer_name": "nothing: the tokenizer lies beside the model",
    "torch_dtype": "model.dtype",
    "train_file": "data.train",
    "use_dora": "method.dora",
    "use_rslora": "method.rslora",
    "val_set_size": "data.eval, a file of its own",
    "validation_file": "data.eval",
    "wandb_project": "tracking.wandb.project",
    "warmup_ratio": "train.warmup_fraction",
    "warmup_steps": "train.warmup_fraction, a share of all steps",
}
"""Keys of Transformers, PEFT, TRL, axolotl, LLaMA-Factory and torchtune, and ours for each."""


def ours(path: Sequence[str], valid: Iterable[str], all_paths: Iterable[str]) -> str:
    """Return the remedy for a key that is not known where it stands.

    Args:
        path: The key, part by part.
        valid: What may stand there.
        all_paths: The dotted path of every setting that there is anywhere.
    """
    name, here = path[-1], sorted(valid)
    places = [place for place in all_paths if place.rpartition(".")[2] == name != "kind"]
    if ".".join(path) in places:  # of a section of another kind
        return f"valid: {', '.join(here)}"
    plain = name.lower().replace("-", "_")
    if plain in SYNONYMS:
        return f"here that is {SYNONYMS[plain]}"
    if places:
        return f"here that is {' or '.join(places)}"
    return nearest(name, here)
