"""The most bytes that tensors hold at once within a piece of code, on any device and on fake tensors alike.

Fake tensors have shapes and devices and no memory, so what a step at any size would hold is known before it is tried.
What an operator holds inside of itself is not seen.
"""

import weakref
from collections.abc import Iterable

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """`peak`: the most bytes of storages, made within it, that were alive at once; those of `known` tensors apart."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.kept = [tensor.untyped_storage() for tensor in known]  # so that no address of theirs is given out again
        self.alive = {storage._cdata for storage in self.kept}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self.alive:
            self.alive.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, address, size)

    def drop(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size
