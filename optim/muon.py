"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalised; for matrices.

    B <- mu B + (1 - mu) G
    O <- orthogonalise((1 - mu) G + mu B)                       Nesterov; without it orthogonalise(B)
    W <- (1 - lr wd) W - lr ratio O                             ratio: a function of the matrix's shape

Embeddings, head and norms are trained by AdamW with the same lr; `split_lr_scale` is a factor for the matrices alone.
With `iteration="bf16"` equal to `torch.optim.Muon`, whose names and defaults these are.

One surprise: `orthogonalise` does not converge and is not meant to. Five steps with coefficients chosen for a steep
slope at zero send every singular value to somewhere between 0.7 and 1.2, which trains as well as 1 (so `iteration` in
bf16 does no harm either).
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import BelowOne, Betas, Search, arguments
from thriftlab.optim.core.kinds import Numbers, numbers_of_adamw
from thriftlab.optim.core.split import SplitOptimizer, kept_of
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches, kept_unless
from thriftlab.optim.state.rules import adamw_spec, add_scaled, decay
from thriftlab.optim.state.storage import StateDtype, kept_spec, load, make_zero, store, wide

AdjustLr = Literal["original", "match_rms_adamw"]
BUFFERS = ("momentum_buffer",)
Shaped = Callable[[list[Tensor], list[State], dict[str, Any]], list[Tensor]]


class Orthogonalised(SplitOptimizer):
    """Muon, whose matrices' updates a method may still change (`shaped`) before they are taken off the weights."""

    takes_applied = True

    def __init__(self, params, **defaults: Any):
        super().__init__(params, **defaults)
        if "momentum" in self.defaults:
            del self.defaults["betas"]  # by which schedulers that cycle the momentum would know it from SGD's

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        first = {"betas": self.param_groups[0]["betas"]} if self.param_groups else {}
        super().add_param_group({**first, **param_group})

    def plain_numbers(self, group: dict[str, Any]) -> Numbers:
        return numbers_of_adamw({**group, "eps": group["adam_eps"]})

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        super().update_plain(weights, grads, states, {**group, "eps": group["adam_eps"]})

    def update_matrices(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        for weight, state in zip(weights, states, strict=True):
            if BUFFERS[0] not in state:
                make_zero(BUFFERS, weight, state, group)
        for some in batches(weights):
            with kept_unless(group.get("applied"), [*weights[some], *kept_of(states[some])]):
                self.descend_all(weights[some], grads[some], states[some], {**group, "applied": None}, 0)

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        descend(weights, grads, states, group, self.shaped)

    def shaped(self, updates: list[Tensor], states: list[State], group: dict[str, Any]) -> list[Tensor]:
        """What becomes of orthogonal matrices; they may be changed in place."""
        return updates

    def check_group(self, group: dict[str, Any]) -> None:
        pass  # no subspace

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        if not (group["split"] and len(shape) == 2):
            return adamw_spec(shape, dtype, **group)
        return kept_spec(BUFFERS, shape, dtype, group)


class Muon(Orthogonalised, name="muon"):
    """Muon for the matrices, AdamW for the rest.

    Args:
        lr: the learning rate.
        weight_decay: decoupled decay per step, times lr.
        momentum: decay of the momentum.
        nesterov: look one step ahead of the momentum.
        ns_coefficients: of the Newton-Schulz iteration, a X + b (X X^T) X + c (X X^T)^2 X.
        eps: least norm that a matrix is divided by.
        ns_steps: steps of the iteration.
        adjust_lr_fn: factor of lr for an m x n matrix: sqrt(max(1, m/n)), or 0.2 sqrt(max(m, n)), for an AdamW's lr.
        iteration: precision of the iteration.
        split_lr_scale: factor of lr for the matrices.
        betas: decay of AdamW's moments.
        adam_eps: added to AdamW's denominator, after bias correction.
        state_dtype: how momentum and moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-1)] = 1e-3,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.1,
        momentum: Annotated[BelowOne, Search(choices=[0.9, 0.95])] = 0.95,
        nesterov: Annotated[bool, Field()] = True,
        ns_coefficients: Annotated[tuple[float, float, float], Field()] = (3.4445, -4.7750, 2.0315),
        eps: Annotated[float, Field(gt=0)] = 1e-7,
        ns_steps: Annotated[int, Field(ge=0, lt=100)] = 5,
        adjust_lr_fn: Annotated[AdjustLr | None, Field()] = None,
        iteration: Annotated[Literal["bf16", "fp32"], Field()] = "bf16",
        split_lr_scale: Annotated[float, Field(ge=0), Search(1.0, 100.0)] = 1.0,
        betas: Annotated[Betas, Field()] = (0.9, 0.999),
        adam_eps: Annotated[float, Field(ge=0)] = 1e-8,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))


def descend(
    weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], shaped: Shaped
) -> None:
    """The step of some matrices, in place."""
    momenta = [load(state, BUFFERS[0]) for state in states]
    grads = [grad.to(momentum.dtype) for grad, momentum in zip(grads, momenta, strict=True)]
    torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
    ahead = list(torch._foreach_lerp(grads, momenta, group["momentum"])) if group["nesterov"] else momenta
    ahead = in_dtype(ahead, torch.bfloat16 if group["iteration"] == "bf16" else wide(ahead[0].dtype))
    norms = list(torch._foreach_norm(ahead))
    torch._foreach_clamp_min_(norms, group["eps"])
    updates = [
        orthogonalise(matrix, group["ns_coefficients"], group["ns_steps"], group["eps"], norm)
        for matrix, norm in zip(ahead, norms, strict=True)
    ]
    updates = shaped(updates, states, group)
    decay(weights, group)
    lr = group["lr"] * group["split_lr_scale"]
    updates = in_dtype(updates, weights[0].dtype)
    for shape in dict.fromkeys(weight.shape for weight in weights):
        alike = [i for i, weight in enumerate(weights) if weight.shape == shape]
        some = [weights[i] for i in alike], [updates[i] for i in alike]
        add_scaled(*some, -lr * ratio(group["adjust_lr_fn"], *shape))
    for state, momentum in zip(states, momenta, strict=True):
        store(state, BUFFERS[0], momentum)


def in_dtype(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies where there is another one."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def orthogonalise(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, norm: Tensor | None = None
) -> Tensor:
    """Newton-Schulz: the matrix [m, n] with its singular values sent near 1, in its own dtype; `norm`, if it is
    known, is its norm or `eps`."""
    norm = matrix.norm().clamp(min=eps) if norm is None else norm
    return newton_schulz(matrix / norm, [coefficients] * steps)  # no singular value is above 1


def newton_schulz(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """a X + b (X X^T) X + c (X X^T)^2 X of a matrix, and of what that makes, for each (a, b, c)."""
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x  # the smaller Gram matrix
    for a, b, c in polynomials:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def ratio(adjust_lr_fn: AdjustLr | None, rows: int, columns: int) -> float:
    """Factor of lr: updates of all shapes have like norms ("original"), or the size of AdamW's (2502.16982)."""
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / max(columns, 1)))
