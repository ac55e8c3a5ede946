"""Dion2 (2512.16928): Muon that orthogonalises only the largest slices of its momentum; for matrices.

A slice is a row, or a column where there are fewer; the part `fraction` with the largest sums of |B| are chosen.

    B <- B + G
    O <- orthogonalise(B of these slices)
    B <- `error_feedback` B of these slices; what is not chosen stays, and is larger the next time
    W <- (1 - lr wd) W;  W <- W - lr ratio O of these slices    ratio: a function of the whole matrix's shape

Embeddings, head and norms are trained by AdamW with the same lr; `split_lr_scale` is a factor for the matrices alone.
The surprise: the iteration has other coefficients at each of its five steps (Polar Express, 2505.16932, or "ns5").
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import BelowOne, Betas, Search, arguments
from thriftlab.optim.muon import BUFFERS, Orthogonalised, in_dtype, newton_schulz
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.rules import decay
from thriftlab.optim.state.storage import StateDtype, load, store

ITERATIONS = {  # by what the norm is enlarged, and the coefficients of each step
    "polar": (1.02, (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    )),
    "ns5": (1.0, ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                  (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))),
}  # fmt: skip
AdjustLr = Literal["spectral_norm", "rms_norm"]


class Dion2(Orthogonalised, name="dion2"):
    """Dion2 for the matrices, AdamW for the rest.

    Args:
        lr: the learning rate.
        weight_decay: decoupled decay per step, times lr.
        fraction: part of the rows or columns that is orthogonalised in a step.
        error_feedback: what the momentum of these is multiplied by.
        coefficients: of the iteration, a X + b (X X^T) X + c (X X^T)^2 X in each step.
        eps: added to the norm that a matrix is divided by.
        adjust_lr_fn: factor of lr for an m x n matrix: sqrt(m/n), or 0.2 sqrt(max(m, n)), for an AdamW's lr.
        iteration: precision of the iteration.
        split_lr_scale: factor of lr for the matrices.
        betas: decay of AdamW's moments.
        adam_eps: added to AdamW's denominator, after bias correction.
        state_dtype: how momentum and moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-3, 1e-1)] = 1e-2,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.01, 0.1])] = 0.01,
        fraction: Annotated[float, Field(gt=0, le=1), Search(choices=[0.25, 0.5, 1.0])] = 0.25,
        error_feedback: Annotated[BelowOne, Field()] = 0.95,
        coefficients: Annotated[Literal["polar", "ns5"], Field()] = "polar",
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        adjust_lr_fn: Annotated[AdjustLr | None, Field()] = "spectral_norm",
        iteration: Annotated[Literal["bf16", "fp32"], Field()] = "bf16",
        split_lr_scale: Annotated[float, Field(ge=0)] = 1.0,
        betas: Annotated[Betas, Field()] = (0.9, 0.95),
        adam_eps: Annotated[float, Field(ge=0)] = 1e-8,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        momenta = [load(state, BUFFERS[0]) for state in states]
        torch._foreach_add_(momenta, [grad.to(b.dtype) for grad, b in zip(grads, momenta, strict=True)])
        dims = [int(weight.shape[0] > weight.shape[1]) for weight in weights]
        places = [largest(b, dim, group["fraction"]) for b, dim in zip(momenta, dims, strict=True)]
        slices = [b.index_select(dim, at) for b, dim, at in zip(momenta, dims, places, strict=True)]
        updates = orthogonal(slices, group)
        torch._foreach_mul_(updates, [-ratio(group["adjust_lr_fn"], *weight.shape) for weight in weights])
        torch._foreach_mul_(updates, group["lr"] * group["split_lr_scale"])
        torch._foreach_mul_(slices, group["error_feedback"])
        decay(weights, group)
        updates = in_dtype(updates, weights[0].dtype)
        for w, state, b, dim, at, o, left in zip(weights, states, momenta, dims, places, updates, slices, strict=True):
            w.index_add_(dim, at, o)
            store(state, BUFFERS[0], b.index_copy_(dim, at, left))


def largest(momentum: Tensor, dim: int, fraction: float) -> Tensor:
    """Places of the rows (`dim` 0) or columns with the largest sums of absolute entries  # [ceil(fraction slices)]"""
    walks = dim == 1 and momentum.device.type == "cpu"  # vector_norm would, down each column
    sums = momentum.abs().sum(0) if walks else torch.linalg.vector_norm(momentum, 1, dim=1 - dim)
    return sums.topk(math.ceil(fraction * len(sums))).indices


def orthogonal(matrices: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The matrices with their singular values sent to 1, in new tensors."""
    margin, polynomials = ITERATIONS[group["coefficients"]]
    starts = in_dtype(matrices, torch.bfloat16 if group["iteration"] == "bf16" else matrices[0].dtype)
    sizes = torch._foreach_add(torch._foreach_mul(torch._foreach_norm(starts), margin), group["eps"])
    updates = [newton_schulz(start / size, polynomials) for start, size in zip(starts, sizes, strict=True)]
    return in_dtype(updates, matrices[0].dtype)


def ratio(adjust_lr_fn: AdjustLr | None, rows: int, columns: int) -> float:
    factors = {"spectral_norm": rows / max(columns, 1), "rms_norm": 0.04 * max(rows, columns), None: 1.0}
    return math.sqrt(factors[adjust_lr_fn])
