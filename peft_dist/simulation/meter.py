"""Count what operations do: bytes alive, bytes that collectives carry, and FLOPs.

Counts real and fake tensors alike, so that a simulation can be compared with what it stands for.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

COLLECTIVES = ("c10d::", "_c10d_functional::")

_DEVICE = torch.ops.prim.device.default


class Meter(TorchDispatchMode):
    """Counts while it is entered; tensors that were made before are not known to it.

    Attributes:
        phase: What the counts that follow are booked under.
        live_bytes: Bytes of all storages that are alive.
        peak_bytes: Most of them at once, by phase.
        collectives: By phase and operation, how many there were.
        carried_bytes: By phase and operation, bytes of the larger side of each: the whole tensor
            of a gather, the vector of a sum.
        flops: By phase, operations of matrix products and attention.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        super().__init__()  # type: ignore[no-untyped-call]  # it is torch's
        self.phase = ""
        self.live_bytes = 0
        self.peak_bytes: Counter[str] = Counter()
        self.collectives: Counter[tuple[str, str]] = Counter()
        self.carried_bytes: Counter[tuple[str, str]] = Counter()
        self.flops: Counter[str] = Counter()
        self._known = WeakIdKeyDictionary()
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

    def __enter__(self) -> "Meter":
        """Begin to count; FSDP2 frees and makes memory by resizing storages."""
        meter, resize = self, self._resize

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage in meter._known:
                meter._change(meter._known[storage][0], size)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count it."""
        if func is _DEVICE:  # more than half of all calls; asked of fake tensors, it costs most
            asked = args[0]
            return asked.fake_device if isinstance(asked, FakeTensor) else func(*args)
        kwargs = kwargs or {}
        name: str = func._schema.name
        out = func(*args, **kwargs)
        if name.startswith(COLLECTIVES):
            sizes = [leaf.nbytes for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)]
            key = self.phase, name.partition("::")[2]
            self.collectives[key] += 1
            self.carried_bytes[key] += max(sizes, default=0)
        self.flops[self.phase] += operation_flops(name, args)
        for leaf in tree_leaves(out):
            if _is_tensor(leaf):
                self._track(leaf)
        return out

    def _track(self, tensor: Any) -> None:
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                inner = getattr(tensor, name)
                if _is_tensor(inner):  # a DTensor names its mesh too
                    self._track(inner)
            return
        if not isinstance(tensor, FakeTensor) and tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        cell = [0]
        self._known[storage] = (cell, weakref.ref(storage, lambda _: self._change(cell, 0)))
        self._change(cell, int(storage.nbytes()))

    def _change(self, cell: list[int], size: int) -> None:
        self.live_bytes += size - cell[0]
        cell[0] = size
        self.peak_bytes[self.phase] = max(self.peak_bytes[self.phase], self.live_bytes)


def operation_flops(name: str, args: tuple[Any, ...]) -> int:
    """Return the FLOPs of a matrix product or of causal attention; 0 of anything else."""
    if name == "aten::mm":
        return 2 * int(args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
    if name in ("aten::addmm", "aten::addmm_"):
        return 2 * int(args[1].shape[0] * args[1].shape[1] * args[2].shape[1])
    if name == "aten::bmm":
        batch, rows, inner = args[0].shape
        return 2 * int(batch * rows * inner * args[1].shape[2])
    if "_scaled_dot_product" in name:
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        products = 10 if backward else 4
        batch, heads, length, width = query.shape
        # A token sees half of the row on average.
        return products * int(batch * heads * length * key.shape[2] * width) // 2
    return 0


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
