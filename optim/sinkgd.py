"""SinkGD (2502.06742): gradients whose rows and columns all have one length, by a few passes; no memory for matrices.

    X = G;  `iterations` times: rows of X to the norm sqrt(n), then its columns to the norm sqrt(m)
    W <- (1 - lr wd) W - lr split_lr_scale X

With `whiten` SWAN (2412.13148): X is G with rows of mean 0 and deviation 1, and its polar factor O is the direction,
at the norm of X. Embedding, head and vectors are AdamW's, with the same lr.

The surprise: X is diag(a) G diag(b) at every pass, so a pass is two products of the squares of G with a vector, and the
matrix itself is scaled once. Squares are of rows of length 1, for those of a small gradient would underflow.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.normalised import TINY, Normalised, sinkhorn
from thriftlab.optim.core.projected import norms
from thriftlab.optim.muon import orthogonalise
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.rules import adamw, decay
from thriftlab.optim.state.storage import StateDtype, wide

POLAR = (15 / 8, -10 / 8, 3 / 8)  # Newton-Schulz coefficients that converge, to 1, from any singular value up to 1


class SinkGD(Normalised, name="sinkgd"):
    """SinkGD for the matrices, AdamW for the rest.

    Args:
        lr: the learning rate.
        weight_decay: decoupled decay per step, times lr.
        iterations: passes over rows and columns.
        split_lr_scale: factor of lr for the matrices.
        whiten: SWAN's direction instead of the passes.
        center: whether SWAN takes the mean from each row.
        ns_steps: steps of SWAN's iteration towards the polar factor.
        betas: decay of AdamW's moments.
        eps: added to AdamW's denominator, after bias correction.
        state_dtype: how AdamW's moments are kept, whatever the dtype of the parameters.
    """

    roles = False

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-1)] = 2e-2,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        iterations: Annotated[int, Field(ge=1, lt=100)] = 5,
        split_lr_scale: Annotated[float, Field(ge=0), Search(0.01, 1.0)] = 0.05,
        whiten: Annotated[bool, Field()] = False,
        center: Annotated[bool, Field()] = True,
        ns_steps: Annotated[int, Field(ge=1, lt=100)] = 16,
        betas: Annotated[Betas, Field()] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def keeps(self, role: str) -> bool:
        return False

    def work(self, weight: Tensor, group: dict[str, Any]) -> int:
        products = group["whiten"] and self.takes(tuple(weight.shape), group)
        return weight.numel() * (min(weight.shape) if products else 1)

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        adamw(weights, grads, states, **group)

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        decay(weights, group)
        lr = group["lr"] * group["split_lr_scale"]
        if group["whiten"]:
            for weight, direction in zip(weights, whitened(grads, group["center"], group["ns_steps"]), strict=True):
                weight.sub_((direction * lr).to(weight.dtype))
            return
        for weight, grad, (rows, columns, scratch) in zip(
            weights, grads, sinkhorn(grads, group["iterations"]), strict=True
        ):
            weight.addcmul_(torch.mul(grad, rows, out=scratch), columns * -lr)


def whitened(grads: list[Tensor], center: bool, steps: int) -> list[Tensor]:
    """SWAN's directions."""
    found = []
    for grad in grads:
        x = grad.to(wide(grad.dtype))
        x = x - x.mean(1, keepdim=True) if center else x
        x = x / norms(x, 1).clamp_min_(TINY) * x.shape[1] ** 0.5
        polar = orthogonalise(x, POLAR, steps, TINY)
        found.append(polar * (norms(x, None) / norms(polar, None).clamp_min(TINY)))
    return found
