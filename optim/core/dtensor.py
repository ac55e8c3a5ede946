"""FSDP2 (`torch.distributed.fsdp.fully_shard`): parameters that are DTensors, cut by rows over the ranks of a mesh.

What is stepped entry by entry is stepped where it lies (fragments.py). Any other tensor has one rank, its owner, that
keeps its state: for a step the gradient and the weight are gathered, one tensor at a time, the owner makes the update
and sends it round. Neither changes a method, and a foreign loop sees an ordinary optimizer.

One surprise: a rank's `state_dict()` is its own part. Save one per rank, and resume with as many.
"""

from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from thriftlab.optim.core.fragments import Fragment, update_fragments
from thriftlab.optim.core.method import Method, downhill
from thriftlab.optim.core.owners import assign, items


def step_sharded(method: Method, names: list[str], weights: list[DTensor], group: dict[str, Any]) -> None:
    """Steps the parameters of a group that are DTensors and have a gradient. Collective over their mesh.

    Raises ValueError for a placement other than rows over a mesh of one dimension.
    """
    for name, p in zip(names, weights, strict=True):
        check_placement(name, p)
    named = list(zip(names, weights, strict=True))
    step_fragments(method, [pair for pair in named if method.elementwise(tuple(pair[1].shape), group)], group)
    owners = assign(items(method), weights[0].device_mesh.size())
    for name, p in named:
        if not method.elementwise(tuple(p.shape), group):
            step_owned(method, name, p, owners[name], group)


def step_fragments(method: Method, named: list[tuple[str, DTensor]], group: dict[str, Any]) -> None:
    """Steps the rows that this rank has, without a word to the others."""
    named = [(name, p) for name, p in named if p.to_local().numel()]
    fragments = [Fragment(name, tuple(p.shape), *entries(p)) for name, p in named]
    weights = [p.to_local().view(-1) for _, p in named]
    grads = [p.grad.to_local().reshape(-1) for _, p in named]  # type: ignore[union-attr]
    slopes = [downhill(weight, grad, group["maximize"]) for weight, grad in zip(weights, grads, strict=True)]
    update_fragments(method, fragments, weights, slopes, [method.state[p] for _, p in named], group)


def step_owned(method: Method, name: str, p: DTensor, owner: int, group: dict[str, Any]) -> None:
    """Steps a whole tensor on its owner; the others take their rows of it."""
    ranks = p.device_mesh.get_group()
    weight, grad = p.full_tensor(), p.grad.full_tensor()  # type: ignore[union-attr]
    if dist.get_rank(ranks) == owner:
        method.update([name], [weight], [downhill(weight, grad, group["maximize"])], [method.state[p]], group)
    dist.broadcast(weight, group=ranks, group_src=owner)
    start, stop = entries(p)
    p.to_local().copy_(weight.view(-1)[start:stop].view(p.to_local().shape))


def entries(p: DTensor) -> tuple[int, int]:
    """Where this rank's rows begin and end in the flat tensor: each rank has as many as the first, while there are."""
    mesh, row = p.device_mesh, p.numel() // max(p.shape[0], 1)
    most = -(-p.shape[0] // mesh.size())
    start = min(most * mesh.get_local_rank(), p.shape[0]) * row
    return start, start + p.to_local().numel()


def check_placement(name: str, p: DTensor) -> None:
    if p.device_mesh.ndim != 1 or tuple(p.placements) != (Shard(0),):
        raise ValueError(
            f"{name} is a DTensor with placements {tuple(p.placements)} on a mesh of {tuple(p.device_mesh.shape)} "
            "ranks; sharded parameters are supported where they are cut by rows, (Shard(dim=0),), over a mesh of one "
            "dimension: call fully_shard with such a mesh, without shard_placement_fn and without tensor parallelism"
        )
