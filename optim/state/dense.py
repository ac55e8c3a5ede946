"""Dense subspaces of a matrix's shorter side: the leading singular vectors of its gradient, or random directions.

A matrix [m, n] with m >= n is multiplied from the right, down(G) = G P [m, r]; a wider one from the left, P^T G [r, n].
P [min(m, n), r] is the whole basis. GaLore (2403.03507) takes P from the singular vectors of the gradient of the
refresh step; APOLLO (2412.05270) draws P from N(0, 1/r).

The surprise: no singular value decomposition. A few subspace iterations (Halko et al., 0909.4061) on the smaller Gram
matrix find the leading vectors, and their residuals tell whether they are found; otherwise the matrix is decomposed. In
float64, because singular values of gradients fall over four decades and more, and a Gram matrix squares them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from thriftlab.optim.state.asking import EIGEN, READ, SINGULAR, Asking, in_step
from thriftlab.optim.state.keys import Spec, State

GAP = 1.04  # a ratio of neighbouring singular values from which on they are told apart; promised from 1.05 on
ANGLE = 5e-4  # the largest principal angle to the singular vectors where there is such a gap; promised: 1e-3
ENERGY = 5e-4  # the largest part of their energy that is missed where there is none; promised: 1e-3
TRUST = 0.04  # the largest residual, relative to its Ritz value, by which a gap is judged; at 0.08 2 of 768 were wrong
NEVER = 2**62  # rounds: more than anybody runs


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
        vectors = basis["vectors"].to(grad.dtype)  # a weight may change its dtype between two refreshes
        return grad @ vectors if is_tall(grad) else vectors.T @ grad

    def up(self, small: Tensor, basis: State) -> Tensor:
        left, right = self.factors(small, basis)
        return left @ right

    def add_up(self, matrix: Tensor, small: Tensor, basis: State, scale: float) -> None:
        """matrix += scale * up(small), in place and without a temporary."""
        matrix.addmm_(*self.factors(small.to(matrix.dtype), basis), alpha=scale)

    def factors(self, small: Tensor, basis: State) -> tuple[Tensor, Tensor]:
        """up(small) as a product; [r, n] of a wide matrix has n > m >= r, so the shape of `small` tells the side."""
        vectors = basis["vectors"].to(small.dtype)
        return (small, vectors.T) if small.shape[1] == vectors.shape[1] else (vectors, small)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], Spec]:
        return self.spec_of_rank(self.size(shape), shape, dtype)

    def kept_spec(self, shape: tuple[int, ...], dtype: torch.dtype, basis: State) -> tuple[tuple[int, ...], Spec]:
        """The `spec` of a matrix with this basis, whose rank may be another than that of the next one."""
        return self.spec_of_rank(basis["vectors"].shape[-1], shape, dtype)

    def spec_of_rank(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], Spec]:
        small = (shape[0], rank) if shape[0] >= shape[1] else (rank, shape[1])
        return small, {"vectors": ((min(shape), rank), dtype)}


class Svd(DenseSubspace):
    """The leading singular vectors of the gradient; their signs are arbitrary."""

    uses_gradient = True
    arbitrary_signs = True

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        return leading_vectors(grad, rank)

    def search(self, grad: Tensor, old: State) -> Asking:
        """The next basis after `old`, which is empty at first."""
        vectors = yield from leading(grad, self.size(grad.shape))
        return {"vectors": vectors.to(grad).clone(memory_format=torch.contiguous_format)}


class WarmSvd(Svd):
    """The same, found faster: the search starts at the last basis, and in float32.

    There a Gram matrix resolves three decades; where sigma_rank < sigma_1 / 1000 only the energy is Svd's.
    """

    def refine(self, grad: Tensor, basis: State) -> State:
        return in_step([self.search(grad, basis)])[0]

    def search(self, grad: Tensor, old: State) -> Asking:
        if not old:
            return (yield from super().search(grad, old))
        vectors = yield from leading(grad, old["vectors"].shape[1], start=old["vectors"])
        return {"vectors": vectors.to(grad).contiguous()}


class Gauss(DenseSubspace):
    """Entries N(0, 1/r): lengths are kept on average, but the directions are not orthonormal."""

    orthonormal = False

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        return gaussian(grad, rank, generator) / math.sqrt(max(rank, 1))


class Orthogonal(DenseSubspace):
    """Orthonormal directions, every subspace equally likely."""

    def draw(self, grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
        return torch.linalg.qr(gaussian(grad, rank, generator).double()).Q


DENSE: dict[str, type[DenseSubspace]] = {"svd": Svd, "warm_svd": WarmSvd, "gauss": Gauss, "orthogonal": Orthogonal}


def is_tall(matrix: Tensor) -> bool:
    """Whether the columns are compressed and the rows are kept; a square matrix counts as tall."""
    return matrix.shape[0] >= matrix.shape[1]


def tall_of(matrix: Tensor) -> Tensor:
    """The matrix, or its transpose if that is tall  # [max(m, n), min(m, n)]"""
    return matrix if is_tall(matrix) else matrix.T


def leading_vectors(grad: Tensor, rank: int, start: Tensor | None = None) -> Tensor:
    """The `rank` leading singular vectors of the shorter side, largest first, in float64  # [min(m, n), rank]

    Where sigma_rank is 1.05 sigma_(rank+1) or more, principal angles are below 1e-3; elsewhere at least 99.9 % of their
    energy is captured. Angles are not resolved below sigma_rank = 1e-5 sigma_1; with a `start` [min(m, n), rank], from
    which they are looked for in float32 first, not below 1e-3 sigma_1.
    """
    return in_step([leading(grad, rank, start)])[0]


def leading(grad: Tensor, rank: int, start: Tensor | None = None) -> Asking:
    """`leading_vectors`, for `in_step`."""
    tall = tall_of(grad).double()
    tall = tall / tall.abs().max().clamp(min=torch.finfo(tall.dtype).tiny)
    spare = max(16, rank // 8)  # further directions: the more, the faster the wanted ones converge
    if not 0 < rank < tall.shape[1] // 2 - spare:
        return (yield from decomposed(tall.T @ tall, rank))
    draw = torch.randn(tall.shape[1], rank + spare, generator=torch.Generator().manual_seed(0), device="cpu")
    block = draw.to(tall.device) / math.sqrt(tall.shape[1])
    if start is not None:
        block[:, :rank].mul_(0.1).add_(start)  # not the start alone: what is orthogonal to it would stay hidden
        found, block = yield from subspace_iteration((tall.T.float() @ tall.float()).matmul, block, rank)
        if not found:  # but near, so that a round is cheaper than a Gram matrix
            near = block.double()
            found, block = yield from subspace_iteration(lambda x: tall.T @ (tall @ x), near, rank, rounds=1)
        if found:
            return block[:, :rank].double()
    gram = tall = tall.T @ tall  # the copy of the gradient goes, for many may be searched at a time
    found, block = yield from subspace_iteration(gram.matmul, block.double(), rank)
    return block[:, :rank] if found else (yield from decomposed(gram, rank))


def tracked(vectors: Tensor, grad: Tensor, step_size: float) -> Asking:
    """An orthonormal basis S after a step of descent on |G - S S^T G|^2 (SubTrack++, 2502.01586): one of its directions
    is turned towards one outside of it  # [min(m, n), r]"""
    tall, old = tall_of(grad).double(), vectors.double()
    small = tall @ old  # A^T [max(m, n), r]
    slope = -2 * (tall.T @ small - old @ (small.T @ small))  # F [min(m, n), r]
    u, sigma, v = yield SINGULAR, slope
    (u, v), angle = (u[:, :1], v[:1].T), step_size * sigma[0]
    new = old + ((old @ v) * (angle.cos() - 1) - u * angle.sin()) @ v.T
    found = torch.linalg.qr(new)  # orthonormal as it is, but for the rounding of its dtype, refresh after refresh
    return (found.Q * found.R.diagonal().sign()).to(vectors).contiguous()  # as a checkpoint gives it back


def decomposed(gram: Tensor, rank: int) -> Asking:
    """The leading eigenvectors, from all of them."""
    _, vectors = yield EIGEN, gram
    return vectors.flip(1)[:, :rank]


def subspace_iteration(gram: Callable[[Tensor], Tensor], block: Tensor, rank: int, rounds: int = 2) -> Asking:
    """(whether they are found, Ritz vectors of gram^k block, largest first), k as large as it takes and is worth it.

    `gram` multiplies by the Gram matrix; `rounds` are made before the first look.
    """
    budget = 3 * len(block) // block.shape[1]  # what it costs to decompose the matrix
    while rounds < budget:
        budget -= rounds + 1
        for _ in range(rounds):
            block = torch.linalg.qr(gram(block)).Q
        image = gram(block)
        values, turn = yield EIGEN, block.T @ image
        values, turn = values.flip(0), turn.flip(1)
        block, image = block @ turn, image @ turn
        residuals = torch.linalg.vector_norm(image - block * values, dim=0)
        rounds = missing_rounds((yield READ, torch.stack([values, residuals])), rank)
        if rounds == 0:
            return True, block
        block, rounds = torch.linalg.qr(image).Q, rounds - 1
    return False, block


def missing_rounds(looked_at: Tensor, rank: int) -> int:
    """How many more rounds it takes until the `rank` leading Ritz vectors are near enough; NEVER if rounding forbids.

    The residuals |A x - value x| bound their angle where there is a gap below the last wanted value (Davis and Kahan),
    and what each may gain in energy. A round shrinks them by the ratio of the least value to the last wanted one.
    """
    if looked_at.is_meta or isinstance(looked_at, FakeTensor):
        return 0
    eps, (values, residuals) = torch.finfo(looked_at.dtype).eps, looked_at.double()
    rounding = 4 * eps * max(float(values[0]), 0.0)
    wanted, last, below = values[:rank], values[rank - 1], values[rank]
    gain = torch.minimum(residuals[:rank], residuals[:rank] ** 2 / (wanted - below).clamp(min=1e-300))
    excess = gain.sum() / wanted.sum().clamp(min=1e-300) / ENERGY
    if last > 2 * rounding:  # the last one is resolved, but its ratio to the next only where it is much larger
        if last < 5 * rounding or (separate := last > GAP**2 * below) and rounding / 8 > ANGLE * (last - below):
            return NEVER
        angle = (residuals[:rank].norm() - math.sqrt(rank) * rounding) / (last - below) / ANGLE
        excess = torch.maximum(excess, angle if separate else residuals[rank - 1] / last / TRUST)
    if excess <= 1:
        return 0
    shrinking = max(float(values[-1] / last), 1e-9)
    return math.ceil(math.log(excess) / -math.log(shrinking)) if shrinking < 1 else NEVER


def gaussian(grad: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """N(0, 1), drawn on the CPU in float32 whatever the gradient is  # [min(m, n), rank]"""
    return torch.randn(min(grad.shape), rank, generator=generator, device=generator.device)
