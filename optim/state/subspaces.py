"""The subspace of a matrix in which a rule keeps its moments: by name, or an object of one's own.

A `Subspace` is any object with refresh, down and up; a basis is a dict of tensors, which the optimizer keeps in its
state under "basis.". Three kinds come with the package: entries of the matrix (coordinates.py), directions of its
shorter side (dense.py), and whole matrices of a group by turns (blocks.py).
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from thriftlab.optim.state.blocks import Blocks
from thriftlab.optim.state.coordinates import COORDINATES, CoordinateSubspace
from thriftlab.optim.state.dense import DENSE, DenseSubspace, is_tall
from thriftlab.optim.state.keys import State


@runtime_checkable
class Subspace(Protocol):
    """A subspace of one's own. It may also have

    - `refine(grad, basis) -> basis`: the next basis from the last one, called instead of every refresh but the first;
    - `spec(shape, dtype) -> (small shape, {name: (shape, dtype)})`: otherwise a trial refresh tells the sizes;
    - `uses_gradient = False`: the basis does not depend on the gradient, which then may be NaN;
    - `arbitrary_signs = True`: a vector and its negative mean the same, as for singular vectors. Where moments are kept
      over a refresh the optimizer then follows the signs; without it the basis is taken as it is, so that the bases of
      another program replay its run.
    """

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        """The basis for the next `gap` steps of the matrix `name`; count = 0, 1, 2 ... counts its refreshes."""
        ...

    def down(self, grad: Tensor, basis: State) -> Tensor:
        """The matrix's coordinates in the subspace."""
        ...

    def up(self, small: Tensor, basis: State) -> Tensor:
        """The matrix that has these coordinates, and nothing outside of the subspace."""
        ...


AnySubspace = CoordinateSubspace | DenseSubspace | Subspace  # of one matrix


SUBSPACES: dict[str, Callable[[int | None, Any], Any]] = {
    Blocks.name: lambda rank, density: Blocks(),
    **{name: lambda rank, density, kind=kind: kind(density) for name, kind in COORDINATES.items()},  # type: ignore
    **DENSE,
}
MADE: dict[tuple[str, int | None, float | None], Any] = {}  # by name, rank and density


def subspace_of(group: dict[str, Any]) -> Any:
    """The group's own subspace object, or the one that it names: an `AnySubspace`, or `Blocks`."""
    subspace = group["subspace"]
    return named_subspace(subspace, group.get("rank"), group.get("density")) if isinstance(subspace, str) else subspace


def named_subspace(name: str, rank: int | None, density: float | None) -> Any:
    """The subspace that comes with the package under this name, made once: it remembers nothing of any matrix."""
    key = name, rank, density
    if key not in MADE:
        MADE[key] = SUBSPACES[name](rank, density)
    return MADE[key]


def is_split(weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether a tensor of the group is one of the matrices that the method splits."""
    return splits(tuple(weight.shape), group)


def splits(shape: tuple[int, ...], group: dict[str, Any]) -> bool:
    """Whether a tensor of this shape would be. A dense subspace that fills the whole matrix leaves nothing to split."""
    if not group["split"] or len(shape) != 2:
        return False
    if not isinstance(group.get("subspace"), str):  # no subspace, or one's own, which knows its own size
        return True
    subspace = subspace_of(group)
    return not isinstance(subspace, DenseSubspace) or subspace.size(shape) < min(shape)


def picks_entries(group: dict[str, Any]) -> bool:
    """Whether the group has a subspace of whole entries of its matrices, of which a step looks at each once."""
    return "subspace" in group and isinstance(subspace_of(group), CoordinateSubspace | Blocks)


def is_declared(basis: State, subspace: Any, grad: Tensor) -> bool:
    """Whether the basis still has the shapes that the subspace declares, if it does."""
    if not hasattr(subspace, "spec"):
        return True
    declared = subspace.spec(tuple(grad.shape), grad.dtype)[1]
    return {key: tuple(tensor.shape) for key, tensor in basis.items()} == {key: s for key, (s, _) in declared.items()}


def uses_gradient(group: dict[str, Any]) -> bool:
    """Whether a subspace is made of the gradient; one's own is thought to be, unless its `uses_gradient` is False, and
    so is what a method without subspaces refreshes."""
    return "subspace" not in group or getattr(subspace_of(group), "uses_gradient", True)


def basis_of(state: State) -> State:
    """The basis that the last refresh left in the state."""
    return {key.removeprefix("basis."): tensor for key, tensor in state.items() if key.startswith("basis.")}


def add_up(matrix: Tensor, small: Tensor, subspace: Any, basis: State, scale: float | Tensor) -> None:
    """matrix += scale * up(small), in place."""
    if isinstance(scale, Tensor):
        small, scale = small * scale.to(small), 1.0
    if isinstance(subspace, DenseSubspace):
        subspace.add_up(matrix, small, basis, scale)
    else:
        matrix.add_(subspace.up(small, basis), alpha=scale)


def keeps_rows(small: Tensor, matrix: Tensor) -> bool:
    """Whether `small` has one row for each row of the matrix, and not one column for each column."""
    if small.shape == matrix.shape:
        return is_tall(matrix)
    if small.ndim != 2 or (small.shape[0] != matrix.shape[0] and small.shape[1] != matrix.shape[1]):
        raise ValueError(
            f"the subspace makes {tuple(small.shape)} of a matrix {tuple(matrix.shape)}; "
            "it must keep its rows or its columns"
        )
    return small.shape[0] == matrix.shape[0]
