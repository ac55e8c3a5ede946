"""APOLLO (2412.05270): SGD whose learning rate, per channel or per tensor, is what Adam makes of a random projection.

Every `gap` steps P is drawn from N(0, 1/r). In each step:

    R = down(G)                                  the gradient in r dimensions
    phi = |N(R)| / |R|                           N: Adam; one norm per channel (of the longer side), or one of all
    W <- W - lr sqrt(scale) phi G / L            L: the limiter; the update grows by at most gamma per step
    W <- (1 - lr wd) W

Nothing is projected back. APOLLO-Mini is rank=1, granularity="tensor", scale=128. Plain tensors are trained by Adam.

One surprise: scale enters by its square root; Mini's 128 is a factor of 11.3.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.projected import (
    Projected,
    adam_of_channels,
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
from thriftlab.optim.state.storage import StateDtype
from thriftlab.optim.state.subspaces import Subspace, keeps_rows, subspace_of


class Apollo(Projected, name="apollo"):
    """APOLLO: SGD with Adam's learning rate for each channel, told from a random projection.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to Adam's denominator, before bias correction.
        weight_decay: decoupled decay per step, times lr, after the update.
        rank: dimensions of the projection, at most the shorter side of the matrix.
        gap: steps between refreshes of the projection.
        scale: the square of a factor of lr for the matrices.
        granularity: one learning rate per channel, or one per tensor.
        gamma: how much the norm of the update may grow in a step.
        subspace: random directions (gauss, or orthonormal ones), or leading singular vectors (svd; warm_svd: from
            the last ones).
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
        rank: Annotated[int, Field(ge=1), Search(choices=[64, 128, 256])] = 256,
        gap: Annotated[int, Field(ge=1), Search(choices=[50, 200, 500])] = 200,
        scale: Annotated[float, Field(ge=0)] = 1.0,
        granularity: Annotated[Literal["channel", "tensor"], Field()] = "channel",
        gamma: Annotated[float, Field(ge=1)] = 1.01,
        subspace: Annotated[
            Literal["gauss", "orthogonal", "svd", "warm_svd"] | Subspace, Search(choices=["gauss", "svd"])
        ] = "gauss",
        on_refresh: Annotated[OnRefresh, Field()] = "keep",
        stagger: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        smalls = coordinates(grads, states, subspace_of(group))
        channels = group["granularity"] == "channel"
        dims = [int(keeps_rows(small, g)) if channels else None for small, g in zip(smalls, grads, strict=True)]
        _, sizes_n, sizes_r = adam_of_channels(smalls, states, age, group, dims, directions_too=False)
        phis = quotients(sizes_n, sizes_r)
        sizes = lengths(phis, all_norms(grads, dims))
        limits = growth_limits(without(correction(age, group), sizes), states, group["gamma"])
        rate = -group["lr"] * math.sqrt(group["scale"])
        scale_add(weights, grads, [phi * rate / limit for phi, limit in zip(phis, limits, strict=True)], dims)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        return {**super().spec(shape, dtype, **overrides), **self.limiter_spec(shape, dtype, overrides)}
