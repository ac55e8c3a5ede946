"""NorMuon (2510.05491): Muon whose orthogonal updates have rows of like lengths; for matrices.

    B <- mu B + (1 - mu) G
    O <- orthogonalise(B)                                       Muon's
    v <- b2 v + (1 - b2) mean(O^2)                              one number for each row
    P <- O / (sqrt(v) + row_eps)
    W <- (1 - lr wd) W - 0.2 lr sqrt(m n) P / |P|

That is the paper, form="exact": an update's entries have the root mean square 0.2, about that of AdamW's. The authors'
file, and the speed records made with it, are form="reference": O <- orthogonalise((1 - mu) G + mu B), as Nesterov, and
W <- (1 - lr wd) W - lr sqrt(max(1, m / n)) P |O| / |P|, which is shorter and wants a larger lr.

Embeddings, head and norms are trained by AdamW with the same lr. v is not corrected for its start at zero: only its
ratios between rows count.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import BelowOne, Betas, Search, arguments
from thriftlab.optim.core.projected import norms
from thriftlab.optim.muon import Orthogonalised, in_dtype
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.storage import StateDtype, wide
from thriftlab.optim.state.subspaces import splits

ROWS = "exp_avg_sq_row"  # v, in fp32 whatever `state_dtype`: it is small, and stands in a denominator
FORMS: dict[str, dict[str, Any]] = {
    "exact": {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
    "reference": {"nesterov": True, "adjust_lr_fn": "original"},
}


class NorMuon(Orthogonalised, name="normuon"):
    """NorMuon for the matrices, AdamW for the rest.

    Args:
        lr: the learning rate.
        weight_decay: decoupled decay per step, times lr.
        momentum: decay of the momentum.
        beta2: decay of the mean square of each row.
        form: as in the paper (exact), or as in the authors' file (reference), with Nesterov and shorter steps.
        ns_coefficients: of the Newton-Schulz iteration, a X + b (X X^T) X + c (X X^T)^2 X.
        eps: least norm that a matrix is divided by.
        row_eps: added to the root mean square of a row.
        ns_steps: steps of the iteration.
        iteration: precision of the iteration.
        split_lr_scale: factor of lr for the matrices.
        betas: decay of AdamW's moments.
        adam_eps: added to AdamW's denominator, after bias correction.
        state_dtype: how momentum and AdamW's moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-1)] = 1e-3,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.1,
        momentum: Annotated[BelowOne, Search(choices=[0.9, 0.95])] = 0.95,
        beta2: Annotated[BelowOne, Field()] = 0.95,
        form: Annotated[Literal["exact", "reference"], Field()] = "exact",
        ns_coefficients: Annotated[tuple[float, float, float], Field()] = (3.4445, -4.7750, 2.0315),
        eps: Annotated[float, Field(gt=0)] = 1e-7,
        row_eps: Annotated[float, Field(gt=0)] = 1e-10,
        ns_steps: Annotated[int, Field(ge=0, lt=100)] = 5,
        iteration: Annotated[Literal["bf16", "fp32"], Field()] = "bf16",
        split_lr_scale: Annotated[float, Field(ge=0)] = 1.0,
        betas: Annotated[Betas, Field()] = (0.9, 0.95),
        adam_eps: Annotated[float, Field(ge=0)] = 1e-10,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def update_matrices(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        for weight, state in zip(weights, states, strict=True):
            if ROWS not in state:
                state[ROWS] = torch.zeros(weight.shape[0], dtype=wide(weight.dtype), device=weight.device)
        super().update_matrices(names, weights, grads, states, {**group, **FORMS[group["form"]]})

    def shaped(self, updates: list[Tensor], states: list[State], group: dict[str, Any]) -> list[Tensor]:
        """P with the norm of O, or an orthogonal matrix's, sqrt(min(m, n)), of which the ratio makes 0.2 sqrt(m n)."""
        squares = [state[ROWS] for state in states]  # [m] each
        updates = in_dtype(updates, squares[0].dtype)
        rows = [norms(update, 1).squeeze(1) for update in updates]  # [m]
        means = torch._foreach_mul(rows, rows)
        torch._foreach_div_(means, [float(max(update.shape[1], 1)) for update in updates])
        torch._foreach_lerp_(squares, means, 1 - group["beta2"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, group["row_eps"])
        lengths = torch._foreach_norm(torch._foreach_div(rows, roots))  # |P|
        torch._foreach_clamp_min_(lengths, group["row_eps"])
        factors = torch._foreach_reciprocal(lengths)
        exact = [math.sqrt(min(update.shape)) for update in updates]
        torch._foreach_mul_(factors, exact if group["form"] == "exact" else torch._foreach_norm(rows))
        counts = [len(root) for root in roots]
        scales = torch.cat([factor.expand(m) for factor, m in zip(factors, counts, strict=True)]) / torch.cat(roots)
        for update, scale in zip(updates, scales.split(counts), strict=True):
            update.mul_(scale[:, None])
        return updates

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        split = splits(shape, {**self.defaults, **overrides})
        return {**super().spec(shape, dtype, **overrides), **({ROWS: ((shape[0],), wide(dtype))} if split else {})}
