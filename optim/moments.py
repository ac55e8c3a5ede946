"""The state-full rule: what a method keeps of past gradients, and the direction it makes of them.

Adam (1412.6980) with AdamW's decoupled decay (1711.05101) and torch's placement of eps, Lion (2302.06675), SGD with
momentum. How the moments are kept (`state_dtype`) is storage.py's business: a rule sees them in fp32.

The surprise: torch's fused kernel walks raw memory and checks nothing, so it is used only where weight, gradient and
moments are alike in dtype and lie alike in memory. Where dtypes are mixed it steps fp32 copies, a piece at a time, so
that bf16 weights or 8-bit moments never have a whole fp32 tensor beside them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from thriftlab.optim.base import Spec, State
from thriftlab.optim.storage import kept_spec, load, load_piece, make_zero, rounding_spec, store, store_piece, wide

PIECE = 2**17  # entries that are stepped at once where dtypes are mixed; a multiple of storage.BLOCK


def adamw(
    weights: list[Tensor], grads: list[Tensor], states: list[State], *, lr, betas, eps, weight_decay, **group: Any
) -> None:
    """One AdamW step of whole tensors, as `torch.optim.AdamW` does it; creates the state of new ones.

    M <- b1 M + (1-b1) G;  V <- b2 V + (1-b2) G^2;  W <- (1 - lr wd) W - lr M^ / (sqrt(V^) + eps),  ^ is bias-corrected
    """
    for weight, state in zip(weights, states, strict=True):
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            make_zero(Adam.buffers, weight, state, group)
        state["step"] = state["step"].to(weight.device)
    _adamw(weights, grads, states, [state["step"] for state in states], lr, betas, eps, weight_decay)


def adamw_spec(shape: tuple[int, ...], dtype: torch.dtype, **group: Any) -> Spec:
    """The state of `adamw`."""
    return {"step": ((), torch.float32), **kept_spec(Adam.buffers, shape, dtype, group), **rounding_spec(group)}


class Rule:
    """A direction N from a gradient and its moments; `age` = 1, 2, ... counts the steps since the moments were zero."""

    buffers: tuple[str, ...]

    def direction(self, grad: Tensor, state: State, age: int, group: dict[str, Any]) -> Tensor:
        """Moves the moments in `state` and returns N, a new tensor like `grad`."""
        moments = [load(state, name) for name in self.buffers]
        direction = self.move(grad.to(moments[0].dtype), moments, age, group)
        for name, moment in zip(self.buffers, moments, strict=True):
            store(state, name, moment)
        return direction.to(grad.dtype)

    def move(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        """Moves the moments in place, all in the gradient's dtype, and returns N, a new tensor."""
        raise NotImplementedError

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        """weight <- weight - lr N, in place."""
        add_scaled(weight, self.direction(grad, state, age, group), -lr)


class Adam(Rule):
    buffers = ("exp_avg", "exp_avg_sq")

    def move(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        (b1, b2), (m, v) = group["betas"], moments
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = (v / (1 - b2**age)).sqrt_().add_(group["eps"])
        return torch.div(m, denominator.mul_(1 - b1**age), out=denominator)

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        steps_before = torch.full((), age - 1.0, dtype=torch.float32, device=weight.device)
        _adamw([weight], [grad], [state], [steps_before], lr, group["betas"], group["eps"], weight_decay=0.0)


class Lion(Rule):
    buffers = ("exp_avg",)

    def move(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        (b1, b2), (m,) = group["betas"], moments
        direction = m.lerp(grad, 1 - b1).sign_()
        m.lerp_(grad, 1 - b2)
        return direction


class MomentumSGD(Rule):
    buffers = ("momentum_buffer",)

    def move(self, grad: Tensor, moments: list[Tensor], age: int, group: dict[str, Any]) -> Tensor:
        return moments[0].mul_(group["betas"][0]).add_(grad).clone()


RULES: dict[str, Rule] = {"adam": Adam(), "lion": Lion(), "sgdm": MomentumSGD()}


def add_scaled(weight: Tensor, direction: Tensor, scale: float | Tensor) -> None:
    """weight += scale * direction, in place; `scale` may be a 0-dim tensor, which is not read on the host."""
    if isinstance(scale, Tensor):
        weight.addcmul_(direction, scale.to(weight))
    else:
        weight.add_(direction, alpha=scale)


def _adamw(weights, grads, states, steps, lr, betas, eps, weight_decay) -> None:
    """torch's AdamW: fused for tensors that are alike, a loop for other layouts, in pieces for mixed dtypes."""
    hyper = dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)
    moments = ([state[name] for state in states] for name in Adam.buffers)
    rows = list(zip(weights, grads, *moments, steps, strict=True))
    mixed = [len({t.dtype for t in row[:4]}) > 1 or row[2].dtype != wide(row[2].dtype) for row in rows]
    for fused in (True, False):
        alike = [row for row, no in zip(rows, mixed, strict=True) if not no and _one_layout(*row[:4]) == fused]
        if alike:
            w, g, m, v, s = map(list, zip(*alike, strict=True))
            torch_adamw(w, g, m, v, [], s, fused=fused, foreach=False, amsgrad=False, maximize=False, **hyper)
    for i, (weight, grad, _, _, step) in enumerate(rows):
        if mixed[i]:
            _adamw_in_pieces(weight, grad, states[i], step, hyper)


def _adamw_in_pieces(weight: Tensor, grad: Tensor, state: State, step: Tensor, hyper: dict[str, Any]) -> None:
    """One AdamW step of fp32 copies of weight, gradient and moments; `step` counts on."""
    flat_weight, flat_grad = weight.reshape(-1), grad.reshape(-1)  # copies, where there are gaps or a transpose
    for start in range(0, weight.numel(), PIECE):
        stop = min(start + PIECE, weight.numel())
        m, v = moments = [load_piece(state, name, start, stop) for name in Adam.buffers]
        w, g = (flat[start:stop].to(m.dtype, copy=True) for flat in (flat_weight, flat_grad))
        torch_adamw(
            [w], [g], [m], [v], [], [step.clone()], fused=True, foreach=False, amsgrad=False, maximize=False, **hyper
        )
        flat_weight[start:stop].copy_(w)
        for name, moment in zip(Adam.buffers, moments, strict=True):
            store_piece(state, name, moment, start, stop)
    step += 1
    if not weight.is_contiguous():
        weight.copy_(flat_weight.view(weight.shape))


def _one_layout(weight: Tensor, *others: Tensor) -> bool:
    """Whether all lie alike in memory, and so without gaps: moments come from `zeros_like`, which leaves none."""
    return all(other.stride() == weight.stride() for other in others)
