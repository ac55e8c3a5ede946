"""Where the state lives: the part of a matrix's coordinates that a state-full rule looks after.

A `Subspace` is any object with refresh, down and up; a basis is a dict of tensors, which the optimizer keeps in its
state. A `CoordinateSubspace` picks entries of the matrix, so its complement is the entries that it leaves out: it reads
and writes them in place and needs no `up`. Dense subspaces are in bases.py; blocks choose whole tensors of a group and
are no subspace of one matrix (blocks.py).

The surprise: `Coordinates` stores one integer. The chosen entries are hashed anew at every step, one in each of k equal
strata of the flat matrix: exactly k, every entry equally likely, with neither a mask nor k int64 indices.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from thriftlab.optim.base import Spec, State


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


class CoordinateSubspace:
    """Some entries of the matrix, at the positions `where`: `take` copies them out, `put` writes them back."""

    uses_gradient = False

    def __init__(self, density: float):
        self.density = density

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        raise NotImplementedError

    def where(self, matrix: Tensor, basis: State) -> Tensor:
        raise NotImplementedError

    def take(self, matrix: Tensor, where: Tensor) -> Tensor:
        raise NotImplementedError

    def put(self, matrix: Tensor, where: Tensor, small: Tensor) -> None:
        raise NotImplementedError

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[tuple[int, ...], Spec]:
        """Shape of what `take` gives, and the basis."""
        raise NotImplementedError

    def down(self, matrix: Tensor, basis: State) -> Tensor:
        return self.take(matrix, self.where(matrix, basis))


class Slices(CoordinateSubspace):
    """A random floor(density * size) of the columns (dim 1) or rows (dim 0)."""

    dim: int

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        size = grad.shape[self.dim]
        chosen = torch.randperm(size, generator=generator)[: int(size * self.density)].sort().values
        return {"index": chosen.to(grad.device, torch.int32)}  # [k]

    def where(self, matrix: Tensor, basis: State) -> Tensor:
        return basis["index"].long()

    def take(self, matrix: Tensor, where: Tensor) -> Tensor:
        return matrix.index_select(self.dim, where)

    def put(self, matrix: Tensor, where: Tensor, small: Tensor) -> None:
        matrix.index_copy_(self.dim, where, small)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[tuple[int, ...], Spec]:
        chosen = int(shape[self.dim] * self.density)
        small = (chosen, shape[1]) if self.dim == 0 else (shape[0], chosen)
        return small, {"index": ((chosen,), torch.int32)}


class Columns(Slices):
    dim = 1


class Rows(Slices):
    dim = 0


class Coordinates(CoordinateSubspace):
    """floor(density * numel) single entries; the small space is 1-D."""

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        return {"key": torch.randint(2**62, (), generator=generator)}

    def where(self, matrix: Tensor, basis: State) -> Tensor:
        size, chosen = matrix.numel(), int(matrix.numel() * self.density)
        stratum = torch.arange(chosen, device=matrix.device)
        if chosen == 0:
            return stratum
        first, end = stratum * size // chosen, (stratum + 1) * size // chosen
        positions = hash63(stratum + basis["key"]).remainder_(end - first).add_(first)  # [k], row-major
        if size % chosen:  # some strata are longer: turn the circle, so that entries stay equally likely
            positions.add_(hash63(basis["key"] - 1) % size).remainder_(size)
        return positions

    def take(self, matrix: Tensor, where: Tensor) -> Tensor:
        return matrix.take(where)

    def put(self, matrix: Tensor, where: Tensor, small: Tensor) -> None:
        matrix.put_(where, small)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[tuple[int, ...], Spec]:
        return (int(shape[0] * shape[1] * self.density),), {"key": ((), torch.int64)}


SUBSPACES: dict[str, type[CoordinateSubspace]] = {"columns": Columns, "rows": Rows, "coordinates": Coordinates}


def hash63(x: Tensor) -> Tensor:
    """Scrambles int64 to 63 well-mixed bits: the finaliser of splitmix64, in wrapping arithmetic."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31 & (1 << 33) - 1)) & (1 << 63) - 1
