"""Around launches in triton's interpreter: errors that a GPU would not forgive, and that the interpreter does not see.

    with guard(*tensors) as launches:
        launcher(...)
    assert launches == ["step_entries"]

`tensors` are those that a table of pointers names; what a launch gets as an argument is known. GuardError where

- a lane of a load or store that the mask lets through lies outside of all these tensors;
- a lane that the mask holds back, and that has no `other`, is used: it is 0 here, anything on a GPU, and so NaN, or the
  least integer, under the guard;
- two programs write one byte, one reads what another writes, or one reads back what it wrote: the interpreter runs
  programs and their lanes in turn, a GPU in any order;
- one store writes an address twice, or there is an atomic operation, whose sums depend on that order;
- a number or an address is no multiple of what `tl.multiple_of` promises: wide accesses are made on its word.

The interpreter follows pointers to the memory of the CPU only, so all tensors are CPU tensors.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

ATOMICS = ("create_atomic_rmw", "create_atomic_cas")


class GuardError(AssertionError):
    pass


def reach(tensor):
    """The bytes from the first to behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def width_of(pointers):
    """Bytes of an element behind a pointer."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def addresses_of(pointers, mask):
    """Where the lanes point that the mask lets through."""
    addresses, through = np.broadcast_arrays(pointers.data, mask.data)
    return addresses[through.astype(bool)]  # a mask that was computed may be integers here


def poison(pointers):
    """What a lane may hold that nothing was loaded into."""
    kind = pointers.get_element_ty()
    held = interpreter._get_np_dtype(kind)
    if kind == tl.bfloat16:
        value = 0x7FC0  # NaN; the interpreter holds bf16 as uint16
    else:
        value = np.nan if held.kind == "f" else True if held.kind == "b" else np.iinfo(held).min or np.iinfo(held).max
    return TensorHandle(np.full(pointers.data.shape, value, held), kind)


class Launch:
    """What one launch did to memory: of every load and store its program, its addresses and the bytes of each."""

    def __init__(self, tensors):
        regions = sorted(reach(tensor) for tensor in tensors if tensor.numel())
        self.starts = np.array([start for start, _ in regions], np.uint64)
        self.stops = np.maximum.accumulate(np.array([stop for _, stop in regions], np.uint64))
        self.program = -1
        self.loads, self.stores = [], []

    def touch(self, kind, pointers, mask):
        addresses, width = addresses_of(pointers, mask), width_of(pointers)
        region = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        if (region < 0).any() or (addresses + np.uint64(width) > self.stops[region]).any():
            raise GuardError(f"{kind} out of bounds in program {self.program}")
        if kind == "store" and np.unique(addresses).size < addresses.size:
            raise GuardError(f"a store of program {self.program} writes one address twice")
        done = self.loads if kind == "load" else self.stores
        done.append((addresses, width, self.program, len(self.loads) + len(self.stores)))

    def judge(self):
        """Whether the order of the programs, or of the lanes of one, could matter."""
        if not self.stores:
            return
        unit = min(width for _, width, _, _ in self.loads + self.stores)
        written, writer, when = spread(self.stores, unit)
        if ((written[1:] == written[:-1]) & (writer[1:] != writer[:-1])).any():
            raise GuardError("a race: two programs write one address")
        read, reader, then = spread(self.loads, unit)
        place = np.searchsorted(written, read) % written.size  # the first write of an address is enough
        again = written[place] == read
        if (again & (writer[place] != reader)).any():
            raise GuardError("a race: one program reads what another writes")
        if (again & (when[place] < then)).any():
            raise GuardError("a race: a program reads back what its lanes wrote")


def spread(accesses, unit):
    """Of every `unit` bytes that were touched their address, the program and when, in order of address."""
    columns = [
        ((addresses[:, None] + np.arange(0, width, unit, dtype=np.uint64)).ravel(), program, when)
        for addresses, width, program, when in accesses
    ]
    sizes = [addresses.size for addresses, _, _ in columns]
    addresses = np.concatenate([addresses for addresses, _, _ in columns])
    programs, times = (np.repeat([column[i] for column in columns], sizes) for i in (1, 2))
    order = np.lexsort((times, programs, addresses))
    return addresses[order], programs[order], times[order]


@contextmanager
def guard(*tensors) -> Iterator[list[str]]:
    """Guards every launch inside; gives the names of the kernels as they are launched."""
    launches, now = [], None
    call, begin = GridExecutor.__call__, GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    turn = InterpreterBuilder.set_grid_idx

    def guarded_begin(self, arguments, keywords):
        nonlocal now
        here = begin(self, arguments, keywords)
        given = [*here[0], *here[1].values()]
        now = Launch([*tensors, *(tensor for tensor in given if isinstance(tensor, torch.Tensor))])
        launches.append(self.fn.__name__)
        return here

    def guarded_load(self, pointers, mask, other, *rest):
        now.touch("load", pointers, mask)
        return load(self, pointers, mask, poison(pointers) if other is None else other, *rest)

    def guarded_store(self, pointers, value, mask, *rest):
        now.touch("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def guarded_turn(self, *place):
        now.program += 1
        return turn(self, *place)

    def guarded_call(self, *arguments, **keywords):
        try:
            call(self, *arguments, **keywords)
        except InterpreterError as error:
            raise error.__cause__ or error from None
        now.judge()

    with ExitStack() as patches:
        replaced = {
            GridExecutor: {"__call__": guarded_call, "_init_args_hst": guarded_begin},
            TensorHandle: {"set_attr": check_promise},
            InterpreterBuilder: {
                "create_masked_load": guarded_load, "create_masked_store": guarded_store,
                "set_grid_idx": guarded_turn, **dict.fromkeys(ATOMICS, refuse_atomics),
            },
        }  # fmt: skip
        for owner, methods in replaced.items():
            for name, method in methods.items():
                patches.enter_context(patch.object(owner, name, method))
        yield launches


def refuse_atomics(*_):
    raise GuardError("an atomic operation")


def check_promise(handle, name, values):
    if name == "tt.divisibility" and handle.data.size == 1 and handle.data.item() % values[0]:
        raise GuardError(f"{handle.data.item()} is promised to be a multiple of {values[0]}")
