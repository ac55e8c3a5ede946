"""Dion2 (2512.16928): Muon that orthogonalises only the largest slices of its momentum; for matrices.

A slice is a row, or a column where there are fewer. In each step the part `fraction` of them with the largest sums of
absolute entries is chosen:

    B <- B + G
    O <- orthogonalise(B of these slices)
    B <- `error_feedback` B of these slices; what is not chosen stays, and is larger the next time
    W <- (1 - lr wd) W;  W <- W - lr ratio O of these slices    ratio: a function of the whole matrix's shape

Embeddings, head and norms are trained by AdamW with the same lr; `split_lr_scale` is a factor for the matrices alone.

One surprise: the iteration has other coefficients at each of its five steps (Polar Express, 2505.16932), which are for
norms up to 1 / 1.02; with "ns5" those of an older iteration.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import BelowOne, Betas, Search, arguments
from thriftlab.optim.core.projected import norms
from thriftlab.optim.muon import BUFFERS, Orthogonalised, newton_schulz
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.rules import decay
from thriftlab.optim.state.storage import StateDtype, load, store

POLYNOMIALS = {
    "polar": ((8.156554524902461, -22.48329292557795, 15.878769915207462),
              (4.042929935166739, -2.808917465908714, 0.5000178451051316),
              (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
              (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
              (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)),
    "ns5": ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)),
}  # fmt: skip
MARGIN = {"polar": 1.02, "ns5": 1.0}
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
        decay(weights, group)
        for weight, momentum in zip(weights, momenta, strict=True):
            dim = int(weight.shape[0] > weight.shape[1])
            places = largest(momentum, dim, group["fraction"])
            slices = momentum.index_select(dim, places)
            factor = group["lr"] * group["split_lr_scale"] * ratio(group["adjust_lr_fn"], *weight.shape)
            update = orthogonal(slices, group).mul_(-factor)
            weight.index_add_(dim, places, update.to(weight.dtype))
            momentum.index_copy_(dim, places, slices.mul_(group["error_feedback"]))
        for state, momentum in zip(states, momenta, strict=True):
            store(state, BUFFERS[0], momentum)


def largest(momentum: Tensor, dim: int, fraction: float) -> Tensor:
    """Places of the rows (`dim` 0) or columns with the largest sums of absolute entries  # [ceil(fraction slices)]"""
    sums = torch.linalg.vector_norm(momentum, 1, dim=1 - dim)
    return sums.topk(math.ceil(fraction * len(sums))).indices


def orthogonal(slices: Tensor, group: dict[str, Any]) -> Tensor:
    """The matrix with its singular values sent to 1."""
    x = slices.to(torch.bfloat16) if group["iteration"] == "bf16" else slices
    size = norms(x, None).mul_(MARGIN[group["coefficients"]]).add_(group["eps"])
    return newton_schulz(x / size.to(x.dtype), POLYNOMIALS[group["coefficients"]]).to(slices.dtype)


def ratio(adjust_lr_fn: AdjustLr | None, rows: int, columns: int) -> float:
    if adjust_lr_fn == "rms_norm":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / max(columns, 1)) if adjust_lr_fn else 1.0
