"""RMNP (2603.20527): the rows of the momentum, each brought to length 1, where Muon orthogonalises them.

    B <- beta B + (1 - beta) G
    U <- (1 - mu) G + mu B                          with `nesterov`; without it U = B
    W <- (1 - lr wd) W - lr ratio row(U)            row(X): each row divided by its 2-norm

The ratio is 1, or with `adjust_lr` sqrt(max(1, m/n)). Embedding and head are AdamW's, or with `tables="own"` stepped as
matrices are (RMNP-All); vectors are AdamW's.

One surprise: tall matrices are not transposed. A row is one output in all of them, on purpose.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import BelowOne, Betas, Search, arguments
from thriftlab.optim.core.kinds import Kind, Numbers
from thriftlab.optim.core.normalised import Normalised, moved, step_rows
from thriftlab.optim.core.projected import correction
from thriftlab.optim.core.tables import Tables
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.rules import decay
from thriftlab.optim.state.storage import StateDtype


class RMNP(Normalised, name="rmnp"):
    """RMNP for the matrices, AdamW for the rest.

    Args:
        lr: the learning rate.
        weight_decay: decoupled decay per step, times lr.
        beta: decay of the momentum.
        nesterov: look one step ahead of the momentum, as the published code does.
        momentum: share of the momentum in that look; null: beta.
        adjust_lr: factor of lr for an m x n matrix, sqrt(max(1, m/n)), as in the published code.
        eps: least norm that a row is divided by.
        tables: who steps embedding and head: AdamW, in 8 bits or not, Ember, or RMNP itself (own, RMNP-All).
        plain_lr_scale: factor of lr for AdamW.
        plain_decay: factor of AdamW's decay: lr, or lr with Adam's bias correction, as in some published code.
        betas: decay of AdamW's moments.
        adam_eps: added to AdamW's denominator, before bias correction.
        state_dtype: how momentum and moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-1)] = 5e-3,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.1,
        beta: Annotated[BelowOne, Search(choices=[0.9, 0.95])] = 0.95,
        nesterov: Annotated[bool, Field()] = False,
        momentum: Annotated[BelowOne | None, Field()] = None,
        adjust_lr: Annotated[bool, Field()] = False,
        eps: Annotated[float, Field(gt=0)] = 1e-12,
        tables: Annotated[Tables, Field()] = "adamw",
        plain_lr_scale: Annotated[float, Field(ge=0)] = 1.0,
        plain_decay: Annotated[Literal["lr", "reference"], Field()] = "lr",
        betas: Annotated[Betas, Field()] = (0.9, 0.95),
        adam_eps: Annotated[float, Field(ge=0)] = 1e-10,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def plain_numbers(self, group: dict[str, Any]) -> Numbers:
        return super().plain_numbers(group)

    def plain_step(self, group: dict[str, Any]) -> Kind | None:
        return None if group["plain_decay"] == "reference" else super().plain_step(group)

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        if group["plain_decay"] == "reference":
            for weight, state in zip(weights, states, strict=True):
                age = state["step"].double() + 1 if "step" in state else torch.ones((), dtype=torch.float64)
                decay([weight], {**group, "lr": (group["lr"] * correction(age, group)).to(weight.device)})
            group = {**group, "weight_decay": 0.0}
        super().update_plain(weights, grads, states, group)

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        share = group["beta"] if group["momentum"] is None else group["momentum"]
        ahead = share if group["nesterov"] else None
        lrs = [group["lr"] * (ratio(*weight.shape) if group["adjust_lr"] else 1.0) for weight in weights]
        step_rows(weights, grads, states, group, lrs, lambda g, m: moved(g, m, group["beta"], ahead))


def ratio(rows: int, columns: int) -> float:
    return math.sqrt(max(1, rows / max(columns, 1)))
