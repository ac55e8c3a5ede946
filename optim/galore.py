"""GaLore (2403.03507): Adam on the gradient's projection to its leading singular vectors, projected back.

Every `gap` steps P becomes the `rank` leading singular vectors of the gradient's shorter side. In each step:

    R = down(G)                         the gradient in r dimensions: G P, or P^T G of a wide matrix
    W <- W - lr scale up(N(R))          N: Adam
    W <- (1 - lr wd) W

What lies outside of the subspace is not used. Plain tensors are trained by Adam at the full lr.

One surprise: the moments are kept when P changes, old coefficients for new vectors, as the published code does it.
Singular vectors have no sign of their own, so the kept first moment follows the new signs (`on_refresh="keep"`).
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.projected import Projected, add_back, coordinates, directions
from thriftlab.optim.core.split import OnRefresh
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.storage import StateDtype
from thriftlab.optim.state.subspaces import Subspace, subspace_of


class Within(Projected):
    """The step of GaLore, in whatever subspaces."""

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        subspace = subspace_of(group)
        normalized = directions(coordinates(grads, states, subspace), states, age, group)
        add_back(weights, normalized, states, subspace, -group["lr"] * group["scale"])


class GaLore(Within, name="galore"):
    """GaLore: Adam in the span of the gradient's leading singular vectors.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to Adam's denominator, before bias correction.
        weight_decay: decoupled decay per step, times lr, after the update.
        rank: dimensions of the subspace, at most the shorter side of the matrix.
        gap: steps between refreshes of the subspace.
        scale: factor of lr for the matrices.
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
        scale: Annotated[float, Field(ge=0), Search(choices=[0.25, 1.0])] = 0.25,
        subspace: Annotated[Literal["svd", "warm_svd", "gauss", "orthogonal"] | Subspace, Field()] = "svd",
        on_refresh: Annotated[OnRefresh, Search(choices=["reset", "keep", "project"])] = "keep",
        stagger: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))
