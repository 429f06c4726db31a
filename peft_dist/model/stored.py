"""What a parameter is made of in the files, as transformers reads them, and its rows alone.

Which file tensors make a parameter, and how, is transformers' own knowledge
(`conversion_mapping.py`): names are changed by its own functions. Its operations are followed by
source rows, so that a process reads the rows that it keeps; those that mix rows are run whole, one
tensor at a time.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from peft_dist.common.errors import ModelError
from peft_dist.model.prequantized import quantized_weights
from peft_dist.model.weights import FLOATS, WeightFiles

Shape = tuple[int, ...]


class RowTensor(Protocol):
    """A tensor that is read by rows, its first dimension."""

    @property
    def shape(self) -> Shape:
        """Its shape."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of the file tensors it is made of."""

    @property
    def dtype(self) -> str:
        """The dtype it is stored in, by safetensors' name."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows [start, stop) in the stored dtype."""


@dataclass(frozen=True)
class Stored:
    """One tensor of the files."""

    files: WeightFiles
    key: str

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return self.files.tensors[self.key].shape

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own name."""
        return (self.key,)

    @property
    def dtype(self) -> str:
        """The dtype it is stored in."""
        return self.files.tensors[self.key].dtype

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows; a scalar has none."""
        if not self.shape:
            return self.files.full_tensor(self.key)
        return self.files.rows(self.key, start, stop)


@dataclass(frozen=True)
class _Made:
    """A tensor made of others."""

    parts: tuple[RowTensor, ...]
    shape: Shape

    @property
    def keys(self) -> tuple[str, ...]:
        """Names of all that it is made of."""
        return tuple(key for part in self.parts for key in part.keys)

    @property
    def dtype(self) -> str:
        """The dtype of its first part."""
        return self.parts[0].dtype


@dataclass(frozen=True)
class Stacked(_Made):
    """Tensors of one shape, each a row: experts that are stored one by one."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read the tensors [start, stop)."""
        wholes = [part.rows(0, part.shape[0]) for part in self.parts[start:stop]]
        if not wholes:
            return torch.empty((0, *self.shape[1:]), dtype=FLOATS.get(self.dtype, torch.uint8))
        return torch.stack(wholes)


@dataclass(frozen=True)
class Joined(_Made):
    """Tensors one after the other along a dimension."""

    dim: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows of every tensor, or of those that have some of these."""
        if self.dim:
            return torch.cat([part.rows(start, stop) for part in self.parts], dim=self.dim)
        found: list[torch.Tensor] = []
        first = 0
        for part in self.parts:
            low, high = max(start - first, 0), min(stop - first, part.shape[0])
            if low < high:
                found.append(part.rows(low, high))
            first += part.shape[0]
        return torch.cat(found) if found else self.parts[0].rows(0, 0)


@dataclass(frozen=True)
class TensorSlice(_Made):
    """Some of a tensor along a dimension."""

    dim: int
    begin: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows of the tensor, or some of each."""
        (whole,) = self.parts
        if self.dim:
            return whole.rows(start, stop).narrow(self.dim, self.begin, self.shape[self.dim])
        return whole.rows(self.begin + start, self.begin + stop)


@dataclass(frozen=True)
class Turned(_Made):
    """A tensor with two dimensions exchanged."""

    dims: tuple[int, int]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read columns where rows become columns, else rows."""
        (whole,) = self.parts
        if 0 not in self.dims:
            return whole.rows(start, stop).transpose(*self.dims).contiguous()
        if isinstance(whole, Stored) and len(self.shape) == 2:
            return whole.files.rows(whole.key, start, stop, transposed=True)
        return whole.rows(0, whole.shape[0]).transpose(*self.dims)[start:stop].contiguous()


@dataclass(frozen=True)
class Whole(_Made):
    """What an operation makes of whole tensors; it is run again for each reading."""

    make: Callable[[], torch.Tensor]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Make all of it and keep some."""
        return self.make()[start:stop].clone()


def turned(source: RowTensor) -> RowTensor:
    """Return a matrix transposed."""
    return Turned((source,), source.shape[::-1], (0, 1))


@dataclass(frozen=True)
class FoundSources:
    """What the files hold for a model.

    Attributes:
        sources: Of each tensor of the model's state, by its name there.
        unused: Keys that nothing in the model is made of.
    """

    sources: dict[str, RowTensor]
    unused: tuple[str, ...]


def find_sources(model: PreTrainedModel, files: WeightFiles) -> FoundSources:
    """Match file tensors to a model's parameters and buffers, as transformers would.

    Follows `convert_and_load_state_dict_in_model` of its `core_model_loading.py`.

    Raises:
        ModelError: For files that transformers' rules do not fit.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    quantized, used_up = quantized_weights(files)
    stored: dict[str, RowTensor] = {
        key: Stored(files, key) for key in files.tensors.keys() - used_up
    }
    stored |= quantized
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    state: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    sources: dict[str, RowTensor] = {}
    collected: dict[str, tuple[WeightConverter, dict[str, list[RowTensor]]]] = {}
    unused: list[str] = []
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            unused.append(key)
        elif pattern is None:
            sources[name] = stored[key]
        else:
            fresh = (deepcopy(by_pattern[pattern]), dict[str, list[RowTensor]]())
            _, parts = collected.setdefault(name, fresh)
            parts.setdefault(pattern, []).append(stored[key])
    for name, (converter, parts) in collected.items():
        keys = [key for some in parts.values() for part in some for key in part.keys]
        try:
            sources |= _converted(model, name, converter, parts)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(
                f"{keys[0]} cannot be made into {name} ({line})",
                where="model.name",
                remedy="the files and config.json do not belong together",
            ) from None
    return FoundSources(sources, tuple(unused))


def _converted(
    model: PreTrainedModel,
    name: str,
    converter: WeightConverter,
    parts: dict[str, list[RowTensor]],
) -> dict[str, RowTensor]:
    """Follow a converter's operations, as its `convert` does with tensors."""
    for operation in converter.operations:
        parts = _applied(model, name, converter, operation, parts)
    full = name.replace("*.", "0.")
    pattern = next((p for p in parts if p in full), None)
    before, after = "", ""
    if pattern is not None:
        before, _, after = full.partition(pattern)
    return {before + target + after: some[0] for target, some in parts.items()}


def _applied(
    model: PreTrainedModel,
    name: str,
    converter: WeightConverter,
    operation: ConversionOps,
    parts: dict[str, list[RowTensor]],
) -> dict[str, list[RowTensor]]:
    """Return what one operation makes of sources by pattern."""
    sources, targets = converter.source_patterns, converter.target_patterns
    if isinstance(operation, MergeModulelist) and operation.dim == 0:
        return {
            operation.get_target_pattern(len(parts), pattern, targets): [_stacked(some)]
            for pattern, some in parts.items()
        }
    if isinstance(operation, Concatenate):
        some = [one for pattern in sources for one in parts.get(pattern, [])]
        return {operation.get_target_pattern(targets): [_joined(some, operation.dim)]}
    one = next(iter(parts.values()))[0]
    if isinstance(operation, Transpose):
        target = operation.get_target_pattern(parts, sources, targets)  # type: ignore[arg-type]
        dims = (operation.dim0, operation.dim1)
        if operation.check_dims and one.shape == tuple(model.get_parameter(name).shape):
            return {target: [one]}
        shape = list(one.shape)
        shape[dims[0]], shape[dims[1]] = shape[dims[1]], shape[dims[0]]
        return {target: [Turned((one,), tuple(shape), dims)]}
    if isinstance(operation, Chunk | Split):
        if isinstance(operation, Chunk):
            targets = operation.get_target_patterns(targets, config=model.config)
            size = -(-one.shape[operation.dim] // len(targets))
            sizes = [min(size, one.shape[operation.dim] - size * i) for i in range(len(targets))]
        else:
            names = [name.replace(targets[0], target) for target in targets]
            sizes = [model.get_parameter(n).shape[operation.dim] for n in names]
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        return {
            target: [_piece(one, operation.dim, begin, size)]
            for target, begin, size in zip(targets, begins, sizes, strict=True)
        }
    return _whole(model, name, converter, operation, parts)


def _stacked(parts: list[RowTensor]) -> RowTensor:
    return Stacked(tuple(parts), (len(parts), *parts[0].shape))


def _joined(parts: list[RowTensor], dim: int) -> RowTensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Joined(tuple(parts), tuple(shape), dim)


def _piece(whole: RowTensor, dim: int, begin: int, size: int) -> RowTensor:
    shape = list(whole.shape)
    shape[dim] = size
    return TensorSlice((whole,), tuple(shape), dim, begin)


def _whole(
    model: PreTrainedModel,
    name: str,
    converter: WeightConverter,
    operation: ConversionOps,
    parts: dict[str, list[RowTensor]],
) -> dict[str, list[RowTensor]]:
    """Let transformers run an operation on whole tensors; on `meta` for the shapes it gives."""

    def run(read: Callable[[RowTensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        made = operation.convert(
            {pattern: [read(one) for one in some] for pattern, some in parts.items()},
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
        return {t: some[0] if isinstance(some, list) else some for t, some in made.items()}

    def make(target: str) -> Callable[[], torch.Tensor]:
        return lambda: run(lambda one: one.rows(0, one.shape[0]))[target]

    used = tuple(one for some in parts.values() for one in some)
    on_meta = run(lambda one: torch.empty(one.shape, dtype=FLOATS[one.dtype], device="meta"))
    return {
        target: [Whole(used, tuple(tensor.shape), make(target))]
        for target, tensor in on_meta.items()
    }
