"""Fira (2410.01623): GaLore, and the rest of the gradient too, scaled by what Adam does to its projected part.

Every `gap` steps P becomes the `rank` leading singular vectors of the gradient's shorter side. In each step:

    R = down(G)                                  the gradient in r dimensions
    phi = |N(R)| / |R|                           N: Adam; one norm per channel, that is per index of the longer side
    S = phi (G - up(R)) / L                      L: the limiter; |S| grows by at most gamma per step
    W <- W - lr alpha (up(N(R)) + S)
    W <- (1 - lr wd) W

That is the paper, residual="exact". The published code, and the published results if they were made with it, are
residual="reference": S = phi (G - alpha up(R)) / L and W <- W - lr (alpha up(N(R)) + S), with steps 1 / alpha as long
outside of the subspace, and L told from norms without bias correction. With alpha=0 that is APOLLO.

One surprise: S is never computed. Its channels' norms follow from those of G and R, for orthonormal P:
|G - beta up(R)|^2 = |G|^2 - (2 beta - beta^2) |R|^2; and phi scales what up() leaves alone, so that one product,
up(alpha N - beta phi R / L), serves both terms.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.projected import TINY, Projected, correction, direction, growth_limit, norms, scaled_norms
from thriftlab.optim.core.split import OnRefresh
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.storage import StateDtype, wide
from thriftlab.optim.state.subspaces import Subspace, add_up, basis_of, keeps_rows, subspace_of


class Fira(Projected, name="fira"):
    """Fira: full-rank training under a low-rank constraint of the state.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to Adam's denominator, before bias correction.
        weight_decay: decoupled decay per step, times lr, after the update.
        rank: dimensions of the subspace, at most the shorter side of the matrix.
        gap: steps between refreshes of the subspace.
        alpha: factor of lr for the matrices (exact); of the projected part and in the residual (reference).
        gamma: how much the norm of the residual may grow in a step.
        residual: as in the published code (reference) or as in the paper (exact).
        subspace: leading singular vectors (svd; warm_svd from the last ones), or random directions, orthonormal or not.
        on_refresh: the moments start from zero, keep their numbers, or are expressed in the new basis.
        stagger: matrices refresh by turns within a gap, not all in one step.
        state_dtype: how the moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-3, 3e-2)] = 1e-2,
        betas: Annotated[Betas, Search(choices=[(0.9, 0.999), (0.9, 0.95)])] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-6,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        rank: Annotated[int, Field(ge=1), Search(choices=[32, 64, 128, 256])] = 128,
        gap: Annotated[int, Field(ge=1), Search(choices=[50, 200, 500])] = 200,
        alpha: Annotated[float, Field(ge=0), Search(choices=[0.0625, 0.25, 1.0])] = 0.25,
        gamma: Annotated[float, Field(ge=1)] = 1.01,
        residual: Annotated[Literal["reference", "exact"], Field()] = "reference",
        subspace: Annotated[Literal["svd", "warm_svd", "gauss", "orthogonal"] | Subspace, Field()] = "svd",
        on_refresh: Annotated[OnRefresh, Search(choices=["reset", "keep", "project"])] = "keep",
        stagger: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def descend(self, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any], age: int) -> None:
        subspace, basis, exact = subspace_of(group), basis_of(state), group["residual"] == "exact"
        beta = 1.0 if exact else group["alpha"]
        small = subspace.down(grad, basis)
        normalized = direction(small, state, age, group)
        dim = int(keeps_rows(small, grad))
        length = norms(small, dim)
        phi = norms(normalized, dim) / (length + TINY)
        norm = norms(scaled_norms(phi, residual_norms(grad, small, length, beta, subspace, basis)), None)
        limit = growth_limit(norm if exact else norm / correction(age, group), state, group["gamma"])

        free = phi / limit * (group["alpha"] if exact else 1.0)
        weight.addcmul_(grad, -group["lr"] * free)
        inside = normalized.mul_(group["alpha"]).addcmul_(free, small, value=-beta)
        add_up(weight, inside, subspace, basis, -group["lr"])

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        return {**super().spec(shape, dtype, **overrides), **self.limiter_spec(shape, dtype, overrides)}


def residual_norms(grad: Tensor, small: Tensor, length: Tensor, beta: float, subspace: Any, basis: State) -> Tensor:
    """|G - beta up(R)| of each channel, by |G| and `length` = |R| alone where the basis is orthonormal to rounding."""
    dim = int(keeps_rows(small, grad))
    if getattr(subspace, "orthonormal", False) and grad.dtype == wide(grad.dtype):
        squared = norms(grad, dim).square_().sub_(length.square(), alpha=2 * beta - beta**2)
        return squared.clamp_(min=0).sqrt_()
    residual = grad.clone()
    add_up(residual, small, subspace, basis, -beta)
    return norms(residual, dim)
