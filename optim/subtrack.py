"""SubTrack++ (2502.01586): Fira in a subspace that follows the gradient by small rotations instead of a new SVD.

At first S are the `rank` leading singular vectors of the gradient's shorter side; here of a G with m <= n. Then every
`gap` steps S takes a step of gradient descent on |G - S A|^2 over all subspaces, along the steepest direction alone:

    A = S^T G;   F = -2 (G - S A) A^T;   sigma u v^T the leading term of its singular value decomposition
    S <- (S v cos(eta sigma) - u sin(eta sigma)) v^T + S (I - v v^T)                   eta: `step_size`
    M <- T M;   V <- (1 - b2^t) |T^2 (V^ - M^^2) + (T M^)^2|,  T = S_new^T S_old       as LDAdam estimates them
    step as Fira's, residual="exact"

One surprise: the released code does not follow. Of a matrix with m >= n it projects F by I - B B^T, for a B with
orthonormal rows, which is 0, and keeps the first basis for ever. This is the paper's rule, for all matrices.

Another one: sigma grows with |G|^2, so `step_size` is for gradients of one scale, as clipping makes them; what is far
above turns S by whole rounds.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.fira import Recovered
from thriftlab.optim.state.dense import tall_of
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.storage import StateDtype
from thriftlab.optim.state.subspaces import is_declared, subspace_of


class SubTrack(Recovered, name="subtrack"):
    """SubTrack++: full-rank training under a low-rank constraint of the state, in a subspace that is tracked.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to Adam's denominator, before bias correction.
        weight_decay: decoupled decay per step, times lr, after the update.
        rank: dimensions of the subspace, at most the shorter side of the matrix.
        gap: steps between rotations of the subspace.
        step_size: of a rotation, in units of 1 over the gradient squared.
        alpha: factor of lr for the matrices.
        gamma: how much the norm of the residual may grow in a step.
        stagger: matrices turn their subspaces by turns within a gap, not all in one step.
        state_dtype: how the moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-2)] = 1e-3,
        betas: Annotated[Betas, Field()] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-6,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        rank: Annotated[int, Field(ge=1), Search(choices=[32, 64, 128, 256])] = 128,
        gap: Annotated[int, Field(ge=1)] = 200,
        step_size: Annotated[float, Field(ge=0)] = 1e4,
        alpha: Annotated[float, Field(ge=0)] = 0.25,
        gamma: Annotated[float, Field(ge=1)] = 1.01,
        stagger: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()), subspace="svd", on_refresh="estimate", residual="exact")

    def next_basis(self, name: str, grad: Tensor, old: State, group: dict[str, Any], count: int) -> State:
        if not (old and is_declared(old, subspace_of(group), grad)):
            return super().next_basis(name, grad, old, group, count)
        return {"vectors": tracked(old["vectors"], grad, group["step_size"])}


def tracked(vectors: Tensor, grad: Tensor, step_size: float) -> Tensor:
    """S, turned in the plane of one of its directions and one outside of it  # [min(m, n), r]"""
    tall, old = tall_of(grad).double(), vectors.double()
    small = tall @ old  # A^T [max(m, n), r]
    slope = -2 * (tall.T @ small - old @ (small.T @ small))  # F [min(m, n), r]
    u, sigma, v = torch.linalg.svd(slope, full_matrices=False)
    (u, v), angle = (u[:, :1], v[:1].T), step_size * sigma[0]
    new = old + ((old @ v) * (angle.cos() - 1) - u * angle.sin()) @ v.T
    found = torch.linalg.qr(new)  # orthonormal as it is, but for the rounding of its dtype, refresh after refresh
    return (found.Q * found.R.diagonal().sign()).to(vectors)
