"""The state-full rule: what a method keeps of past gradients, and the direction it makes of them.

Adam (1412.6980) with AdamW's decoupled decay (1711.05101) and torch's placement of eps, Lion (2302.06675), SGD with
momentum. The surprise: torch's fused kernel walks raw memory and checks nothing, so it is used only where weight,
gradient and moments lie alike in memory; elsewhere torch's plain loop takes the step.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from thriftlab.optim.base import Spec, State


def adamw(
    weights: list[Tensor], grads: list[Tensor], states: list[State], *, lr, betas, eps, weight_decay, **_: Any
) -> None:
    """One AdamW step of whole tensors, as `torch.optim.AdamW` does it; creates the state of new ones.

    M <- b1 M + (1-b1) G;  V <- b2 V + (1-b2) G^2;  W <- (1 - lr wd) W - lr M^ / (sqrt(V^) + eps),  ^ is bias-corrected
    """
    for weight, state in zip(weights, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state.update({name: torch.zeros_like(weight) for name in Adam.buffers})
        state["step"] = state["step"].to(weight.device)
    _adamw(weights, grads, states, [state["step"] for state in states], lr, betas, eps, weight_decay)


def adamw_spec(shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
    """The state of `adamw`."""
    return {"step": ((), torch.float32), **{name: (shape, dtype) for name in Adam.buffers}}


class Rule:
    """A direction N from a gradient and its moments; `age` = 1, 2, ... counts the steps since the moments were zero."""

    buffers: tuple[str, ...]

    def direction(self, grad: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
        """Moves the moments in `state` and returns N, a new tensor like `grad`."""
        raise NotImplementedError

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        """weight <- weight - lr N, in place."""
        add_scaled(weight, self.direction(grad, state, age, group), -lr)


class Adam(Rule):
    buffers = ("exp_avg", "exp_avg_sq")

    def direction(self, grad: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
        (b1, b2), m, v = group["betas"], state["exp_avg"], state["exp_avg_sq"]
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = (v / (1 - b2**age)).sqrt_().add_(group["eps"])
        return torch.div(m, denominator.mul_(1 - b1**age), out=denominator)

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        steps_before = torch.full((), age - 1.0, dtype=torch.float32, device=weight.device)
        _adamw([weight], [grad], [state], [steps_before], lr, group["betas"], group["eps"], weight_decay=0.0)


class Lion(Rule):
    buffers = ("exp_avg",)

    def direction(self, grad: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
        (b1, b2), m = group["betas"], state["exp_avg"]
        direction = m.lerp(grad, 1 - b1).sign_()
        m.lerp_(grad, 1 - b2)
        return direction


class MomentumSGD(Rule):
    buffers = ("momentum_buffer",)

    def direction(self, grad: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
        return state["momentum_buffer"].mul_(group["betas"][0]).add_(grad).clone()


RULES: dict[str, Rule] = {"adam": Adam(), "lion": Lion(), "sgdm": MomentumSGD()}


def add_scaled(weight: Tensor, direction: Tensor, scale: float | Tensor) -> None:
    """weight += scale * direction, in place; `scale` may be a 0-dim tensor, which is not read on the host."""
    if isinstance(scale, Tensor):
        weight.addcmul_(direction, scale.to(weight))
    else:
        weight.add_(direction, alpha=scale)


def _adamw(weights, grads, states, steps, lr, betas, eps, weight_decay) -> None:
    """torch's AdamW: its fused kernel for the tensors whose memory it can walk, its loop for the others."""
    moments = ([state[name] for state in states] for name in Adam.buffers)
    rows = list(zip(weights, grads, *moments, steps, strict=True))
    for fused in (True, False):
        chosen = [row for row in rows if _one_layout(*row[:4]) == fused]
        if chosen:
            w, g, m, v, s = map(list, zip(*chosen, strict=True))
            torch_adamw(
                w, g, m, v, [], s, fused=fused, foreach=False, amsgrad=False, maximize=False,
                lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay,
            )  # fmt: skip


def _one_layout(weight: Tensor, *others: Tensor) -> bool:
    """Whether all lie alike in memory, and so without gaps: moments come from `zeros_like`, which leaves none."""
    return all(other.stride() == weight.stride() for other in others)
