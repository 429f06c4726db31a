"""What merging an adapter does to which weights of its base's files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import ModelError, RunDirError
from peft_dist.model import base
from peft_dist.model.base import BasePlan
from peft_dist.model.nf4 import dequantize, quantize_rows
from peft_dist.model.weights import FLOATS, WeightFiles
from peft_dist.run.directory import RunDir

_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Update:
    """What LoRA does to one weight.

    Attributes:
        a: float32 [r, in].
        b: float32 [out, r].
        scaling: Factor of B @ A.
        magnitude: float32 [out], the norm of every row with DoRA; None without.
        transposed: Whether the weight is kept [in, out], as GPT-2's are.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None
    transposed: bool

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the merged weight, in float32 and as the given one is laid out."""
        rows = weight.float().t() if self.transposed else weight.float()
        rows = torch.addmm(rows, self.b, self.a, alpha=self.scaling)
        if self.magnitude is not None:
            rows *= (self.magnitude / rows.norm(dim=1))[:, None]  # DoRA, arXiv 2402.09353, eq. 5
        return rows.t() if self.transposed else rows


Change = Callable[[torch.Tensor], torch.Tensor]
"""Returns what stands in a tensor's place, given the base's."""


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
    plan = base.plan_base(skeleton, files, quantization="none")
    keys = {tensor.name: tensor.key for tensor in plan.tensors if tensor.key is not None}
    made = {tensor.name for tensor in plan.tensors if tensor.key is None}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    changes: dict[str, Change] = {}
    added: dict[str, torch.Tensor] = {}
    for saved, tensor in tensors.items():
        name = saved.removeprefix("base_model.model.").replace("base_layer.", "")
        module, _, part = name.partition(".lora_")
        if part:
            parts.setdefault(module, {})[part.removesuffix(".weight")] = tensor.float()
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
    for module, found in parts.items():
        if f"{module}.weight" in made:
            raise ModelError(
                f"{module} is made of other tensors of the files, into which nothing can be merged",
                where="model.name",
                remedy="use the adapter beside its base",
            )
        key = keys.get(f"{module}.weight")
        if key is None or not {"A", "B"} <= found.keys() <= {"A", "B", "magnitude_vector"}:
            raise _foreign(f"{module}.lora_{sorted(found)[0]}", run)
        rank = _of_module(config.rank_pattern, module, config.r)
        alpha = _of_module(config.alpha_pattern, module, config.lora_alpha)
        changes[key] = Update(
            a=found["A"],
            b=found["B"],
            scaling=alpha / (rank**0.5 if config.use_rslora else rank),
            magnitude=found.get("magnitude_vector"),
            transposed=isinstance(skeleton.get_submodule(module), Conv1D),
        ).applied
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
