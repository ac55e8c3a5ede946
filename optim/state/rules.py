"""The state-full rule: what a method keeps of past gradients, and the direction it makes of them.

Adam (1412.6980) with AdamW's decoupled decay (1711.05101) and torch's placement of eps, Lion (2302.06675), SGD with
momentum. How the moments are kept (`state_dtype`) is storage.py's business: a rule sees them in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.storage import kept_spec, load, make_zero, rounding_spec, store
from thriftlab.optim.state.torch_adamw import (
    MOMENTS,
    PIECE,
    call_torch,
    hyper_of,
    one_layout,
    step_adamw,
    steps_before,
)


def adamw(
    weights: list[Tensor], grads: list[Tensor], states: list[State], *, lr, betas, eps, weight_decay, **group: Any
) -> None:
    """One AdamW step of whole tensors, as `torch.optim.AdamW` does it; creates the state of new ones.

    M <- b1 M + (1-b1) G;  V <- b2 V + (1-b2) G^2;  W <- (1 - lr wd) W - lr M^ / (sqrt(V^) + eps),  ^ is bias-corrected
    """
    for weight, state in zip(weights, states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            make_zero(MOMENTS, weight, state, group)
        state["step"] = state["step"].to(weight.device)
    hyper = hyper_of(lr, betas, eps, weight_decay)
    step_adamw(weights, grads, states, [state["step"] for state in states], hyper)


def adamw_spec(shape: tuple[int, ...], dtype: torch.dtype, **group: Any) -> Spec:
    """The state of `adamw`."""
    return {"step": ((), torch.float32), **kept_spec(MOMENTS, shape, dtype, group), **rounding_spec(group)}


class Rule:
    """A direction N from a gradient and its moments; `age` = 1, 2, ... counts the steps since the moments were zero."""

    buffers: tuple[str, ...]

    def direction(self, grad: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
        """Moves the moments in `state` and returns N, a new tensor like `grad`."""
        moments = [load(state, name) for name in self.buffers]
        if moments[0].shape != grad.shape:
            raise ValueError(
                f"the subspace makes {tuple(grad.shape)} of a gradient, and its moments are {tuple(moments[0].shape)}: "
                "`down` must give one shape from refresh to refresh"
            )
        direction = self.advance(grad.to(moments[0].dtype), moments, age, group)
        for name, moment in zip(self.buffers, moments, strict=True):
            store(state, name, moment)
        return direction.to(grad.dtype)

    def advance(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        """Moves the moments in place, all in the gradient's dtype, and returns N, a new tensor."""
        raise NotImplementedError

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        """weight <- weight - lr N, in place."""
        add_scaled(weight, self.direction(grad, state, age, group), -lr)


class Adam(Rule):
    buffers = MOMENTS

    def advance(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        direction = torch.zeros_like(grad)  # from here a step of length -1 leads to N: one pass for six
        hyper = hyper_of(-1.0, group["betas"], group["eps"], weight_decay=0.0)
        alike = one_layout(direction, grad, *moments)
        call_torch(([direction], [grad], *([m] for m in moments), [steps_before(age, grad)]), alike, hyper)
        return direction

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        hyper = hyper_of(lr, group["betas"], group["eps"], weight_decay=0.0)
        step_adamw([weight], [grad], [state], [steps_before(age, weight)], hyper)


class Lion(Rule):
    buffers = ("exp_avg",)

    def advance(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        (b1, b2), (m,) = group["betas"], moments
        direction = m.lerp(grad, 1 - b1).sign_()
        m.lerp_(grad, 1 - b2)
        return direction


class MomentumSGD(Rule):
    buffers = ("momentum_buffer",)

    def advance(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        return moments[0].mul_(group["betas"][0]).add_(grad).clone()


RULES: dict[str, Rule] = {"adam": Adam(), "lion": Lion(), "sgdm": MomentumSGD()}


def decay(weight: Tensor, group: dict[str, Any]) -> None:
    """weight <- (1 - lr wd) weight, in place."""
    if group["weight_decay"]:
        weight.mul_(1 - group["lr"] * group["weight_decay"])


def add_scaled(weight: Tensor, direction: Tensor, scale: float | Tensor) -> None:
    """weight += scale * direction, in place; `scale` may be a 0-dim tensor, which is not read on the host."""
    if isinstance(scale, Tensor):
        weight.addcmul_(direction, scale.to(weight))
    else:
        weight.add_(direction, alpha=scale)


def add_sign(weight: Tensor, grad: Tensor, scale: float | Tensor) -> None:
    """weight += scale * sign(grad), in place, and without all signs at once."""
    for w, g in row_chunks(weight, grad):
        add_scaled(w, g.sign(), scale)


def row_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, some rows of each at a time, with at most PIECE entries or one row."""
    whole = tensors[0]
    if whole.numel() <= PIECE:
        yield tensors
    else:
        yield from zip(*(t.split(max(len(whole) * PIECE // whole.numel(), 1)) for t in tensors), strict=True)
