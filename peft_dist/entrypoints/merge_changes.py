"""What merging an adapter does to which weights of its base's files."""

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import ModelError, RunDirError
from peft_dist.entrypoints.merge_updates import Change, Update, changes_of, weight_of
from peft_dist.methods.expert_lora import of_each_expert
from peft_dist.model.nf4 import dequantize, quantize_rows
from peft_dist.model.plan import BasePlan, plan_base
from peft_dist.model.stored import RowTensor
from peft_dist.model.weights import FLOATS, WeightFiles
from peft_dist.run.directory import RunDir

_ROWS = ".token_adapter.trainable_tokens_delta"


def plan_changes(
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    skeleton: PreTrainedModel,
    files: WeightFiles,
    run: RunDir,
    *,
    dequantized: BasePlan | None = None,
) -> tuple[dict[str, Change], dict[str, torch.Tensor]]:
    """Return what happens to which tensor of the files, and the heads that they lack.

    Args:
        config: The adapter's.
        tensors: Of its file.
        skeleton: The base on `meta`.
        files: Of the base.
        run: That the adapter is from, for errors.
        dequantized: The plan of the 4-bit base where its rounding is to be kept. Default: not.
    """
    tied = _tied_names(skeleton)
    plan = plan_base(skeleton, files, quantization="none")
    keys = {tensor.name: tensor.key for tensor in plan.tensors if tensor.key is not None}
    sources = {tensor.name: tensor.source for tensor in plan.tensors}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    changes: dict[str, Change] = {}
    added: dict[str, torch.Tensor] = {}
    for saved, tensor in tensors.items():
        name = saved.removeprefix("base_model.model.")
        module, _, part = name.partition(".lora_")
        name = name.replace("base_layer.", "")
        if part:
            weight = weight_of(module, config, skeleton)
            parts.setdefault(weight, {})[part.removesuffix(".weight")] = tensor.float()
        elif name in tied:
            continue  # the same matrix by its other name
        elif name.endswith(_ROWS):
            module = name.removesuffix(_ROWS)
            ids = dict(config.trainable_token_indices or {}).get(module)  # type: ignore[arg-type]
            if ids is None or f"{module}.weight" not in keys:
                raise _foreign(saved, run)
            changes[keys[f"{module}.weight"]] = _with_rows(tensor, ids)
        elif name in plan.fresh:
            added[name] = tensor.to(FLOATS[plan.tensors[0].source.dtype])
        elif name in keys:
            changes[keys[name]] = _replaced_by(tensor)
        else:
            raise _foreign(saved, run)
    for weight, found in parts.items():
        source = sources.get(weight)
        if source is None or not {"A", "B"} <= found.keys() <= {"A", "B", "magnitude_vector"}:
            raise _foreign(f"{weight}: lora_{sorted(found)[0]}", run)
        changes |= _updates(config, weight, found, source, skeleton, keys.get(weight))
    if dequantized is not None:
        for linear in dequantized.tensors:
            if linear.block_size is None:
                continue
            if linear.key is None or len(linear.shape) != 2:
                raise ModelError(
                    f"{linear.name} is made of other tensors of the files, which cannot be rounded "
                    "by themselves",
                    where="--base",
                    remedy="leave --base out",
                )
            conv1d = isinstance(skeleton.get_submodule(linear.name.removesuffix(".weight")), Conv1D)
            rounded = _rounded(linear.block_size, transposed=conv1d)
            changes[linear.key] = _after(rounded, changes.get(linear.key))
    return changes, added


def _updates(
    config: LoraConfig,
    weight: str,
    found: Mapping[str, torch.Tensor],
    source: RowTensor,
    skeleton: PreTrainedModel,
    key: str | None,
) -> dict[str, Change]:
    """Return what a LoRA on one weight does to the tensors of the files that it is made of.

    Args:
        config: The adapter's.
        weight: Its name.
        found: A, B and, of DoRA, the magnitude.
        source: What the weight is made of.
        skeleton: The base on `meta`.
        key: The tensor that it is, where it is one.

    Raises:
        ModelError: For DoRA on a weight that is made of several.
    """
    whole = weight in (config.target_parameters or ())
    module = weight if whole else weight.removesuffix(".weight")
    rank = _of_module(config.rank_pattern, module, config.r)
    alpha = _of_module(config.alpha_pattern, module, config.lora_alpha)
    scaling = alpha / (rank**0.5 if config.use_rslora else rank)
    owner = skeleton.get_submodule(weight.rpartition(".")[0])
    if len(source.shape) == 3:
        turned = bool(getattr(owner, "is_transposed", False))
        left, right = of_each_expert(found["A"], found["B"], source.shape[0], turned=turned)
        return dict(changes_of(weight, source, left * scaling, right))
    if key is None and len(found) == 2:
        return dict(changes_of(weight, source, found["B"] * scaling, found["A"]))
    if key is None:
        raise ModelError(
            f"{weight} has DoRA, and is made of other tensors of the files",
            where="method.dora",
            remedy="use the adapter beside its base",
        )
    update = Update(
        a=found["A"],
        b=found["B"],
        scaling=scaling,
        magnitude=found.get("magnitude_vector"),
        transposed=isinstance(owner, Conv1D),
    )
    return {key: update.applied}


def _replaced_by(tensor: torch.Tensor) -> Change:
    return lambda _: tensor


def _with_rows(rows: torch.Tensor, ids: list[int]) -> Change:
    return lambda stored: stored.float().index_copy(0, torch.tensor(ids), rows.float())


def _rounded(block_size: int, *, transposed: bool) -> Change:
    """Return what a weight becomes in 4 bits and back, as it was trained on."""

    def change(stored: torch.Tensor) -> torch.Tensor:
        rows = stored.t().contiguous() if transposed else stored
        packed, absmax = quantize_rows(rows, block_size)
        back = dequantize(packed, absmax, block_size=block_size, dtype=torch.float32)
        return back.t() if transposed else back

    return change


def _after(first: Change, then: Change | None) -> Change:
    return first if then is None else lambda stored: then(first(stored))


def _tied_names(skeleton: PreTrainedModel) -> set[str]:
    """Return the names of parameters that have an earlier one."""
    skeleton.tie_weights()
    first: dict[int, str] = {}
    names = skeleton.named_parameters(remove_duplicate=False)
    return {name for name, one in names if first.setdefault(id(one), name) != name}


def _of_module(pattern: dict[str, int] | None, module: str, otherwise: int) -> int:
    """Return what PEFT's configuration says of a module alone, or of all."""
    some = pattern or {}
    return some.get(get_pattern_key(list(some), module), otherwise)


def _foreign(name: str, run: RunDir) -> RunDirError:
    return RunDirError(
        f"{name} has no place in the base",
        where=str(run.adapter),
        remedy="use the adapter with the base it was trained on",
    )
