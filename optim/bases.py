"""Dense subspaces of a matrix's shorter side: the leading singular vectors of its gradient, or random directions.

A matrix [m, n] with m >= n is multiplied from the right, down(G) = G P [m, r]; a wider one from the left, P^T G [r, n].
P [min(m, n), r] is the whole basis. GaLore (2403.03507) takes P from the singular vectors of the gradient of the
refresh step; APOLLO (2412.05270) draws P from N(0, 1/r).

The surprise: no singular value decomposition. The vectors are those of the smaller Gram matrix, summed and decomposed
in float64, because squaring the singular values also squares what rounding does to the small ones.
"""

import math

import torch
from torch import Tensor

from thriftlab.optim.base import Spec, State
from thriftlab.optim.storage import wide


class DenseSubspace:
    """r = min(rank, min(m, n)) directions, or round(density * min(m, n)) where no rank is given."""

    uses_gradient = False
    arbitrary_signs = False
    orthonormal = True

    def __init__(self, rank: int | None = None, density: float | None = None):
        self.rank, self.density = rank, density

    def size(self, shape: tuple[int, ...]) -> int:
        """r; a half is rounded to even, as the reference does it."""
        return round(self.density * min(shape)) if self.rank is None else min(self.rank, *shape)  # type: ignore[operator]

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        """P  # [min(m, n), rank]"""
        raise NotImplementedError

    def refresh(self, grad: Tensor, name: str, count: int, generator: torch.Generator) -> State:
        vectors = self.draw(grad, self.size(grad.shape), generator).to(grad)
        return {"vectors": vectors.clone(memory_format=torch.contiguous_format)}

    def down(self, grad: Tensor, basis: State) -> Tensor:
        return grad @ basis["vectors"] if is_tall(grad) else basis["vectors"].T @ grad

    def up(self, small: Tensor, basis: State) -> Tensor:
        left, right = self.factors(small, basis)
        return left @ right

    def add_up(self, matrix: Tensor, small: Tensor, basis: State, scale: float) -> None:
        """matrix += scale * up(small), in place and without a temporary."""
        matrix.addmm_(*self.factors(small.to(matrix.dtype), basis), alpha=scale)

    def factors(self, small: Tensor, basis: State) -> tuple[Tensor, Tensor]:
        """up(small) as a product; [r, n] of a wide matrix has n > m >= r, so the shape of `small` tells the side."""
        vectors = basis["vectors"]
        return (small, vectors.T) if small.shape[1] == vectors.shape[1] else (vectors, small)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], Spec]:
        rank = self.size(shape)
        small = (shape[0], rank) if shape[0] >= shape[1] else (rank, shape[1])
        return small, {"vectors": ((min(shape), rank), dtype)}


class Svd(DenseSubspace):
    """The leading singular vectors of the gradient; their signs are arbitrary."""

    uses_gradient = True
    arbitrary_signs = True

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        return leading_vectors(grad, rank)


class WarmSvd(Svd):
    """The same at first, then two subspace iterations from the last basis: its energy, at a fifth of the cost.

    Where singular values are close or tiny it is not the same subspace.
    """

    def refine(self, grad: Tensor, basis: State) -> State:
        tall, vectors = tall_of(grad).to(wide(grad.dtype)), basis["vectors"].to(wide(grad.dtype))
        for _ in range(2):
            vectors = torch.linalg.qr(tall.T @ (tall @ vectors)).Q
        turned = vectors @ leading_vectors(tall @ vectors, vectors.shape[1]).to(vectors)
        return {"vectors": turned.to(grad.dtype)}


class Gauss(DenseSubspace):
    """Entries N(0, 1/r): lengths are kept on average, but the directions are not orthonormal."""

    orthonormal = False

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        return gaussian(grad, rank, generator) / math.sqrt(max(rank, 1))


class Orthogonal(DenseSubspace):
    """Orthonormal directions, every subspace equally likely."""

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        return torch.linalg.qr(gaussian(grad, rank, generator).double()).Q


BASES: dict[str, type[DenseSubspace]] = {"svd": Svd, "warm_svd": WarmSvd, "gauss": Gauss, "orthogonal": Orthogonal}


def is_tall(matrix: Tensor) -> bool:
    """Whether the columns are compressed and the rows are kept; a square matrix counts as tall."""
    return matrix.shape[0] >= matrix.shape[1]


def tall_of(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if that is tall  # [max(m, n), min(m, n)]"""
    return matrix if is_tall(matrix) else matrix.T


def leading_vectors(grad: Tensor, rank: int) -> Tensor:
    """The `rank` leading singular vectors of the shorter side, largest first  # [min(m, n), rank]"""
    tall = tall_of(grad).double()
    vectors = torch.linalg.eigh(tall.T @ tall).eigenvectors  # smallest first
    return vectors.flip(1)[:, :rank]


def gaussian(grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """N(0, 1), drawn on the CPU in float32 whatever the gradient is  # [min(m, n), rank]"""
    return torch.randn(min(grad.shape), rank, generator=generator, device=generator.device)
