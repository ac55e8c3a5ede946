"""SCALE (2506.16659): gradients with rows of one length, and a momentum for the head alone.

    matrices      W <- (1 - lr wd) W - lr row(G)                     row(X): each row divided by its 2-norm
    embedding     W <- (1 - lr wd) W - lr column(G)                  over the vocabulary, for each feature
    head          H <- beta H + (1 - beta) G,  W <- (1 - lr wd) W - lr row(H)
    vectors       AdamW, its lr times `plain_lr_scale`

One surprise: there is no bias correction, and none is needed, for a factor of a row cancels. `length="rms"`, as in the
authors' code, divides by the root mean square of a row, so that a step is sqrt(columns) times as long.
"""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.groups import role_of
from thriftlab.optim.core.hyper import BelowOne, Betas, Search, arguments
from thriftlab.optim.core.normalised import Normalised, descend_columns, moved, step_rows
from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.rules import decay
from thriftlab.optim.state.storage import StateDtype


class Scale(Normalised, name="scale"):
    """SCALE for matrices, embedding and head, AdamW for the rest.

    Args:
        lr: the learning rate.
        weight_decay: decoupled decay per step, times lr.
        momentum: decay of the head's momentum.
        length: what becomes 1 for each row: its norm (the paper), or its root mean square (the published code).
        eps: least length that a row is divided by.
        plain_lr_scale: factor of lr for AdamW.
        betas: decay of AdamW's moments.
        adam_eps: added to AdamW's denominator, before bias correction.
        state_dtype: how momentum and moments are kept, whatever the dtype of the parameters.
    """

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-1)] = 2e-2,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        momentum: Annotated[BelowOne, Search(choices=[0.9, 0.95])] = 0.9,
        length: Annotated[Literal["norm", "rms"], Field()] = "norm",
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        plain_lr_scale: Annotated[float, Field(ge=0)] = 1.0,
        betas: Annotated[Betas, Field()] = (0.9, 0.999),
        adam_eps: Annotated[float, Field(ge=0)] = 1e-8,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def own_roles(self, group: dict[str, Any]) -> tuple[str, ...]:
        return "matrix", "input", "output"

    def keeps(self, role: str) -> bool:
        return role == "output"

    def descend_all(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], age: Age
    ) -> None:
        lrs, rms = [group["lr"]] * len(weights), group["length"] == "rms"
        if role_of(group) == "input":
            decay(weights, group)
            descend_columns(weights, grads, lrs, group["eps"], rms)
            return
        keeps = self.keeps(role_of(group))
        step_rows(weights, grads, states, group, lrs, lambda g, m: moved(g, m, group["momentum"]) if keeps else g, rms)
