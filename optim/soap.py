"""SOAP (2409.11321): Adam in the eigenbasis of Shampoo's preconditioners.

At the first step L = (1 - s) G G^T and R = (1 - s) G^T G, Q_L and Q_R are their eigenvectors, largest first, and no
weight is moved. In each step k = 1, 2, ... from then on:

    P = Q_L^T G Q_R;   M <- b1 M + (1 - b1) P;   V <- b2 V + (1 - b2) P^2
    W <- W - lr c Q_L (M / (sqrt(V) + eps)) Q_R^T               c = sqrt(1 - b2^k) / (1 - b1^k)
    W <- (1 - lr wd) W
    L <- s L + (1 - s) G G^T;   R <- s R + (1 - s) G^T G
    every `gap` steps Q_L <- qr(L Q_L), its columns first in the order of diag(Q_L^T L Q_L), and V's rows with them;
    Q_R likewise; M is expressed in the new bases

A side longer than `max_precond_dim` has no basis, nor has what is split and no matrix. The rest is trained by Adam from
the first step on. One surprise: a matrix that is not square has eigenvectors that its first gradient does not tell, and
two right programs, which choose others, go different ways.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.due import are_finite, due_refreshes, next_age
from thriftlab.optim.core.guard import REMEDY
from thriftlab.optim.core.hyper import BelowOne, Betas, Count, Search, arguments
from thriftlab.optim.core.normalised import TINY
from thriftlab.optim.core.projected import Projected, directions, norms
from thriftlab.optim.core.split import COUNTERS, zero_moments
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.eigenbases import accumulate, begin, down, eigenbases_spec, has_bases, turn, up
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches
from thriftlab.optim.state.rules import adamw_spec, add_scaled
from thriftlab.optim.state.storage import StateDtype, kept_spec, rounding_spec, wide
from thriftlab.optim.state.torch_adamw import MOMENTS


class SOAP(Projected, name="soap"):
    """SOAP for what is split, Adam for the rest.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to Adam's denominator, before bias correction.
        weight_decay: decoupled decay per step, times lr, after the update.
        gap: steps from one turn of the bases to the next.
        shampoo_beta: decay of the preconditioners; null: that of the second moment.
        max_precond_dim: longest side that has a basis.
        normalize_grads: updates are brought to the root mean square 1.
        state_dtype: how the moments are kept; preconditioners and bases are in fp32.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(3e-4, 1e-2)] = 3e-3,
        betas: Annotated[Betas, Field()] = (0.95, 0.95),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.01, 0.1])] = 0.01,
        gap: Annotated[Count, Search(choices=[1, 10, 100])] = 10,
        shampoo_beta: Annotated[BelowOne | None, Field()] = None,
        max_precond_dim: Annotated[int, Field(ge=0)] = 10_000,
        normalize_grads: Annotated[bool, Field()] = False,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def takes(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return group["split"]

    def update_matrices(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        due = due_refreshes(names, weights, states, group)
        new = [i for i, count in enumerate(due) if count == 0]
        for i, finite in zip(new, are_finite([grads[i] for i in new]), strict=True):
            if finite:
                next_age([weights[i]], [states[i]], group)
                zero_moments(grads[i], states[i], group)
                begin(grads[i], states[i], group)
        old = [i for i in range(len(due)) if i not in new]
        for some in batches([weights[i] for i in old]):
            here = old[some]
            self.step_batch([weights[i] for i in here], [grads[i] for i in here], [states[i] for i in here], group)
        for i in [i for i in old if due[i] is not None]:
            turn(states[i])

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        turned = [down(grad.to(wide(grad.dtype)), state) for grad, state in zip(grads, states, strict=True)]
        updates = directions(turned, states, age, group)
        for update in updates if group["normalize_grads"] else ():
            update.div_(norms(update, None).div_(max(update.numel(), 1) ** 0.5).clamp_(min=TINY))
        updates = [up(update, state).to(w.dtype) for update, state, w in zip(updates, states, weights, strict=True)]
        add_scaled(weights, updates, -group["lr"])
        for grad, state in zip(grads, states, strict=True):
            accumulate(grad, state, group)

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        if not self.takes(shape, group):
            return adamw_spec(shape, dtype, **group)
        moments = {**kept_spec(MOMENTS, shape, dtype, group), **rounding_spec(group)}
        return {**COUNTERS, **moments, **eigenbases_spec(shape, dtype, group)}

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        fits = "start" in state and has_bases(state, tuple(weight.shape), group)
        if MOMENTS[0] in state and group["split"] and not fits:
            raise ValueError(f"{name}: the state is of another method, or of another max_precond_dim; {REMEDY}")

    def passing_spec(self, weight: Tensor, group: dict[str, Any]) -> Spec:
        """All but counters: there is none of it before the first finite gradient."""
        spec, stays = self.spec(tuple(weight.shape), weight.dtype, **group), {**COUNTERS, **rounding_spec(group)}
        return {key: entry for key, entry in spec.items() if group["split"] and key not in stays}
