"""What the frozen base is made of: which file tensor feeds which parameter, and how it is stored.

Reads no weight but small buffers. Does not know adapters: a parameter that no plan entry names is
somebody else's to fill.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_dist.common.errors import ModelError
from peft_dist.model.architectures import block_linears
from peft_dist.model.experts import ABSMAX, PACKED, expert_parameters, swap_experts
from peft_dist.model.nf4 import FrozenLinear4bit, block_size_for
from peft_dist.model.stored import FoundSources, RowTensor, Stored, Turned, find_sources, turned
from peft_dist.model.weights import FLOATS, PACKED_PARTS, QUANT_STATE, Packing, WeightFiles

FRESH_HEADS = ("classifier", "score")
"""Task heads that a pre-trained checkpoint may lack; they are initialised and trained."""

_COMPARED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class BaseTensor:
    """One tensor of the base: its name in the model, what the files have for it, and its storage.

    `name` ends in `.weight` for a quantized linear too; its parameters are then `.packed` and
    `.absmax`. Those of experts, [E, rows, columns], have `_packed` and `_absmax` behind its name.
    """

    name: str
    source: RowTensor
    shape: tuple[int, ...]
    block_size: int | None = None
    packing: Packing | None = None

    @property
    def key(self) -> str | None:
        """Return the file tensor that it is; None where it is made of several, or of a part."""
        source = self.source
        if isinstance(source, Turned):
            (source,) = source.parts
        return source.key if isinstance(source, Stored) else None

    def parameters(self) -> tuple[str, ...]:
        """Return the names of the parameters this tensor fills, in the order rows are read."""
        if self.block_size is None:
            return (self.name,)
        if len(self.shape) == 3:
            return (self.name + PACKED, self.name + ABSMAX)
        module = self.name.removesuffix(".weight")
        return (f"{module}.packed", f"{module}.absmax")


@dataclass(frozen=True)
class BasePlan:
    """Everything the base is made of, and what was noticed while planning."""

    tensors: tuple[BaseTensor, ...]
    fresh: tuple[str, ...]
    warnings: tuple[str, ...]

    def of(self, names: Collection[str]) -> "BasePlan":
        """Return the plan of a few tensors, by their names; each must be one of them."""
        few = tuple(tensor for tensor in self.tensors if tensor.name in names)
        assert len(few) == len(names), names
        return BasePlan(few, (), ())


def plan_base(model: PreTrainedModel, files: WeightFiles, *, quantization: str) -> BasePlan:
    """Swap the linears inside the blocks for 4-bit ones and match every parameter to a file.

    Reads no weight. The model is changed in place.

    Raises:
        ModelError: For a parameter that no file holds, or whose stored shape or type is wrong.
    """
    linears = block_linears(model) if quantization == "nf4" else {}
    experts = expert_parameters(model) if quantization == "nf4" else {}
    vocabulary = _vocabulary_matrices(model)
    found = find_sources(model, files)
    _fill_buffers(model, found)
    tensors: list[BaseTensor] = []
    warnings: list[str] = _unused(model, found)
    fresh: list[str] = []
    for names in _tied_names(model, found):
        source = next((found.sources[name] for name in names if name in found.sources), None)
        name = names[0]
        if source is None:
            if name.split(".")[0] in FRESH_HEADS:
                fresh.append(name)
                continue
            raise ModelError(
                f"no tensor for {name} in {files.folder}",
                where="model.name",
                remedy="the files and config.json do not belong together",
            )
        linear = linears.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        packing = files.packing(source.key) if isinstance(source, Stored) else None
        if packing is not None and linear is None:
            raise ModelError(
                f"{name} is stored in 4 bits, but quantization {quantization} needs it in full",
                where="quantization",
                remedy="set quantization: nf4, or use the full-precision model",
            )
        shape = tuple(model.get_parameter(name).shape)
        if packing is None:
            _check_stored(source, name, shape)
        if name in experts:
            block_size = block_size_for(shape[-1])
            if block_size is None:
                warnings.append(_stays(name, shape[-1]))
            else:
                swap_experts(model, name, experts[name], block_size)
            tensors.append(BaseTensor(name, source, shape, block_size))
            continue
        if linear is None:
            if name in vocabulary:
                _store_as_in_file(model, names, FLOATS[source.dtype])
            tensors.append(BaseTensor(name, source, shape))
            continue
        conv1d = isinstance(linear, Conv1D)
        out_features, in_features = shape[::-1] if conv1d else shape
        block_size = packing.block_size if packing else block_size_for(in_features)
        if packing is not None and packing.shape != (out_features, in_features):
            raise _wrong_shape(name, (out_features, in_features), packing.shape)
        if block_size is None:
            warnings.append(_stays(name, in_features))
            tensors.append(BaseTensor(name, source, shape))
            continue
        _swap(model, names, linear, in_features, out_features, block_size)
        if conv1d and packing is None:
            source = turned(source)
        tensors.append(BaseTensor(name, source, (out_features, in_features), block_size, packing))
    return BasePlan(tuple(tensors), tuple(fresh), tuple(warnings))


def _stays(name: str, columns: int) -> str:
    return f"{name} stays unquantized: its {columns} columns are not a multiple of 32"


def _fill_buffers(model: PreTrainedModel, found: FoundSources) -> None:
    """Read the buffers that are stored, such as the biases of a router: they are few and small."""
    for name, buffer in model.named_buffers():
        source = found.sources.get(name)
        if source is not None and source.shape == tuple(buffer.shape):
            rows = source.shape[0] if source.shape else 1
            buffer.copy_(source.rows(0, rows))


def _unused(model: PreTrainedModel, found: FoundSources) -> list[str]:
    """Return a warning about file tensors that nothing is made of, and transformers reports too."""
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_unexpected or ()]
    computed = {name for name, _ in model.named_buffers()}
    bare = f"{model.base_model_prefix}."
    unused = [
        key
        for key in found.unused
        if not {key, f"{bare}{key}"} & computed
        and not key.endswith(("rotary_emb.inv_freq", *PACKED_PARTS))
        and QUANT_STATE not in key
        and not any(pattern.search(key) for pattern in ignored)
    ]
    if not unused:
        return []
    return [f"{len(unused)} tensors of the files are not used by the model, {unused[0]} first"]


def _tied_names(model: PreTrainedModel, found: FoundSources) -> list[list[str]]:
    """Group parameter names that share one tensor, in model order.

    Those that config.json ties and the files hold with different values are not tied, as
    `PreTrainedModel.tie_weights` has it.
    """
    model.tie_weights()
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    tied: list[list[str]] = []
    for names in groups.values():
        stored = [name for name in names if name in found.sources]
        others = [n for n in stored[1:] if not _same(found.sources[stored[0]], found.sources[n])]
        for name in others:
            parent, _, attribute = name.rpartition(".")
            own = nn.Parameter(model.get_parameter(name).detach().clone(), requires_grad=False)
            setattr(model.get_submodule(parent), attribute, own)
            model.all_tied_weights_keys.pop(name, None)
        tied += [[name for name in names if name not in others], *([name] for name in others)]
    return tied


def _same(one: RowTensor, other: RowTensor) -> bool:
    """Whether two tensors hold the same values; read in parts."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = max(1, _COMPARED_AT_ONCE // max(1, one.shape[-1]))
    return all(
        torch.equal(one.rows(start, start + rows), other.rows(start, start + rows))
        for start in range(0, one.shape[0], rows)
    )


def _vocabulary_matrices(model: PreTrainedModel) -> set[str]:
    """Return the names of the token embedding and output head, where their dtype is free.

    They are the largest unquantized tensors. The head is only read by our loss, which casts it;
    an embedding of torch's own class is only looked up, and its output can be cast.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or head is None:
        return set()
    weights = {id(embedding.weight), id(head.weight)}
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in weights
    }


def _store_as_in_file(model: PreTrainedModel, names: list[str], stored: torch.dtype) -> None:
    """Keep a vocabulary matrix in the file's dtype where that is narrower than the compute dtype.

    Values are the same: they are widened when they are used.
    """
    compute = model.get_parameter(names[0]).dtype
    if stored.itemsize >= compute.itemsize:
        return
    empty = torch.empty(model.get_parameter(names[0]).shape, dtype=stored, device="meta")
    narrow = nn.Parameter(empty, requires_grad=False)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, attribute, narrow)
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _args, output: output.to(compute))


def _wrong_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> ModelError:
    return ModelError(
        f"{name} has shape {list(found)} in the file, but config.json says {list(expected)}",
        where="model.name",
        remedy="the files and config.json do not belong together",
    )


def _check_stored(source: RowTensor, name: str, shape: tuple[int, ...]) -> None:
    if source.shape != shape:
        raise _wrong_shape(name, shape, source.shape)
    if source.dtype not in FLOATS:
        raise ModelError(
            f"{source.keys[0]} is stored as {source.dtype}",
            where="model.name",
            remedy="use its full-precision version; it can be quantized here",
        )


def _swap(
    model: PreTrainedModel,
    names: list[str],
    linear: nn.Linear | Conv1D,
    in_features: int,
    out_features: int,
    block_size: int,
) -> None:
    """Put one 4-bit linear wherever its weight is: layers may share it."""
    replacement = FrozenLinear4bit(
        in_features,
        out_features,
        block_size=block_size,
        bias=linear.bias is not None,
        dtype=linear.weight.dtype,
    )
    for name in names:
        parent, _, child = name.removesuffix(".weight").rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)
