"""AdamW (1711.05101), the ruler that the other methods are held against; equal to `torch.optim.AdamW(fused=True)`.

    M <- b1 M + (1 - b1) G        V <- b2 V + (1 - b2) G^2
    W <- (1 - lr wd) W - lr M^ / (sqrt(V^) + eps)              M^ = M / (1 - b1^t),  V^ = V / (1 - b2^t)

One surprise: its groups may say `split`, as those of every method; it has nothing to split and treats all alike.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.kinds import ALL, Kind, numbers_of_adamw
from thriftlab.optim.core.method import Method
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.rules import adamw, adamw_spec
from thriftlab.optim.state.storage import StateDtype, by_entry, key_rounding


class AdamW(Method, name="adamw"):
    """AdamW.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominator, after bias correction.
        weight_decay: decoupled decay per step, times lr.
        state_dtype: how the moments are kept, whatever the dtype of the parameters.
    """

    takes_applied = True

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-2)] = 1e-3,
        betas: Annotated[Betas, Search(choices=[(0.9, 0.999), (0.9, 0.95)])] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        seed: int = 0,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        key_rounding(names, states, group)
        adamw(weights, grads, states, **group)

    def kernel_step(self, shape: tuple[int, ...], state: State, group: dict[str, Any]) -> Kind | None:
        return Kind(ALL, numbers_of_adamw, plain=True)

    def elementwise(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return by_entry(group)

    def in_pieces(self, shape: tuple[int, ...], group: dict[str, Any]) -> bool:
        return True

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        return adamw_spec(shape, dtype, **{**self.defaults, **overrides})
