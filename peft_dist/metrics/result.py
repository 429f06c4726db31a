"""What a finished run says of itself: `result.json` and the few lines a person reads.

Computes nothing that is not a sum or a ratio of what the run measured.
"""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from peft_dist.checkpoint.progress import Progress
from peft_dist.common.sizes import megabytes
from peft_dist.common.table import Column, table_lines
from peft_dist.data.counts import SourceRows
from peft_dist.model.architectures import bare_model
from peft_dist.model_setup import ModelSetup
from peft_dist.run.directory import RunDir

Result = dict[str, Any]
_COLUMNS = (Column(""), Column("", style=lambda _name: "cyan"), Column("", wrap=True))


def make_result(
    setup: ModelSetup,
    progress: Progress,
    *,
    load_seconds: float,
    train_seconds: float,
    peaks: list[tuple[int, int]],
    rows: Sequence[SourceRows],
    held_out: Sequence[SourceRows],
) -> Result:
    """Return `result.json`; times in seconds, sizes in bytes, lists in rank order."""
    trained = setup.adapter.values()
    classes = {}
    if setup.recipe.head != "causal-lm":
        labels = bare_model(setup.peft).config.id2label
        assert labels is not None
        classes = {"labels": list(labels.values())}
    return classes | {
        "method": setup.recipe.method.kind,
        "objective": setup.recipe.objective.kind,
        "start_from": setup.recipe.method.start_from,
        "start_sha256": setup.start_sha256,
        "world_size": setup.world.size,
        "strategy": setup.strategy,
        "quantization": setup.recipe.quantization,
        "compute_dtype": str(setup.compute_dtype).removeprefix("torch."),
        "device": setup.world.device.type,
        "base_bytes_total": setup.base_bytes_total,
        "base_bytes_per_rank": setup.base_bytes_by_rank,
        "base_unchanged": True,
        "packed_base": None if setup.packed_base is None else str(setup.packed_base),
        "trainable_parameters": sum(parameter.numel() for parameter in trained),
        "serving": serving(setup.method.saved_config(setup.peft), setup.adapter),
        "peak_rss_bytes_per_rank": [rss for rss, _ in peaks],
        "peak_device_bytes_per_rank": [device for _, device in peaks],
        "load_seconds": load_seconds,
        "train_seconds": train_seconds,
        "steps": progress.step,
        "tokens": progress.tokens,
        "tokens_per_second": progress.tokens / progress.step_seconds,
        "final_loss": progress.final_loss,
        "rows": {
            "train": [source.facts() for source in rows],
            "eval": [source.facts() for source in held_out],
        },
        "eval": {
            "first": None if progress.first is None else asdict(progress.first),
            "last": None if progress.last is None else asdict(progress.last),
        },
    }


def serving(config: PeftConfig, trained: Collection[str]) -> str:
    """Return in one line what a server needs to know of an adapter.

    Servers (vLLM, SGLang, TGI) load plain LoRA files: no biases, no trained heads, no DoRA.

    Args:
        config: What stands beside the saved tensors.
        trained: Names of the trained tensors.
    """
    if not isinstance(config, LoraConfig):
        return "no plain LoRA: servers that load LoRA files cannot load it; PEFT can"
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    besides = [name for name in trained if ".lora_" not in name]
    problem = "DoRA" if config.use_dora else "more than LoRA is trained" if besides else ""
    if problem:
        return f"{problem}: servers load plain LoRA alone; `peft-dist merge` first"
    return f"LoRA of rank {rank}: a server needs room for that (vLLM: --max-lora-rank)"


def summary(
    result: Result, run: RunDir, *, base: str, width: int | None = None, colour: bool = False
) -> list[str]:
    """Return the lines of a run's summary: a table, then how to load the adapter.

    Args:
        result: What `make_result` returned.
        run: Where it is.
        base: Name of the base model, as the adapter has it.
        width: Columns of the terminal; None for as many as it takes.
        colour: Whether lines may hold escape sequences.
    """
    first, last = result["eval"]["first"], result["eval"]["last"]
    rows = [("steps", f"{result['steps']}, final loss {result['final_loss']:.4f}")]
    if last is not None:
        if last["accuracy"] is not None:
            rows.append(("accuracy", _change(first, last, "accuracy", 3)))
        rows.append(("held-out loss", _change(first, last, "loss", 4)))
    per_rank = result["base_bytes_per_rank"]
    rows += [
        (
            "base per rank",
            f"{_list(per_rank)} of {megabytes(result['base_bytes_total'])} "
            f"({result['strategy']}, {result['quantization']}), unchanged by training",
        ),
        ("peak memory", f"{_list(result['peak_rss_bytes_per_rank'])} per rank"),
        ("trained", f"{result['trainable_parameters']:,} parameters"),
        (
            "speed",
            f"{result['tokens_per_second']:,.0f} tokens/s; loading {result['load_seconds']:.0f} s, "
            f"training and evaluation {result['train_seconds']:.0f} s",
        ),
        ("adapter", str(run.adapter)),
        ("serving", result["serving"]),
        ("report", f"peft-dist report {shlex.quote(str(run.path))}"),
    ]
    if result["device"] == "cuda":
        rows.insert(-5, ("peak GPU", f"{_list(result['peak_device_bytes_per_rank'])} per rank"))
    table = table_lines(_COLUMNS, [["", *row] for row in rows], width=width, colour=colour)
    code = loading_code(run.adapter, result, base)
    return ["", "Done.", *table, "  load it:", *(f"    {line}" for line in code), ""]


def loading_code(adapter: Path, result: Result, base: str) -> list[str]:
    """Return Python that loads the adapter onto the base it was trained on."""
    task = "SequenceClassification" if "labels" in result else "CausalLM"
    size = f", num_labels={len(result['labels'])}" if "labels" in result else ""
    # PEFT has neither; importing our methods makes them known to it.
    ours = ["import peft_dist.methods"] if result["method"] in ("bottleneck", "bitfit") else []
    # A hub id is found from anywhere, a folder is not.
    elsewhere = (
        [f"# elsewhere, with a copy of {base}: PeftModel.from_pretrained(model, adapter)"]
        if Path(base).is_absolute()
        else []
    )
    return [
        *ours,
        f"from peft import AutoPeftModelFor{task} as Auto; from transformers import AutoTokenizer",
        f"model = Auto.from_pretrained({str(adapter)!r}{size})",
        f"tokenizer = AutoTokenizer.from_pretrained({str(adapter)!r})",
        *elsewhere,
    ]


def _change(first: dict[str, Any] | None, last: dict[str, Any], figure: str, digits: int) -> str:
    """Return a figure before and after training, and of how many rows each one is."""
    after = f"{last[figure]:.{digits}f} after ({last['rows']} held-out rows)"
    if first is None or first[figure] is None:
        return after
    before = f"{first[figure]:.{digits}f} before"
    if first["rows"] == last["rows"]:
        return f"{before}, {after}"
    return f"{before} ({first['rows']} rows), {after}: not the same rows, do not compare"


def _list(counts: list[int]) -> str:
    """Show one figure where all are alike to a tenth of a MB, else each."""
    shown = [megabytes(count) for count in counts]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)
