"""What a new basis means for what was kept: moments are carried over to it, and what changed is measured.

A subspace is asked for no more than down() and up(), so one's own is carried like the library's: the old coordinates'
identity matrix, taken up in the old basis and down in the new one, is the map T between the two.

One surprise: signs are mended in the moments, not in the basis. A singular vector and its negative span the same line,
so turning the first moment instead gives the same step, whatever the basis looks like inside.
"""

import math
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.state.coordinates import CoordinateSubspace
from thriftlab.optim.state.dense import DenseSubspace
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.storage import SECOND_MOMENTS, load, make_zero, store
from thriftlab.optim.state.subspaces import AnySubspace, Subspace, keeps_rows


def carry(
    subspace: AnySubspace, old: State, new: State, grad: Tensor, state: State,
    buffers: tuple[str, ...], group: dict[str, Any],
) -> None:  # fmt: skip
    """Takes the moments `buffers` over to a new basis.

    `project` expresses them in it: first moments by T, second moments by the squares of T's entries. `keep` leaves the
    numbers as they are; but a basis with arbitrary signs is no reason to turn round, so where a vector of it points
    away from its predecessor, the first moment's sign changes with it. `estimate` is for Adam: `estimated`.
    """
    if isinstance(subspace, CoordinateSubspace):
        if group["on_refresh"] == "keep":
            return
        moved = [project(load(state, buffer), subspace, old, new, like=grad) for buffer in buffers]
    else:
        if group["on_refresh"] == "keep" and not getattr(subspace, "arbitrary_signs", False):
            return
        change, rows = transfer(subspace, old, new, grad), keeps_rows(state[buffers[0]], grad)
        if group["on_refresh"] == "keep":
            signs = torch.where(change.diagonal() < 0, -1.0, 1.0)
            moved = [load(state, b) if b in SECOND_MOMENTS else flip(load(state, b), signs, rows) for b in buffers]
        elif group["on_refresh"] == "estimate":
            age = (state["step"] - state["start"]).clamp(min=1).double()
            first, second = (load(state, buffer) for buffer in buffers)
            moved = estimated(first, second, change, rows, age, group["betas"])
        else:
            moved = [turn(load(state, b), change.square() if b in SECOND_MOMENTS else change, rows) for b in buffers]
    make_zero(buffers, subspace.down(grad, new), state, group)
    for buffer, moment in zip(buffers, moved, strict=True):
        store(state, buffer, load(state, buffer).copy_(moment))


def estimated(
    first: Tensor, second: Tensor, change: Tensor, rows: bool, age: Tensor, betas: tuple[float, float]
) -> list[Tensor]:
    """Adam's moments, of `age` steps, as LDAdam (2410.16103) estimates them in a new basis: variances are turned, and
    means squared are squares of the turned means. With the old basis nothing changes.

    M <- T M;  V <- (1 - b2^t) |T^2 (V^ - M^^2) + (T M^)^2|                   ^ is bias-corrected, T^2 is T by entries
    """
    fresh, kept = ((1 - beta**age).to(first) for beta in betas)
    mean, variance = first / fresh, second / kept - (first / fresh).square()
    turned = turn(variance, change.square(), rows) + turn(mean, change, rows).square()
    turned = turned.abs().nan_to_num(nan=math.inf, posinf=math.inf)  # of squares that have overflowed
    return [turn(first, change, rows), kept * turned]


def project(moment: Tensor, subspace: CoordinateSubspace, old: State, new: State, like: Tensor) -> Tensor:
    """down_new(up_old(moment)): entries that stay in the subspace keep their moments, others start at zero."""
    whole = torch.zeros_like(like, dtype=moment.dtype)
    subspace.put(whole, subspace.where(whole, old), moment)
    return subspace.down(whole, new)


def transfer(subspace: DenseSubspace | Subspace, old: State, new: State, matrix: Tensor) -> Tensor:
    """T = down_new(up_old(identity))  # [r, r]: column j is where the j-th old vector lies in the new subspace."""
    identity = torch.zeros_like(subspace.down(matrix, old))
    identity.diagonal().fill_(1)
    image = subspace.down(subspace.up(identity, old), new)
    return image[: identity.shape[1]].T if keeps_rows(identity, matrix) else image[:, : identity.shape[0]]


def residual_energy(subspace: AnySubspace, basis: State, grad: Tensor) -> Tensor:
    """|G - up(down(G))|^2 / |G|^2"""
    small, whole = subspace.down(grad, basis), grad.float().square().sum()
    if isinstance(subspace, CoordinateSubspace):
        return 1 - small.float().square().sum() / whole.clamp(min=1e-30)
    return (grad - subspace.up(small, basis)).float().square().sum() / whole.clamp(min=1e-30)


def overlap(subspace: AnySubspace, old: State, new: State, grad: Tensor) -> Tensor:
    """|P_new^T P_old|^2 / r; 0 at the first refresh and for subspaces of one's own."""
    if old and isinstance(subspace, CoordinateSubspace):
        shared = project(torch.ones_like(subspace.down(grad, old)), subspace, old, new, like=grad).float()
        return shared.sum() / max(shared.numel(), 1)
    if old and isinstance(subspace, DenseSubspace):
        change = transfer(subspace, old, new, grad).float()
        return change.square().sum() / max(len(change), 1)
    return torch.zeros((), device=grad.device)


def flip(moment: Tensor, signs: Tensor, rows: bool) -> Tensor:
    """The coordinates of each row, or of each column, with their signs changed where `signs` is -1."""
    signs = signs.to(moment.dtype)
    return moment * signs if rows else moment * signs[:, None]


def turn(moment: Tensor, change: Tensor, rows: bool) -> Tensor:
    """`change` applied to the coordinates of each row, or of each column."""
    change = change.to(moment.dtype)
    return moment @ change.T if rows else change @ moment
