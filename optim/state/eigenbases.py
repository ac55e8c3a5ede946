"""Bases of both sides of a matrix: the eigenvectors of running means of G G^T and G^T G, as SOAP (2409.11321) has them.

The state has, for each side that has a basis, the mean "gram.SIDE" and the vectors "basis.SIDE", both square and in
fp32 at least. What has no basis is left alone by `down` and `up`.
"""

from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.storage import load, store, wide
from thriftlab.optim.state.torch_adamw import MOMENTS

DIMS = {"left": 0, "right": 1}


def sides(shape: tuple[int, ...], group: dict[str, Any]) -> list[str]:
    """The sides of a tensor of this shape that have a basis: those of a matrix that are not too long."""
    return [side for side, dim in DIMS.items() if len(shape) == 2 and shape[dim] <= group["max_precond_dim"]]


def eigenbases_spec(shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Spec:
    squares = {side: ((shape[DIMS[side]],) * 2, wide(dtype)) for side in sides(shape, group)}
    return {f"{kind}.{side}": square for side, square in squares.items() for kind in ("gram", "basis")}


def has_bases(state: State, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
    """Whether a state has the bases of a tensor of this shape, and no other ones."""
    kept = {key for key in state if key.startswith(("gram.", "basis."))}
    return kept == eigenbases_spec(shape, torch.float32, group).keys()


def begin(grad: Tensor, state: State, group: dict[str, Any]) -> None:
    """Means of one gradient, and their eigenvectors, largest first.

    A matrix that is not square has a null space, and eigenvectors in it are arbitrary: rounding would choose them. Here
    they follow from the others.
    """
    for side in sides(tuple(grad.shape), group):
        state[f"gram.{side}"] = gram(grad, side).mul_(1 - decay_of(group))
        vectors = torch.linalg.eigh(gram(grad.double(), side)).eigenvectors.flip(1)
        vectors = torch.linalg.qr(vectors[:, : min(grad.shape)], mode="complete").Q
        state[f"basis.{side}"] = vectors.to(wide(grad.dtype)).contiguous()


def accumulate(grad: Tensor, state: State, group: dict[str, Any]) -> None:
    for side in DIMS:
        if f"gram.{side}" in state:
            state[f"gram.{side}"].lerp_(gram(grad, side), 1 - decay_of(group))


def decay_of(group: dict[str, Any]) -> float:
    return group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]


def gram(grad: Tensor, side: str) -> Tensor:
    """G G^T or G^T G; where squares of G are too large, so small that means and products of it are finite."""
    grad = grad.to(wide(grad.dtype))
    most = torch.finfo(grad.dtype).max / 4 / max(*grad.shape, 1)
    return (grad @ grad.T if side == "left" else grad.T @ grad).nan_to_num_(0.0).clamp_(-most, most)


def turn(state: State) -> None:
    """A step of power iteration, and the moments in the new bases; V has the old numbers for new vectors."""
    first, second = up(load(state, MOMENTS[0]), state), load(state, MOMENTS[1])
    for side, dim in DIMS.items():
        if f"gram.{side}" not in state:
            continue
        vectors, mean = state[f"basis.{side}"], state[f"gram.{side}"]
        image = mean @ vectors
        order = (vectors * image).sum(0).argsort(descending=True, stable=True)
        second = second.index_select(dim, order)
        state[f"basis.{side}"] = torch.linalg.qr(image[:, order]).Q.contiguous()
    for name, moment in zip(MOMENTS, (down(first, state), second), strict=True):
        store(state, name, load(state, name).copy_(moment))


def down(matrix: Tensor, state: State) -> Tensor:
    """Q_L^T X Q_R"""
    matrix = state["basis.left"].T.to(matrix.dtype) @ matrix if "basis.left" in state else matrix
    return matrix @ state["basis.right"].to(matrix.dtype) if "basis.right" in state else matrix


def up(matrix: Tensor, state: State) -> Tensor:
    """Q_L X Q_R^T"""
    matrix = state["basis.left"].to(matrix.dtype) @ matrix if "basis.left" in state else matrix
    return matrix @ state["basis.right"].to(matrix.dtype).T if "basis.right" in state else matrix
