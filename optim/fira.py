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
from thriftlab.optim.core.projected import (
    Projected,
    adam_of_channels,
    add_back,
    all_norms,
    coordinates,
    correction,
    growth_limits,
    lengths,
    quotients,
    scale_add,
    without,
)
from thriftlab.optim.core.split import OnRefresh
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.storage import StateDtype, wide
from thriftlab.optim.state.subspaces import Subspace, keeps_rows, subspace_of


class Recovered(Projected):
    """The step of Fira, in whatever subspaces."""

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        subspace, exact = subspace_of(group), group["residual"] == "exact"
        beta, lr = 1.0 if exact else group["alpha"], group["lr"]
        smalls = coordinates(grads, states, subspace)
        dims = [int(keeps_rows(small, grad)) for small, grad in zip(smalls, grads, strict=True)]
        normalized, sizes_n, radii = adam_of_channels(smalls, states, age, group, dims)
        phis = quotients(sizes_n, radii)
        sizes = lengths(phis, residual_norms(grads, smalls, radii, beta, subspace, states))
        limits = growth_limits(sizes if exact else without(correction(age, group), sizes), states, group["gamma"])

        free = [phi / limit for phi, limit in zip(phis, limits, strict=True)]
        torch._foreach_mul_(free, group["alpha"] if exact else 1.0)
        torch._foreach_mul_(normalized, group["alpha"])
        scale_add(weights, grads, list(torch._foreach_mul(free, -lr)), dims)
        scale_add(normalized, smalls, list(torch._foreach_mul(free, -beta)), dims)
        add_back(weights, normalized, states, subspace, -lr)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        return {**super().spec(shape, dtype, **overrides), **self.limiter_spec(shape, dtype, overrides)}


class Fira(Recovered, name="fira"):
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


def residual_norms(
    grads: list[Tensor], smalls: list[Tensor], radii: list[Tensor], beta: float, subspace: Any, states: list[State]
) -> list[Tensor]:
    """|G - beta up(R)| of each channel, by |G| and `radii`, |R|, alone where a basis is orthonormal to rounding."""
    dims = [int(keeps_rows(small, grad)) for small, grad in zip(smalls, grads, strict=True)]
    if getattr(subspace, "orthonormal", False) and all(grad.dtype == wide(grad.dtype) for grad in grads):
        squares = all_norms(grads, dims)
        torch._foreach_mul_(squares, squares)
        torch._foreach_sub_(squares, torch._foreach_mul(radii, radii), alpha=2 * beta - beta**2)
        torch._foreach_clamp_min_(squares, 0)
        torch._foreach_sqrt_(squares)
        return squares
    residuals = [grad.clone() for grad in grads]
    add_back(residuals, smalls, states, subspace, -beta)
    return all_norms(residuals, dims)
