"""What a GPU and its host would do: launches, host reads, copies, dtypes of products, devices of collectives.

Only in the process of `fake_cuda`. Small tensors that are made of numbers have their true values, so counters count.
"""

import functools
import re
import sys
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from tests.fake_cuda import stand_ins
from tests.fake_cuda.stand_ins import pinned, waits

QUIET = {  # no kernel: memory alone, or the shape
    "_unsafe_view", "detach_", "empty", "empty_like", "empty_strided", "is_pinned", "is_same_size", "lift",
    "lift_fresh", "new_empty", "new_empty_strided", "record_stream", "resize_", "set_",
}  # fmt: skip
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_scaled_mm", "mv", "addmv"}
SHAPED = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}  # by the values: the host waits
CHECKED = {"_linalg_eigh", "_linalg_svd", "_linalg_check_errors"}  # the host looks whether they went well
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "gather", "scatter", "reduce_scatter",
    "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv",
)  # fmt: skip
SMALL = 2**16  # entries of a tensor up to which its values are known


class Counted(NamedTuple):
    """All by `place`, the line of the product that asked, or as said."""

    launches: Counter  # by the name of the operation
    where: Counter  # launches by place
    reads: Counter  # of the device by the host, which waits for it
    to_device: Counter  # copies by (place, whether the host waits, as it does for memory that is not pinned)
    to_host: Counter
    products: Counter  # by (dtype, place)
    collectives: Counter  # by (name, device, dtype)
    scalars: Counter  # what the host hands to launches, by (operation, numbers, place)


class Counts(TorchDispatchMode):
    """Counts what happens within it. One launch for each operation, a foreach, fused or attention one included."""

    true: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # fake tensor -> the real one

    def __init__(self):
        super().__init__()
        self.counted = Counted(*(Counter() for _ in Counted._fields))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = tensors((args, kwargs))
        on_device = [t for t in given if t.is_cuda]
        if name == "_local_scalar_dense":
            return self.read(args[0])
        if on_device and (name in SHAPED or (name == "index" and has_mask(args[1]))):
            raise RuntimeError(f"{place()} waits for the device: {name}, whose shape depends on values")
        if on_device and name in CHECKED:
            self.counted.reads[place()] += 1
        if on_device and name == "equal":
            self.counted.reads[place()] += 1
            return True
        if name in ("_fused_sgd_", "_fused_adamw_"):  # some of which torch cannot run on fake tensors
            self.note(func, name, args, kwargs, given, [])
            return None
        pins = kwargs.get("pin_memory")
        kwargs = {**kwargs, "pin_memory": False} if pins else kwargs
        result = func(*args, **kwargs)
        made = tensors(result)
        small = all(t.numel() <= SMALL for t in made)
        if small and (known := self.known(func, args, kwargs)) is not None:
            for fake, real in zip(made, tensors(known), strict=True):
                if isinstance(fake, FakeTensor):
                    self.true[fake] = real
        for fake in made:
            if isinstance(fake, FakeTensor):
                fake.constant = None  # torch's own way to know a value, which reading would take
                if pins:
                    pinned[fake] = True
        if on_device or any(t.is_cuda for t in made):
            self.note(func, name, args, kwargs, given, made)
        return result

    def read(self, tensor: Tensor) -> bool | int | float:
        """What `.item()` gives: the truth if it is known, else 1."""
        if tensor.is_cuda:
            self.counted.reads[place()] += 1
        if (real := true_of(tensor)) is not None:
            with unset_fake_temporarily():
                return real.item()
        return one(tensor.dtype)

    def known(self, func, args, kwargs) -> Any:
        """The result for real, on the CPU, of an operation on tensors whose values are all known; of others all are
        what is asked of them."""
        given = tensors((args, kwargs))
        if func._schema.name == "aten::all" and true_of(given[0]) is None:
            with unset_fake_temporarily():
                return torch.tensor(True)
        if any(true_of(t) is None for t in given) or (not given and func._schema.name.startswith("aten::empty")):
            return None
        args, kwargs = tree_map(for_real, (args, kwargs))
        with unset_fake_temporarily():
            return func(*args, **kwargs)

    def note(self, func, name: str, args, kwargs, given: list[Tensor], made: list[Tensor]) -> None:
        if name in ("_to_copy", "copy_"):
            source, target = (args[1], args[0]) if name == "copy_" else (args[0], made[0])
            if source.is_cuda != target.is_cuda:
                soon = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
                waits = not (soon and (target if source.is_cuda else source) in pinned)
                (self.counted.to_host if source.is_cuda else self.counted.to_device)[place(), waits] += 1
        if name in PRODUCTS:
            factor = tensors(args)[-1]  # which an `out` of another dtype is not
            self.counted.products[str(factor.dtype).removeprefix("torch."), place()] += 1
        if func.namespace != "prim" and name not in QUIET and not func.is_view:
            self.counted.scalars[name, numbers((args, kwargs)), place()] += 1
            times = 1 if is_fast(name, args) else len(args[0])
            self.counted.launches[name] += times
            self.counted.where[place()] += times

    def __enter__(self):
        self.waited = len(waits)
        self.real = {name: getattr(dist, name) for name in COLLECTIVES}
        stand_ins.watching.append(self.launched)
        for name in COLLECTIVES:
            setattr(dist, name, self.collective(name))
        return super().__enter__()

    def __exit__(self, *error):
        self.counted.reads["synchronize"] += len(waits) - self.waited
        stand_ins.watching.remove(self.launched)
        for name, function in self.real.items():
            setattr(dist, name, function)
        return super().__exit__(*error)

    def launched(self, kernel: str, *args, grid, warmup, **kwargs) -> None:
        """A Triton kernel, of which it is known what `begin_step` does to counters."""
        if kernel == "begin_step" and (table := true_of(args[0])) is not None:
            with _disable_current_modes():
                for address in filter(None, table[:, [13, 15]].flatten().tolist()):
                    if (counter := self.true.get(stand_ins.at(address))) is not None:
                        counter.add_(true_of(args[3]) != 0)
        self.counted.scalars[kernel, numbers((args, kwargs, grid)), place()] += 1
        self.counted.launches[kernel] += 1
        self.counted.where[place()] += 1

    def collective(self, name: str):
        """Stands for a collective operation: notes its tensors, and is done."""

        def call(*args, async_op: bool = False, **kwargs):
            for tensor in tensors((args, kwargs)):
                self.counted.collectives[name, tensor.device.type, str(tensor.dtype).removeprefix("torch.")] += 1
            return Done() if async_op else None

        return call


def is_fast(name: str, args: tuple) -> bool:
    """Whether a foreach operation is one launch: lists that are alike, or else torch takes them one by one."""
    if not name.startswith("_foreach_"):
        return True
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], Tensor)]
    rows = list(zip(*lists, strict=True))
    shapes = all(len({(t.shape, t.stride()) for t in row}) == 1 for row in rows)
    return shapes and (name == "_foreach_copy_" or len({t.dtype for row in rows for t in row}) == 1)


class Done:
    def wait(self) -> None:
        pass


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def numbers(tree: Any) -> tuple:
    """The numbers in it, and those in tensors of the CPU."""
    return tuple(
        str(true_of(leaf)) if isinstance(leaf, Tensor) else leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, int | float) or (isinstance(leaf, Tensor) and not leaf.is_cuda)
    )


def true_of(tensor: Tensor) -> Tensor | None:
    """The real tensor that a fake one stands for, if it is known; a real one is itself."""
    return Counts.true.get(tensor) if isinstance(tensor, FakeTensor) else tensor


def one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def for_real(x: Any) -> Any:
    """An argument of an operation for the CPU."""
    return true_of(x) if isinstance(x, Tensor) else torch.device("cpu") if isinstance(x, torch.device) else x


def has_mask(index: Any) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in index)


def place() -> str:
    """The innermost line of the product that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        if part := part_of_product(frame.f_code.co_filename):
            return f"{part}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"


@functools.cache
def part_of_product(file: str) -> str | None:
    found = re.search(r".*/((?:kernels|data|optim|train|launch)/.+\.py)$", file)
    return found[1] if found and "site-packages" not in file and "/tests/" not in file else None


def to_device(model: nn.Module) -> nn.Module:
    """Every parameter and buffer of a model on "meta" becomes a fake one on "cuda"; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty_like(p, device="cuda"), requires_grad=p.requires_grad)
                module._parameters[name] = made[id(p)]
        for name, buffer in [*module._buffers.items()]:
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cuda")
    return model
