"""Merge the LoRA of a finished run into its full-precision base: a plain model, without PEFT.

No tensor changes its shape or type, so a weight file keeps its layout: it is copied, and what was
trained is written over, one tensor in memory at a time. Never holds the model, and trains nothing.
"""

import argparse
import json
import shlex
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from peft_dist.checkpoint.adapter_file import ADAPTER_FILE
from peft_dist.checkpoint.saved_tokenizer import TEMPLATE
from peft_dist.common.arguments import BASES, add_merge_form
from peft_dist.common.atomic import whole_folder
from peft_dist.common.console import show
from peft_dist.common.errors import ModelError, RecipeError, RunDirError
from peft_dist.common.paths import TOKENIZER_FILES
from peft_dist.config import Recipe, load_recipe
from peft_dist.entrypoints.merge_changes import plan_changes
from peft_dist.entrypoints.merge_gguf import GgufPlan
from peft_dist.entrypoints.merge_updates import Change
from peft_dist.entrypoints.merged_losses import held_out_losses
from peft_dist.model import architectures
from peft_dist.model.plan import plan_base
from peft_dist.model.prequantized import quantized_weights
from peft_dist.model.weights import FLOATS, WeightFiles, model_folder
from peft_dist.run.directory import RunDir
from peft_dist.worker.process import WorkerContext, run_worker

UNMERGEABLE = {
    "bottleneck": "a bottleneck is a layer of its own, with a non-linearity",
    "prefix": "learned keys and values are no part of any weight",
    "prompt": "learned embeddings are no part of any weight",
    "bitfit": "config.json has no place for the biases that it may add",
    "peft": "only LoRA is known to be a sum of weights",
}
"""Why the adapter of each other method cannot become weights of the base."""
WEIGHT_SUFFIXES = {
    ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".pt", ".pth", ".safetensors",
}  # fmt: skip
"""Files that would still hold the base's own weights beside the merged ones."""
INDEX = "model.safetensors.index.json"


def main(argv: list[str]) -> int:
    """Merge one run's adapter into its base; return the exit code."""
    parser = argparse.ArgumentParser(prog="peft-dist merge", description=main.__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    add_merge_form(parser)
    options = parser.parse_args(argv)
    run, dequantized = RunDir.open(options.run_dir), options.base == BASES[1]

    def work(_: WorkerContext) -> None:
        merge(run, options.out, dequantized=dequantized, gguf=options.gguf)
        for line in held_out_losses(run, options.out):
            show(f"  {line}")

    return run_worker(work)


def merge(run: RunDir, out: Path, *, dequantized: bool = False, gguf: str | None = None) -> None:
    """Write the base of a run with its adapter merged in, in one step.

    Args:
        run: A finished run with a LoRA.
        out: The folder to make.
        dequantized: Merge into the base as it was trained on, rounded to 4 bits, and not into the
            weights of its files.
        gguf: One of `GGUF_TYPES`, of a GGUF file in the folder, or None.

    Raises:
        PeftDistError: For an adapter or base that cannot be merged, or a folder that is taken or
            cannot be written; nothing is left of it then.
    """
    started = time.monotonic()
    recipe = load_recipe(run.recipe, check_paths=False)  # the rows are not needed any more
    reason = UNMERGEABLE.get(recipe.method.kind)
    if reason is not None:
        raise RecipeError(
            f"a {recipe.method.kind} adapter cannot be merged: {reason}",
            where="method.kind",
            remedy="load it with PEFT",
        )
    if recipe.head == "reward":
        raise RecipeError(
            "a reward model is not merged: its head is its own",
            where="objective.kind",
            remedy="load it with PEFT",
        )
    if dequantized and recipe.quantization != "nf4":
        raise RecipeError(
            "the run was not trained on a 4-bit base",
            where="--base dequantized",
            remedy="leave it out",
        )
    config, tensors = _read_adapter(run)
    _require_room(out)
    files = WeightFiles(model_folder(recipe.model.name, recipe.model.revision))
    if files.packed or quantized_weights(files)[0]:
        raise ModelError(
            f"{files.folder} is stored quantized",
            where="model.name",
            remedy="merging needs the full-precision model",
        )
    if gguf is not None and recipe.model.task != "causal-lm":
        raise RecipeError(
            "a GGUF file is written of causal-lm models alone",
            where="model.task",
            remedy="leave out --gguf",
        )
    plan = None if gguf is None else GgufPlan(files, gguf, out)
    skeleton = _skeleton(recipe, run, files)
    rounded = None
    if dequantized:
        rounded = plan_base(_skeleton(recipe, run, files), files, quantization="nf4")
    changes, added = plan_changes(config, tensors, skeleton, files, run, dequantized=rounded)
    gguf_file = out / f"{out.absolute().name}-{gguf}.gguf"
    try:
        with whole_folder(out) as partial:
            _write_model(partial, files, changes, added)
            _copy_tokenizer(run.adapter, partial)
            if recipe.model.task == "sequence-classification":
                _name_classes(partial / "config.json", skeleton)
            if plan is not None:
                plan.write(partial, partial / gguf_file.name)
    except OSError as error:
        raise RunDirError(
            f"cannot be written: {error.strerror or error}",
            where=str(out),
            remedy="free space, or choose another folder with --out",
        ) from error
    size = sum(file.stat().st_size for file in out.iterdir())
    show(
        f"{out}  {len(changes) + len(added)} of {len(files.tensors) + len(added)} tensors merged  "
        f"{size / 1e6:,.1f} MB  {time.monotonic() - started:.1f} s"
    )
    task = "CausalLM" if recipe.model.task == "causal-lm" else "SequenceClassification"
    show(
        f"  load it:\n    from transformers import AutoModelFor{task} as Auto, AutoTokenizer\n"
        f"    model = Auto.from_pretrained({str(out)!r})\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(out)!r})"
    )
    if plan is not None:
        show(f"  or with llama.cpp:\n    llama-cli -m {shlex.quote(str(gguf_file))}")


def _read_adapter(run: RunDir) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    file = run.adapter / ADAPTER_FILE
    if not file.is_file():
        raise RunDirError(
            "holds no adapter", where=str(run.path), remedy="wait until training has finished"
        )
    try:
        config, tensors = PeftConfig.from_pretrained(str(run.adapter)), load_file(file)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise RunDirError(f"cannot be read: {error}", where=str(run.adapter)) from error
    if not isinstance(config, LoraConfig):
        raise RunDirError(
            f"holds a {config.peft_type} adapter",
            where=str(run.adapter),
            remedy=UNMERGEABLE["peft"],
        )
    return config, tensors


def _require_room(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise RunDirError(
            "already there", where=str(out), remedy="choose another folder with --out"
        )


def _skeleton(recipe: Recipe, run: RunDir, files: WeightFiles) -> PreTrainedModel:
    """Return the base on `meta`, for the names and kinds of its parts."""
    labels: tuple[str, ...] = ()
    if recipe.model.task == "sequence-classification":
        try:
            labels = tuple(json.loads(run.result.read_text(encoding="utf-8"))["labels"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunDirError(
                "does not name the classes",
                where=str(run.result),
                remedy="wait until training has finished",
            ) from error
    return architectures.build_skeleton(
        architectures.read_config(files.folder, task=recipe.model.task),
        task=recipe.model.task,
        dtype=torch.float32,  # of parameters that are never given memory here
        attention="auto",
        label_names=labels,
    )


def _write_model(
    folder: Path,
    files: WeightFiles,
    changes: Mapping[str, Change],
    added: dict[str, torch.Tensor],
) -> None:
    """Write the weight files, and a copy of every other file of the base."""
    for file in files.files:
        last = file == files.files[-1]
        with file.open("rb") as source, (folder / file.name).open("w+b") as target:
            _write_weights(source, target, changes, added if last else {})
    for file in files.folder.iterdir():
        weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
        if file.is_file() and not weights and not file.name.startswith("adapter_"):
            shutil.copyfile(file, folder / file.name)
    if (files.folder / INDEX).is_file():
        index = json.loads((files.folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] |= dict.fromkeys(added, files.files[-1].name)
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += sum(t.nbytes for t in added.values())
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(adapter: Path, folder: Path) -> None:
    """Put the tokenizer that an adapter was trained with in place of the base's."""
    if (adapter / TEMPLATE).is_file():
        for file in folder.glob("chat_template*"):
            file.unlink()
    for pattern in TOKENIZER_FILES:
        for file in adapter.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _write_weights(
    source: BinaryIO,
    target: BinaryIO,
    changes: Mapping[str, Change],
    added: Mapping[str, torch.Tensor],
) -> None:
    """Copy one safetensors file with some tensors changed and some added behind the others.

    The format: the header's size in 8 bytes, a header in JSON, the tensors. Read and written here
    because safetensors itself writes whole files, for which it copies all their tensors.
    """
    header: dict[str, Any] = json.loads(source.read(int.from_bytes(source.read(8), "little")))
    begin = source.tell()
    end = max((t["data_offsets"][1] for n, t in header.items() if n != "__metadata__"), default=0)
    names = {dtype: name for name, dtype in FLOATS.items()}
    for key, tensor in added.items():
        offsets = [end, end := end + tensor.nbytes]
        facts = {"dtype": names[tensor.dtype], "shape": list(tensor.shape)}
        header[key] = facts | {"data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    target.write(len(text).to_bytes(8, "little") + text)
    data = target.tell()
    shutil.copyfileobj(source, target, 1 << 22)
    for tensor in added.values():
        target.write(_bytes(tensor))
    for key in header.keys() & changes.keys():
        dtype, shape = FLOATS[header[key]["dtype"]], header[key]["shape"]
        start, stop = header[key]["data_offsets"]
        source.seek(begin + start)
        stored = torch.frombuffer(bytearray(source.read(stop - start)), dtype=dtype).reshape(shape)
        merged = changes[key](stored).to(dtype)
        assert merged.shape == stored.shape, (key, merged.shape, stored.shape)
        if not bool(torch.isfinite(merged).all()):
            raise ModelError(
                f"{key} is not finite in {header[key]['dtype']} once merged",
                where="model.name",
                remedy="store the base in a wider type, or look at the adapter",
            )
        target.seek(data + start)
        target.write(_bytes(merged))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _name_classes(file: Path, skeleton: PreTrainedModel) -> None:
    """Make config.json that of a classifier of the run's classes."""
    config = json.loads(file.read_text(encoding="utf-8"))
    labels = skeleton.config.id2label
    assert labels is not None
    config |= {
        "architectures": [type(skeleton).__name__],
        "id2label": {str(index): name for index, name in labels.items()},
        "label2id": skeleton.config.label2id,
    }
    config.pop("num_labels", None)
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
