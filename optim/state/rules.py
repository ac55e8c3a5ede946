"""The state-full rule: what a method keeps of past gradients, and the direction it makes of them.

Adam (1412.6980) with AdamW's decoupled decay (1711.05101) and torch's placement of eps, Lion (2302.06675), SGD with
momentum. How the moments are kept (`state_dtype`) is storage.py's business: a rule sees them in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.state.counters import Age
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import TOGETHER, batches, each, refused
from thriftlab.optim.state.storage import kept_spec, load, make_zero, rounding_spec, store
from thriftlab.optim.state.torch_adamw import (
    MOMENTS,
    PIECE,
    call_torch,
    hyper_of,
    one_layout,
    reads_steps,
    step_adamw,
    steps_before,
    subtract,
)

ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}  # where a method has none of its own


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
    step_adamw(weights, grads, states, [state["step"] for state in states], hyper, group.get("applied"))


def adamw_spec(shape: tuple[int, ...], dtype: torch.dtype, **group: Any) -> Spec:
    """The state of `adamw`."""
    return {"step": ((), torch.float32), **kept_spec(MOMENTS, shape, dtype, group), **rounding_spec(group)}


class Rule:
    """A direction N from a gradient and its moments; `age` = 1, 2, ... counts the steps since the moments were zero.

    All in lists, a tensor for each matrix.
    """

    buffers: tuple[str, ...]

    def directions(self, grads: list[Tensor], states: list[State], age: Age, group: dict[str, Any]) -> list[Tensor]:
        """Moves the moments in `states` and returns N, new tensors like `grads`."""
        moments = [[load(state, name) for state in states] for name in self.buffers]
        for grad, moment in zip(grads, moments[0], strict=True):
            if moment.shape != grad.shape:
                raise ValueError(
                    f"the subspace makes {tuple(grad.shape)} of a gradient, and its moments are {tuple(moment.shape)}: "
                    "`down` must give one shape from refresh to refresh"
                )
        wide = [grad.to(moment.dtype) for grad, moment in zip(grads, moments[0], strict=True)]
        directions = self.advance(wide, moments, age, group)
        for name, kept in zip(self.buffers, moments, strict=True):
            for state, moment in zip(states, kept, strict=True):
                store(state, name, moment)
        return [direction.to(grad.dtype) for direction, grad in zip(directions, grads, strict=True)]

    def advance(
        self, grads: list[Tensor], moments: list[list[Tensor]], age: Age, group: dict[str, Any]
    ) -> list[Tensor]:
        """Moves the moments in place, all in the gradient's dtype, and returns N, new tensors."""
        raise NotImplementedError

    def descend(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], age: Age, group: dict[str, Any], lr
    ) -> None:
        """weight <- weight - lr N, in place."""
        add_scaled(weights, self.directions(grads, states, age, group), -lr)


class Adam(Rule):
    buffers = MOMENTS

    def advance(
        self, grads: list[Tensor], moments: list[list[Tensor]], age: Age, group: dict[str, Any]
    ) -> list[Tensor]:
        """From zero a step of length -1 leads to N: one pass for six."""
        if isinstance(age, Tensor):  # whose steps the fused kernel alone does not read
            grads = [laid_out_like(moment, grad) for moment, grad in zip(moments[0], grads, strict=True)]
        directions = [torch.empty_like(grad) for grad in grads]
        torch._foreach_zero_(directions)
        rows = list(zip(directions, grads, *moments, steps_before(age, grads), strict=True))
        hyper = hyper_of(-1.0, group["betas"], group["eps"], weight_decay=0.0)
        for fused in (True, False):
            if alike := [row for row in rows if one_layout(*row[:4]) == fused]:
                call_torch(map(list, zip(*alike, strict=True)), fused, hyper)
        return directions

    def descend(
        self, weights: list[Tensor], grads: list[Tensor], states: list[State], age: Age, group: dict[str, Any], lr
    ) -> None:
        hyper = hyper_of(lr, group["betas"], group["eps"], weight_decay=0.0)
        step_adamw(weights, grads, states, steps_before(age, weights), hyper, group.get("applied"))


class Lion(Rule):
    buffers = ("exp_avg",)

    def advance(
        self, grads: list[Tensor], moments: list[list[Tensor]], age: Age, group: dict[str, Any]
    ) -> list[Tensor]:
        (b1, b2), (m,) = group["betas"], moments
        directions = torch._foreach_lerp(m, grads, 1 - b1)
        torch._foreach_sign_(directions)
        torch._foreach_lerp_(m, grads, 1 - b2)
        return list(directions)


class MomentumSGD(Rule):
    buffers = ("momentum_buffer",)

    def advance(
        self, grads: list[Tensor], moments: list[list[Tensor]], age: Age, group: dict[str, Any]
    ) -> list[Tensor]:
        torch._foreach_mul_(moments[0], group["betas"][0])
        torch._foreach_add_(moments[0], grads)
        return [moment.clone() for moment in moments[0]]


RULES: dict[str, Rule] = {"adam": Adam(), "lion": Lion(), "sgdm": MomentumSGD()}


def laid_out_like(like: Tensor, tensor: Tensor) -> Tensor:
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


def decay(weights: list[Tensor], group: dict[str, Any]) -> None:
    """weight <- (1 - lr wd) weight, in place."""
    if group["weight_decay"] and weights:
        loss = group["lr"] * group["weight_decay"]
        applied = group.get("applied")
        torch._foreach_mul_(weights, 1 - (loss if applied is None else loss * applied))


def add_scaled(weights: list[Tensor], directions: list[Tensor], scale: float | Tensor) -> None:
    """weight += scale * direction, in place; `scale` may be a tensor, of one number or of one for each weight, which is
    not read on the host."""
    if not isinstance(scale, Tensor):
        torch._foreach_add_(weights, directions, alpha=scale)
        return
    for weight, direction, factor in zip(weights, directions, each(scale, len(weights)), strict=True):
        weight.addcmul_(direction, factor.to(weight))


def add_signs(weights: list[Tensor], grads: list[Tensor], scale: float | Tensor, applied: Tensor | None = None) -> None:
    """weight += scale * sign(grad), in place, and without all signs at once; nothing where `applied` is 0."""
    no = None if applied is None else refused(applied)
    for batch in batches(weights, most=2 * TOGETHER):
        w, g = weights[batch], grads[batch]
        if reads_steps(w[0]) and applied is None:
            add_sign(w[0], g[0], scale)
        else:
            signs = list(torch._foreach_sign([grad.to(weight.dtype) for weight, grad in zip(w, g, strict=True)]))
            if applied is not None and no is not None:
                subtract(w, signs, -scale, applied, no)
            elif isinstance(scale, Tensor):
                torch._foreach_mul_(signs, scale)
                torch._foreach_add_(w, signs)
            else:
                torch._foreach_add_(w, signs, alpha=scale)


def add_sign(weight: Tensor, grad: Tensor, scale: float | Tensor) -> None:
    """The same, of one tensor on a CPU."""
    for w, g in row_chunks(weight, grad):
        add_scaled([w], [g.sign()], scale)


def row_chunks(*tensors: Tensor, most: int = PIECE) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, some rows of each at a time, with at most so many entries or one row."""
    whole = tensors[0]
    if whole.numel() <= most:
        yield tensors
    else:
        yield from zip(*(t.split(max(len(whole) * most // whole.numel(), 1)) for t in tensors), strict=True)
