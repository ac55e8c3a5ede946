"""Where the state lives: the part of a matrix's coordinates that a state-full rule looks after.

A `Subspace` is any object with refresh, down and up; a basis is a dict of tensors, which the optimizer keeps in its
state. A `CoordinateSubspace` picks entries of the matrix, so its complement is the entries that it leaves out: it reads
and writes them in place and needs no `up`. Blocks choose whole tensors of a group and are no subspace of one matrix.

The surprise: `Coordinates` stores one integer. The chosen entries are hashed anew at every step, one in each of k equal
strata of the flat matrix: exactly k, every entry equally likely, with neither a mask nor k int64 indices.
"""

from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from thriftlab.optim.base import Spec, State, keyed_seed


@runtime_checkable
class Subspace(Protocol):
    """A subspace of one's own. It may also have `spec(shape) -> (small shape, {name: (shape, dtype)})`."""

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

    def spec(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Spec]:
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

    def spec(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Spec]:
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

    def spec(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Spec]:
        return (int(shape[0] * shape[1] * self.density),), {"key": ((), torch.int64)}


SUBSPACES: dict[str, type[CoordinateSubspace]] = {"columns": Columns, "rows": Rows, "coordinates": Coordinates}


def hash63(x: Tensor) -> Tensor:
    """Scrambles int64 to 63 well-mixed bits: the finaliser of splitmix64, in wrapping arithmetic."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31 & (1 << 33) - 1)) & (1 << 63) - 1


BlockOrder = Literal["random", "ascending", "descending", "mirror"] | Callable[[list[str], int], list[str]]


def active_blocks(names: list[str], density: float, order: BlockOrder, seed: int, count: int) -> set[str]:
    """Which tensors of a group are state-full between refresh `count` and the next: round(density * number) of them.

    `random` is a function of the set of names, not of their order. The others walk through `names`: from the front,
    from the back, or from both ends towards the middle in pairs, on from where the last refresh stopped.
    """
    total = len(names)
    active = round(density * total)  # half to even, as the reference
    if callable(order):
        chosen = set(order(names, count))
        if not chosen <= set(names):
            raise ValueError(f"order chose {sorted(chosen - set(names))[:3]}, which are not names of the group")
        return chosen
    if order == "random":
        return set(sorted(names, key=lambda name: keyed_seed(seed, name, count))[:active])
    if order == "mirror":
        if active % 2:
            raise ValueError(f"order='mirror' takes blocks in pairs; density={density} of {total} blocks is {active}")
        half = total // 2
        front = [(count * active // 2 + i) % half for i in range(active // 2)]
        return {names[j] for i in front for j in (i, total - 1 - i)}
    forward = [(count * active + i) % total for i in range(active)]
    return {names[i if order == "ascending" else total - 1 - i] for i in forward}
