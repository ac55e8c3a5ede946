"""Who steps what, where each tensor is stepped by one rank: a balance of work within a bound on the state.

One surprise: nobody is asked. What a tensor costs follows from its shape and the method's own `spec`, so every rank
finds the same owners by itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.optim.core.method import Method
from thriftlab.optim.core.split import SplitOptimizer, is_split, subspace_of
from thriftlab.optim.state.coordinates import CoordinateSubspace


class Item(NamedTuple):
    """What owning one parameter means."""

    name: str
    work: int  # operations of its step, up to a constant
    state_bytes: int


def items(optimizer: Method) -> list[Item]:
    """The parameters of all groups that take gradients, in order."""
    return [
        Item(name, work(optimizer, p, group), state_bytes(optimizer, p, group))
        for group in optimizer.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        if p.requires_grad
    ]


def work(optimizer: Method, weight: Tensor, group: dict[str, Any]) -> int:
    """Operations of one tensor's step, up to a constant: products with a matrix, or a walk over its entries."""
    if not (isinstance(optimizer, SplitOptimizer) and is_split(weight, group)):
        return weight.numel()
    subspace = group.get("subspace")
    walks = subspace == "blocks" or subspace and isinstance(subspace_of(group), CoordinateSubspace)
    return weight.numel() * (1 if walks else min(weight.shape))


def state_bytes(optimizer: Method, weight: Tensor, group: dict[str, Any]) -> int:
    """Bytes of one tensor's state by the method's spec; of an active one, where that comes and goes."""
    spec = optimizer.spec(tuple(weight.shape), weight.dtype, **group)
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values() if shape)


def assign(items: list[Item], world: int) -> dict[str, int]:
    """The owner of every parameter: the heaviest first, each to the rank with the least work that has room.

    A rank has room while its state is at most the mean over ranks; one with the least state always has. So no rank has
    more than total / world + the largest of one tensor, and with that the work is balanced (Graham's LPT, 1969).
    """
    mean = sum(item.state_bytes for item in items) / world
    owners, work, held = {}, [0] * world, [0] * world
    for item in sorted(items, key=lambda item: (-item.work, item.name)):
        rank = min((r for r in range(world) if held[r] <= mean), key=lambda r: (work[r], held[r]))
        owners[item.name] = rank
        work[rank] += item.work
        held[rank] += item.state_bytes
    return owners
