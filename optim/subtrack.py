"""SubTrack++ (2502.01586): Fira in a subspace that follows the gradient by small rotations instead of a new SVD.

At first S are the `rank` leading singular vectors of the gradient's shorter side; here of a G with m <= n. Then every
`gap` steps S takes a step of gradient descent on |G - S A|^2 over all subspaces, along the steepest direction alone:

    A = S^T G;   F = -2 (G - S A) A^T;   sigma u v^T the leading term of its singular value decomposition
    S <- (S v cos(eta sigma) - u sin(eta sigma)) v^T + S (I - v v^T)                   eta: `step_size`
    M <- T M;   V <- (1 - b2^t) |T^2 (V^ - M^^2) + (T M^)^2|,  T = S_new^T S_old       as LDAdam estimates them
    step as Fira's, residual="exact"

That is the paper, form="exact". The released code, and what was published with it, is form="reference", and it hardly
tracks: of a matrix with m >= n it projects F by I - B B^T, for a B with orthonormal rows, which is 0, and so keeps the
first basis; T leads from the first basis to the last one, V <- (1 - b2) |T^2 (V - M^2) + (T M)^2| leaves little of it;
the step is Fira's, residual="reference".

One surprise: sigma grows with |G|^2, so `step_size` is for gradients of one scale, as clipping makes them; what is far
above turns S by whole rounds.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.fira import Recovered
from thriftlab.optim.state.asking import Asking
from thriftlab.optim.state.carry import transfer, turn
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.dense import is_tall, tracked
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.storage import StateDtype, load, store
from thriftlab.optim.state.subspaces import basis_of, subspace_of
from thriftlab.optim.state.torch_adamw import MOMENTS


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
        form: as in the paper (exact), or as in the released code (reference), which keeps most bases as they are.
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
        rank: Annotated[int, Field(ge=1)] = 128,
        gap: Annotated[int, Field(ge=1)] = 200,
        step_size: Annotated[float, Field(ge=0)] = 1e4,
        alpha: Annotated[float, Field(ge=0), Search(choices=[0.0625, 0.25, 1.0])] = 0.25,
        gamma: Annotated[float, Field(ge=1)] = 1.01,
        form: Annotated[Literal["exact", "reference"], Field()] = "exact",
        stagger: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()), subspace="svd", on_refresh="estimate")

    def next_basis(self, name: str, grad: Tensor, state: State, group: dict[str, Any], count: int) -> Asking:
        old = basis_of(state)
        wide_reference = group["form"] == "reference" and not is_tall(grad)
        _, declared = subspace_of(group).spec(tuple(grad.shape), grad.dtype)
        if not old or tuple(old["vectors"].shape) != declared["vectors"][0]:
            new = yield from super().next_basis(name, grad, {}, group, count)
            return {**new, "first": new["vectors"].clone()} if wide_reference else new
        if group["form"] == "reference" and not wide_reference:
            return old
        return {**old, "vectors": (yield from tracked(old["vectors"], grad, group["step_size"]))}

    def carry_over(self, old: State, new: State, grad: Tensor, state: State, group: dict[str, Any]) -> None:
        if group["form"] == "exact" or old["vectors"].shape != new["vectors"].shape:
            super().carry_over(old, new, grad, state, group)
            return
        change = transfer(subspace_of(group), {"vectors": old.get("first", old["vectors"])}, old, grad)
        (m, v), rows = (load(state, key) for key in MOMENTS), is_tall(grad)
        mean = turn(m, change, rows)
        square = (turn(v - m.square(), change.square(), rows) + mean.square()).abs() * (1 - group["betas"][1])
        store(state, MOMENTS[0], m.copy_(mean))
        store(state, MOMENTS[1], v.copy_(square))

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        super().descend_all(weights, grads, states, {**group, "residual": group["form"]}, age)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        spec = super().spec(shape, dtype, **overrides)
        if {**self.defaults, **overrides}["form"] == "exact" or "basis.vectors" not in spec or shape[0] >= shape[1]:
            return spec
        return {**spec, "basis.first": spec["basis.vectors"]}
