"""Subspaces of single entries of a matrix: its columns, its rows, or entries anywhere (FRUGAL, 2411.07837).

The complement of chosen entries is the entries that are left out. So they are read and written in place, and no `up`
is needed.

The surprise: `Coordinates` stores two integers. The chosen entries are hashed anew at every step, one in each of k
equal strata of the flat matrix: exactly k, every entry equally likely, with neither a mask nor k int64 indices.
"""

import torch
from torch import Tensor

from thriftlab.optim.state.keys import Spec, State, has_data, hash63, mix64_


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

    # A subspace that also knows its entries by number, in row-major order, can be used where a matrix is cut.

    def positions(self, shape: tuple[int, ...], basis: State, entries: Tensor) -> Tensor:
        """Flat positions of the chosen entries with these numbers."""
        raise NotImplementedError

    def below(self, position: int, shape: tuple[int, ...], basis: State) -> int:
        """How many chosen entries lie before a flat position."""
        raise NotImplementedError

    def small_shape(self, shape: tuple[int, ...], basis: State) -> tuple[int, ...]:
        """Shape of what `take` gives."""
        raise NotImplementedError

    def count(self, shape: tuple[int, ...], basis: State) -> tuple[int, int]:
        """How many are chosen, and of how many, by the density."""
        raise NotImplementedError

    def kept_spec(self, shape: tuple[int, ...], dtype: torch.dtype, basis: State) -> tuple[tuple[int, ...], Spec]:
        """The `spec` of a matrix with this basis; ValueError where it chooses what the matrix does not have."""
        self.check(shape, basis)
        return self.small_shape(shape, basis), {}

    def check(self, shape: tuple[int, ...], basis: State) -> None:
        """ValueError where a basis chooses what a matrix of this shape does not have; reads the basis on the host."""

    def down(self, matrix: Tensor, basis: State) -> Tensor:
        return self.take(matrix, self.where(matrix, basis))

    def where_all(self, matrices: list[Tensor], bases: list[State]) -> list[Tensor]:
        """`where` of several matrices."""
        return [self.where(matrix, basis) for matrix, basis in zip(matrices, bases, strict=True)]


class Slices(CoordinateSubspace):
    """A random floor(density * size) of the columns (dim 1) or rows (dim 0)."""

    dim: int

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        size = grad.shape[self.dim]
        chosen = torch.randperm(size, generator=generator)[: int(size * self.density)].sort().values
        return {"index": chosen.to(grad.device, torch.int32)}  # [k]

    def where(self, matrix: Tensor, basis: State) -> Tensor:
        return basis["index"].long()

    def count(self, shape: tuple[int, ...], basis: State) -> tuple[int, int]:
        return len(basis["index"]), shape[self.dim]

    def check(self, shape: tuple[int, ...], basis: State) -> None:
        index = basis["index"]
        if has_data(index) and len(index) and int(index.max()) >= shape[self.dim]:
            raise ValueError(f"the basis chooses index {int(index.max())} in dimension {self.dim} of a weight {shape}")

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

    def small_shape(self, shape: tuple[int, ...], basis: State) -> tuple[int, ...]:
        return shape[0], len(basis["index"])

    def put(self, matrix: Tensor, where: Tensor, small: Tensor) -> None:
        matrix.scatter_(1, where.expand_as(small), small)  # what index_copy_ does, at two thirds of its cost

    def positions(self, shape: tuple[int, ...], basis: State, entries: Tensor) -> Tensor:
        chosen = max(len(basis["index"]), 1)
        return entries // chosen * shape[1] + basis["index"].long()[entries % chosen]

    def below(self, position: int, shape: tuple[int, ...], basis: State) -> int:
        row, column = divmod(position, shape[1])
        before = int((basis["index"] < column).sum()) if column else 0  # without waiting for the device
        return row * len(basis["index"]) + before


class Rows(Slices):
    dim = 0

    def small_shape(self, shape: tuple[int, ...], basis: State) -> tuple[int, ...]:
        return len(basis["index"]), shape[1]

    def positions(self, shape: tuple[int, ...], basis: State, entries: Tensor) -> Tensor:
        return basis["index"].long()[entries // shape[1]] * shape[1] + entries % shape[1]

    def below(self, position: int, shape: tuple[int, ...], basis: State) -> int:
        row, column = divmod(position, shape[1])
        return int((basis["index"] < row).sum()) * shape[1] + column * int((basis["index"] == row).any())


class Coordinates(CoordinateSubspace):
    """floor(density * numel) single entries; the small space is 1-D."""

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        chosen = torch.tensor(int(grad.numel() * self.density), device="cpu")  # the density may change before the next
        return {"key": torch.randint(2**62, (), generator=generator), "chosen": chosen}

    def where(self, matrix: Tensor, basis: State) -> Tensor:
        entries = torch.arange(int(basis["chosen"]), device=matrix.device)
        return self.positions(tuple(matrix.shape), basis, entries)

    def where_all(self, matrices: list[Tensor], bases: list[State]) -> list[Tensor]:
        """Matrices of one shape together: integers are the same in any company."""
        kinds = [(matrix.shape, int(basis["chosen"])) for matrix, basis in zip(matrices, bases, strict=True)]
        found: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            alike = [i for i, other in enumerate(kinds) if other == kind]
            if len(alike) == 1 or not kind[1]:
                found.update((i, self.where(matrices[i], bases[i])) for i in alike)
            else:
                together = self.of_one_shape(matrices[alike[0]], [bases[i] for i in alike])
                found.update(zip(alike, together, strict=True))
        return [found[i] for i in range(len(kinds))]

    def of_one_shape(self, matrix: Tensor, bases: list[State]) -> list[Tensor]:
        """`where` of several matrices like `matrix`, whose bases choose as many."""
        shape, chosen = tuple(matrix.shape), int(bases[0]["chosen"])
        size, turns = shape[0] * shape[1], [self.circle(shape, basis)[1] for basis in bases]
        ahead = [self.drawn_below(size - turn, size, basis) for turn, basis in zip(turns, bases, strict=True)]
        strata = torch.arange(chosen, device=matrix.device).repeat(len(bases), 1)  # [matrices, chosen]
        torch._foreach_add_(strata.unbind(), ahead)
        strata.remainder_(chosen)
        places = strata.clone()
        torch._foreach_add_(places.unbind(), [int(basis["key"]) for basis in bases])
        mix64_(places).bitwise_and_((1 << 63) - 1)
        places = within_strata(places, strata, size, chosen)
        torch._foreach_add_(places.unbind(), turns)
        return list(places.remainder_(size).unbind())

    def positions(self, shape: tuple[int, ...], basis: State, entries: Tensor) -> Tensor:
        size, turn = self.circle(shape, basis)
        if turn == 0:
            return self.draw(entries, size, basis)
        ahead = self.drawn_below(size - turn, size, basis)  # what the turn does not take over the end comes last
        strata = (entries + ahead).remainder_(int(basis["chosen"]))
        return self.draw(strata, size, basis).add_(turn).remainder_(size)  # [k], ascending

    def below(self, position: int, shape: tuple[int, ...], basis: State) -> int:
        size, turn = self.circle(shape, basis)
        edges = max(position - turn, 0), min(position + size - turn, size), size - turn
        low, high, end = (self.drawn_below(edge, size, basis) for edge in edges)
        return low + high - end

    def small_shape(self, shape: tuple[int, ...], basis: State) -> tuple[int, ...]:
        return (int(basis["chosen"]),)

    def count(self, shape: tuple[int, ...], basis: State) -> tuple[int, int]:
        return int(basis["chosen"]), shape[0] * shape[1]

    def check(self, shape: tuple[int, ...], basis: State) -> None:
        if has_data(basis["chosen"]) and int(basis["chosen"]) > shape[0] * shape[1]:
            raise ValueError(f"the basis chooses {int(basis['chosen'])} entries of a weight {shape}")

    def circle(self, shape: tuple[int, ...], basis: State) -> tuple[int, int]:
        """Entries, and by how much their circle is turned: where some strata are longer, all entries are to be equally
        likely."""
        size, chosen = shape[0] * shape[1], int(basis["chosen"])
        return size, int(hash63(basis["key"] - 1)) % size if chosen and size % chosen else 0

    def draw(self, stratum: Tensor, size: int, basis: State) -> Tensor:
        """The entry that is drawn from each stratum, before the turn."""
        return within_strata(hash63(stratum + basis["key"]), stratum, size, int(basis["chosen"]))

    def drawn_below(self, edge: int, size: int, basis: State) -> int:
        """How many of the entries that are drawn lie below an edge, before the turn."""
        chosen = int(basis["chosen"])
        if edge >= size or chosen == 0:
            return chosen
        stratum = ((edge + 1) * chosen - 1) // size  # the one that the edge lies in
        return stratum + int(self.draw(torch.tensor(stratum), size, basis) < edge)

    def take(self, matrix: Tensor, where: Tensor) -> Tensor:
        return matrix.take(where)

    def put(self, matrix: Tensor, where: Tensor, small: Tensor) -> None:
        if torch.are_deterministic_algorithms_enabled():  # which torch refuses of `put_`, though no position is twice
            matrix.index_put_((where // matrix.shape[1], where % matrix.shape[1]), small)
        else:
            matrix.put_(where, small)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[tuple[int, ...], Spec]:
        return (int(shape[0] * shape[1] * self.density),), {"key": ((), torch.int64), "chosen": ((), torch.int64)}


def within_strata(hashes: Tensor, stratum: Tensor, size: int, chosen: int) -> Tensor:
    """The entry of each stratum that its hash says, in place of the hash."""
    if chosen == 0 or size % chosen == 0:
        return hashes.remainder_(size // max(chosen, 1)).add_(stratum, alpha=size // max(chosen, 1))
    first, end = stratum * size // chosen, (stratum + 1) * size // chosen
    return hashes.remainder_(end - first).add_(first)


COORDINATES: dict[str, type[CoordinateSubspace]] = {"columns": Columns, "rows": Rows, "coordinates": Coordinates}


def other_density(
    subspace: CoordinateSubspace, bases: dict[str, tuple[tuple[int, ...], State]], scheduled: bool
) -> str | None:
    """The name of a matrix whose basis is not of the subspace's density, or None.

    Args:
        bases: of each matrix, by name, its shape and its basis.
        scheduled: whether the density may have changed since the refresh, for all alike.
    """
    counts = {name: subspace.count(shape, basis) for name, (shape, basis) in bases.items()}
    odd = [name for name, (chosen, size) in counts.items() if chosen != int(size * subspace.density)]
    if odd and scheduled:
        low, high = max(k / n for k, n in counts.values()), min((k + 1) / n for k, n in counts.values())
        return odd[0] if low >= high else None
    return odd[0] if odd else None


def is_countable(subspace: object) -> bool:
    """Whether the chosen entries are known by number, see CoordinateSubspace."""
    return isinstance(subspace, CoordinateSubspace) and type(subspace).below is not CoordinateSubspace.below
