"""signSGD (1802.04434): the direction of every coordinate, and no memory at all.

    W <- (1 - lr wd) W - lr sign(G)

One surprise: a zero gradient does not move its weight; sign(0) = 0.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Search, arguments
from thriftlab.optim.core.kinds import NOTHING, Kind, Numbers
from thriftlab.optim.core.method import Method
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.rules import add_signs, decay


class SignSGD(Method, name="signsgd"):
    """signSGD on every tensor.

    Args:
        lr: the learning rate: how far each coordinate moves in a step.
        weight_decay: decoupled decay per step, times lr.
    """

    takes_applied = True

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-5, 1e-2)] = 5e-4,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        decay(weights, group)
        add_signs(weights, grads, -group["lr"], group.get("applied"))

    def kernel_step(self, shape: tuple[int, ...], state: State, group: dict[str, Any]) -> Kind | None:
        return Kind(NOTHING, numbers, free="sign")

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return True

    def in_pieces(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return True

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        return {}


def numbers(group: dict[str, Any]) -> Numbers:
    lr = float(group["lr"])
    return Numbers(lr, 1 - lr * group["weight_decay"], free_lr=lr)
