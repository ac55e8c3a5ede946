"""Conda (2509.24218): Adam along the singular vectors of its own first moment, all of them.

    M <- b1 M + (1 - b1) G
    Q: every `gap` steps all singular vectors of M's shorter side
    V <- b2 V + (1 - b2) down(G)^2                              down(X) = X Q, or Q^T X of a wide matrix
    W <- W - lr scale c up(down(M) / (sqrt(V) + eps))           c = sqrt(1 - b2^k) / (1 - b1^k)
    W <- (1 - lr wd) W

Plain tensors are trained by Adam at the full lr. V keeps its numbers when Q changes, old coefficients for new vectors,
as published; nothing is left out, so no state is saved: this is GaLore with the rank of the matrix, and a ruler.

One surprise: M is kept as down(M), and turned when Q changes. So a step has two products and not three.
"""

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.galore import Within
from thriftlab.optim.state.asking import Asking
from thriftlab.optim.state.dense import Svd
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.storage import StateDtype, load, store
from thriftlab.optim.state.subspaces import basis_of
from thriftlab.optim.state.torch_adamw import MOMENTS


class AllVectors(Svd):
    """All singular vectors of the shorter side."""

    def search(self, grad: Tensor, old: State) -> Asking:
        rank = self.size(tuple(grad.shape))
        return (yield from super().search(grad, old)) if grad.numel() else {"vectors": grad.new_zeros(rank, rank)}


WHOLE = AllVectors(density=1.0)


class Conda(Within, name="conda"):
    """Conda for the matrices, Adam for the rest.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to Adam's denominator, before bias correction.
        weight_decay: decoupled decay per step, times lr, after the update.
        gap: steps from one set of singular vectors to the next.
        scale: factor of lr for the matrices.
        state_dtype: how the moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-3, 3e-2)] = 1e-2,
        betas: Annotated[Betas, Field()] = (0.9, 0.99),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        gap: Annotated[int, Field(ge=1), Search(choices=[200, 2000])] = 2000,
        scale: Annotated[float, Field(ge=0)] = 0.25,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()), subspace=WHOLE, on_refresh="keep")

    def next_basis(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int) -> Asking:
        return super().next_basis(name, momentum(grad, state, group), state, group, count)

    def refresh(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int, new: State) -> None:
        super().refresh(name, momentum(grad, state, group), state, group, count, new)

    def carry_over(self, old: State, new: State, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        first = load(state, MOMENTS[0])
        store(state, MOMENTS[0], first.copy_(WHOLE.down(WHOLE.up(first, old), new)))


def momentum(grad: Tensor, state: State, group: dict[str, Any]) -> Tensor:
    """M as it will be after this step, of which a subspace is made."""
    if basis := basis_of(state):
        kept = WHOLE.up(load(state, MOMENTS[0]), basis)
        grad = kept.lerp(grad.to(kept.dtype), 1 - group["betas"][0]).to(grad.dtype)
    return grad.nan_to_num(0.0, 0.0, 0.0)
