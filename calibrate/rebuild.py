"""The names of torch that stand in checkpoints, and how tensors come of them: as views whose extent was checked.

    element (i_1 .. i_d) of a tensor is element  offset + sum_k i_k stride_k  of its storage,

so with all numbers non-negative the last one that it reaches is offset + sum_k (size_k - 1) stride_k, which must exist.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .unpickle import DamagedError, Foreign, Known, Machine

STEPS_OF_A_TENSOR = 20  # what one costs in time and memory, beside the numbers and texts of a pickle

TYPED = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
# Types that torch keeps in storages without a type.
UNTYPED = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32", "uint64")
DTYPES = {str(dtype): dtype for dtype in (*TYPED.values(), *(getattr(torch, name) for name in UNTYPED))}


@dataclass(frozen=True)
class StorageKind:
    """A storage's class; `dtype` None: torch's untyped one, which counts bytes."""

    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class Storage:
    """What a pickle says of a storage: its key in the file, and how many elements it has."""

    key: str
    dtype: torch.dtype | None
    count: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * (self.dtype.itemsize if self.dtype else 1)


class Storages(Protocol):
    """Where tensors find their storages."""

    def elements(self, storage: Storage, dtype: torch.dtype) -> Tensor:
        """All of a storage, (n,)."""

    def spend(self, size: int) -> None:
        """Note that a tensor views `size` more bytes."""


class Rebuilder:
    """Runs one pickle with torch's names. Without storages tensors are Foreign, and `declared` has what they named."""

    def __init__(self, storages: Storages | None) -> None:
        self.storages = storages
        self.declared: dict[str, Storage] = {}
        builds: dict[str, Callable[..., Any]] = {
            "torch.Size": _shape,
            "torch._utils._rebuild_tensor": self._plain,
            "torch._utils._rebuild_tensor_v2": self._plain,
            "torch._utils._rebuild_tensor_v3": self._untyped,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._tensor._rebuild_from_type_v2": self._with_attributes,
        }
        known = {name: Known(name, build) for name, build in builds.items()}
        self.machine = Machine(known | DTYPES | STORAGES, self._storage)

    def _storage(self, identity: Any) -> Storage | Foreign:
        """A persistent id: ("storage", kind, key, device, count), before torch 1.6 with what it is part of."""
        if not isinstance(identity, tuple) or not identity:
            raise DamagedError("a reference to nothing")
        if identity[0] == "module":  # a class with its source code
            return Foreign("a pickled module")
        if len(identity) not in (5, 6) or identity[0] != "storage":
            raise DamagedError("a reference to what is no storage")
        _, kind, key, _, count, *whole = identity
        if whole and whole[0] is not None:
            raise DamagedError("a storage inside another, as torch wrote before 0.2")
        if not isinstance(kind, StorageKind) or not isinstance(key, str) or not _sizes((count,)):
            raise DamagedError("a reference to what is no storage")
        storage = Storage(key, kind.dtype, count)
        self.declared.setdefault(key, storage)
        return storage

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: Any) -> Tensor | Foreign:
        if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
            raise DamagedError("a tensor without a storage")
        if not (_sizes(shape) and _sizes(stride) and _sizes((offset,)) and len(shape) == len(stride) <= 64):
            raise DamagedError("a tensor whose shape is none")
        self.machine.spend(STEPS_OF_A_TENSOR)
        if self.storages is None:
            return Foreign("torch.Tensor")
        elements, count = self.storages.elements(storage, dtype), 1
        for n in shape:
            count *= n
        if count and offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) >= len(elements):
            raise DamagedError("a tensor that is larger than its storage")
        self.storages.spend(count * dtype.itemsize)
        return elements.as_strided(shape, stride, offset if count else 0)

    def _plain(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
        """_rebuild_tensor; _v2 has requires_grad, hooks and the bits of complex views behind."""
        return _flagged(self._tensor(storage, offset, shape, stride, getattr(storage, "dtype", None)), *rest)

    def _untyped(self, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
        """_rebuild_tensor_v3; the type stands behind the hooks."""
        requires_grad, hooks, dtype, *bits = rest
        return _flagged(self._tensor(storage, offset, shape, stride, dtype), requires_grad, hooks, *bits)

    def _with_attributes(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """_rebuild_from_type_v2: a tensor that carries attributes, which are dropped."""
        rebuilds = (self._plain, self._untyped)
        if not isinstance(kind, Foreign) or not isinstance(function, Known) or function.build not in rebuilds:
            return Foreign("a tensor of another class")
        tensor = self.machine.call(function, arguments)
        if kind.name == "torch.nn.parameter.Parameter":
            return _parameter(tensor, isinstance(tensor, Tensor) and tensor.requires_grad)
        return tensor if kind.name in ("torch.Tensor", "torch._tensor.Tensor") else Foreign(kind.name)


def _sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _shape(values: Any = ()) -> torch.Size:
    if not _sizes(values):
        raise DamagedError("a torch.Size that is none")
    return torch.Size(values)


def _flagged(tensor: Tensor | Foreign, requires_grad: Any = False, hooks: Any = None, bits: Any = None) -> Any:
    if bits is not None and bits != {}:
        return Foreign("a conjugate or negative view")
    if requires_grad is True and isinstance(tensor, Tensor) and _differentiable(tensor):
        tensor.requires_grad_()
    return tensor


def _parameter(tensor: Any, requires_grad: Any, *rest: Any) -> Any:
    """_rebuild_parameter, and _with_state; attributes are dropped."""
    if not isinstance(tensor, Tensor):
        return Foreign("torch.nn.Parameter")
    return nn.Parameter(tensor.detach(), requires_grad is True and _differentiable(tensor))


def _differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


STORAGES = {
    f"{module}.{kind}Storage": StorageKind(dtype) for module in ("torch", "torch.cuda") for kind, dtype in TYPED.items()
} | {"torch.storage.UntypedStorage": StorageKind(None)}
