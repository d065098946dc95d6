"""Counts the memory of tensors on torch's meta device, as if they had any."""

from __future__ import annotations

import platform
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from l2l_scale.tree import tree_leaves

META = torch.device("meta")

Place: TypeAlias = Literal["host", "device"]

_CUDA_BLOCK = 512
_HEAP_LIMIT = 32 << 20
_HEAP_FACTOR = 1.45 if platform.libc_ver()[0] == "glibc" else 1.0
"""glibc takes tensors below 32 MiB from a heap that gets full of holes and hardly ever shrinks: measured, it
holds 1.3 to 1.6 times what was ever alive in it. Larger tensors have pages of their own."""


class Tag(NamedTuple):
    """What a storage is counted as."""

    place: Place
    """Where it lies; in a run on the CPU both are one memory."""
    part: str
    """What it belongs to."""


RESIDENT = Tag("device", "data set")
_WINDOW = Tag("device", "window")
_HOLES = Tag("host", "holes in the heap")


class _Storage(NamedTuple):
    reference: weakref.ref[torch.UntypedStorage]
    tag: Tag
    size: int
    on_heap: bool


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, counts the storages that are alive, and the most at any time in each phase.

    Args:
        shared: whether host and device are one memory, as in a run on the CPU.
    """

    def __init__(self, shared: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shared = shared
        self.phase = ""
        self.peak: dict[tuple[Place, str], Counter[Tag]] = {}
        """From place and phase to what was alive there at the worst moment. All is in "host" if shared."""
        self._tag = _WINDOW
        self._now: Counter[Tag] = Counter()
        self._heap = self._heap_peak = 0
        self._storages: dict[int, _Storage] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # a question to a tensor without content
            return args[0].dtype != torch.bool and (1.0 if args[0].is_floating_point() else 0)
        grown = self.count(tree_leaves((args, kwargs)), RESIDENT)  # it was there before
        result = func(*args, **(kwargs or {}))
        if self.count(tree_leaves(result), self._tag) or grown:
            self._note_peak()
        return result

    @contextmanager
    def counting(self, tag: Tag) -> Iterator[None]:
        """Count what is new inside under this tag."""
        before, self._tag = self._tag, tag
        yield
        self._tag = before

    def count(self, leaves: list[Any], tag: Tag) -> bool:
        """Count those leaves that are tensors with storages not yet known; whether there are any."""
        grown = False
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.device != META:
                continue
            storage = leaf.untyped_storage()
            if storage._cdata not in self._storages:
                self._add(storage, tag)
                grown = True
        return grown

    def move(self, tensors: list[Tensor], tag: Tag) -> int:
        """Count these tensors' storages under another tag from now on; their bytes."""
        keys = {tensor.untyped_storage()._cdata for tensor in tensors}
        for key in keys:
            storage = self._storages[key]
            self._now[storage.tag] -= storage.size
            self._now[tag] += storage.size
            self._storages[key] = storage._replace(tag=tag)
        return sum(self._storages[key].size for key in keys)

    def _add(self, storage: torch.UntypedStorage, tag: Tag) -> None:
        key, size = storage._cdata, storage.nbytes()
        on_host = self.shared or tag.place == "host"
        if not on_host:
            size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK
        on_heap = on_host and size < _HEAP_LIMIT
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._storages[key] = _Storage(reference, tag, size, on_heap)
        self._now[tag] += size
        self._heap += size * on_heap
        self._heap_peak = max(self._heap_peak, self._heap)

    def _forget(self, key: int) -> None:
        storage = self._storages.pop(key)
        self._now[storage.tag] -= storage.size
        self._heap -= storage.size * storage.on_heap

    def _note_peak(self) -> None:
        places: tuple[Place, ...] = ("host",) if self.shared else ("host", "device")
        for place in places:
            now = Counter({tag: size for tag, size in self._now.items() if self.shared or tag.place == place})
            if place == "host":
                now[_HOLES] = int(_HEAP_FACTOR * self._heap_peak) - self._heap
            if severity(now) > severity(self.peak.get((place, self.phase), Counter())):
                self.peak[place, self.phase] = now


def severity(moment: Counter[Tag]) -> tuple[int, int]:
    """How much a moment takes; of moments in a heap that was larger before, the fullest counts."""
    return moment.total(), moment.total() - moment[_HOLES]
