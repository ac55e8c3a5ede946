"""What GaLore, Fira and APOLLO have in common: Adam on a gradient of low rank, with two conventions of its own.

Their Adam (that of Hugging Face) adds eps before bias correction, and weight decay comes after the step, for plain
tensors as for matrices:

    N = sqrt(1 - b2^k) / (1 - b1^k)  M / (sqrt(V) + eps)        W <- W - lr N        W <- (1 - lr wd) W

The surprise: that is torch's Adam with eps / sqrt(1 - b2^k) in place of eps, so torch's fused kernel takes the step.
"""

from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core.split import SplitOptimizer, splits
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.rules import Adam, decay
from thriftlab.optim.state.storage import make_zero, wide

ADAM = Adam()
TINY = 1e-8  # keeps quotients of norms finite, as in the published code


class Projected(SplitOptimizer):
    """A split method with these conventions."""

    decay_after = True

    def limiter_spec(self, shape: tuple[int, ...], dtype: torch.dtype, overrides: dict[str, Any]) -> Spec:
        """The state of `growth_limit`, which split matrices have."""
        split = splits(shape, {**self.defaults, **overrides})
        return dict.fromkeys(("limiter", "diagnostic.limiter"), ((), wide(dtype))) if split else {}

    def update_plain(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if "step" not in state:
                state["step"] = torch.tensor(0.0, device="cpu")
                make_zero(ADAM.buffers, weight, state, group)
            state["step"] += 1
            age = int(state["step"])
            ADAM.descend(weight, grad, state, age, with_early_eps(group, age), group["lr"])
            decay(weight, group)


def direction(small: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
    """Adam's N of the gradient's coordinates, bias-corrected."""
    return ADAM.direction(small, state, age, with_early_eps(group, age))


def with_early_eps(group: dict[str, Any], age: int) -> dict[str, Any]:
    """The group with the eps that does after bias correction what its eps does before it."""
    return {**group, "eps": group["eps"] / (1 - group["betas"][1] ** age) ** 0.5}


def correction(age: int, group: dict[str, Any]) -> float:
    """sqrt(1 - b2^k) / (1 - b1^k)"""
    b1, b2 = group["betas"]
    return (1 - b2**age) ** 0.5 / (1 - b1**age)


def norms(matrix: Tensor, dim: int | None) -> Tensor:
    """Norms along `dim`, or the one of all, in fp32 at least  # [m, 1], [1, n] or []"""
    if dim == 0:  # where torch's vector_norm is eight times as slow, a column at a time
        return matrix.to(wide(matrix.dtype)).square().sum(0, keepdim=True).sqrt_()
    return torch.linalg.vector_norm(matrix, dim=dim, keepdim=dim is not None, dtype=wide(matrix.dtype))


def scaled_norms(phi: Tensor, norm: Tensor) -> Tensor:
    """phi * norm, and 0 where phi is: a norm beyond the largest number is of a channel whose direction is 0."""
    return torch.where(phi == 0, phi, phi * norm)


def growth_limit(norm: Tensor, state: State, gamma: float) -> Tensor:
    """L >= 1, such that norm / L is at most gamma times its value at the step before (Fira, 2410.01623).

    A norm of zero leaves no trace: the next one is held against the last that was not zero. Nor does one beyond the
    largest number, by which the step is divided away.
    """
    last = state["limiter"].to(norm.device) if "limiter" in state else torch.full_like(norm, torch.inf)
    ratio = torch.where(norm == last, 1.0, norm / (last + TINY))  # both infinite: nothing to hold it against
    state["diagnostic.limiter"] = factor = ratio.clamp_(min=gamma) / gamma
    state["limiter"] = torch.where((norm > 0) & norm.isfinite(), norm / factor, last)
    return factor
