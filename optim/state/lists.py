"""Lists of tensors: how many are stepped together, and writes that a refused step does not make.

On a CPU tensors are stepped one by one, as caches are small. On a device a launch costs what a million entries do, so
many are stepped together by torch's foreach operations, each of which is a function of its own tensor alone. Products
are not batched: their bits would depend on the batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TOGETHER = 2**27  # entries that are stepped together on a device; a temporary of them in fp32 takes 512 MiB


def batches(weights: Sequence[Tensor], most: int = TOGETHER) -> Iterator[slice]:
    """Tensors that are stepped together: one on a CPU, elsewhere as many as have `most` entries."""
    start, entries = 0, 0
    for i, weight in enumerate(weights):
        if i > start and (weight.device.type in ("cpu", "meta") or entries + weight.numel() > most):
            yield slice(start, i)
            start, entries = i, 0
        entries += weight.numel()
    if weights:
        yield slice(start, len(weights))


def each(value: Any, count: int) -> list[Any]:
    """A number for each of `count` tensors, of one for all or a tensor [count]."""
    return list(value.unbind()) if isinstance(value, Tensor) and value.ndim else [value] * count


def pick(value: Any, places: list[int]) -> Any:
    """Some of the numbers of a tensor; of one for all, that."""
    return torch.stack([value[i] for i in places]) if isinstance(value, Tensor) and value.ndim else value


@contextmanager
def kept_unless(applied: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """What is written to the tensors within it counts if `applied` is None or 1; if it is 0 they keep every bit."""
    if applied is None or not tensors:
        yield
        return
    scalars = [tensor for tensor in tensors if not tensor.ndim]
    others = [tensor for tensor in tensors if tensor.ndim]
    before = [torch.empty_like(tensor) for tensor in others]
    for same in by_dtype(others, range(len(others))):
        torch._foreach_copy_([before[i] for i in same], [others[i] for i in same])
    numbers = torch.stack(scalars) if scalars else None  # [scalars]
    yield
    put_back(others, before, applied)
    if numbers is not None:
        yes = applied.bool()
        torch._foreach_copy_(scalars, list(torch.where(yes, torch.stack(scalars), numbers).unbind()))


def put_back(tensors: list[Tensor], before: list[Tensor], applied: Tensor) -> None:
    """tensor <- before where `applied` is 0; `before` is used up.

    One launch for many, which does nothing where the step is applied: the first step of torch's fused SGD takes its
    gradients over into its momenta.
    """
    alike = [
        i for i, (t, old) in enumerate(zip(tensors, before, strict=True))
        if t.is_floating_point() and t.stride() == old.stride()
    ]  # fmt: skip
    for same in by_dtype(tensors, alike):
        old, new = ([values[i] for i in same] for values in (before, tensors))
        fused_sgd(old, old, new, lr=0.0, momentum=1.0, found_inf=applied.float())
    for i in set(range(len(tensors))) - {*alike}:
        torch.where(applied.bool(), tensors[i], before[i], out=tensors[i])


@torch.compiler.disable  # for torch cannot trace it
def fused_sgd(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], lr: Any, momentum: float, found_inf: Tensor
) -> None:
    """A first step of torch's fused SGD, which writes nothing where `found_inf` is 1."""
    options: dict[str, Any] = dict(weight_decay=0.0, dampening=0.0, nesterov=False, maximize=False, is_first_step=True)
    torch._fused_sgd_(weights, grads, momenta, lr=lr, momentum=momentum, found_inf=found_inf, **options)


def by_dtype(tensors: list[Tensor], places: Sequence[int]) -> list[list[int]]:
    """Places in a list, those of tensors of one dtype together."""
    found: dict[torch.dtype, list[int]] = {}
    for i in places:
        found.setdefault(tensors[i].dtype, []).append(i)
    return list(found.values())


def refused(applied: Tensor) -> Tensor:
    """The `found_inf` of torch's fused kernels: they write nothing where it is 1. Also the way back."""
    return 1 - applied.float()
