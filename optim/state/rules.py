"""The state-full rule: what a method keeps of past gradients, and the direction it makes of them.

Adam (1412.6980) with AdamW's decoupled decay (1711.05101) and torch's placement of eps, Lion (2302.06675), SGD with
momentum. How the moments are kept (`state_dtype`) is storage.py's business: a rule sees them in fp32.

The surprise: torch's fused kernel walks raw memory and checks nothing, so it is used only where weight, gradient and
moments are alike in dtype and lie alike in memory. Where dtypes are mixed it steps fp32 copies, a piece at a time, so
that bf16 weights or 8-bit moments never have a whole fp32 tensor beside them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim.adamw import adamw as torch_adamw

from thriftlab.optim.core.method import Spec, State
from thriftlab.optim.state.storage import (
    kept_spec,
    load,
    load_piece,
    make_zero,
    rounding_spec,
    store,
    store_piece,
    wide,
)

LINE = 16  # entries; a multiple of the widest vector
PIECE = 2**17  # entries that are stepped at once where that needs temporaries; a multiple of storage.BLOCK


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
    hyper = _hyper(lr, betas, eps, weight_decay)
    _adamw(weights, grads, states, [state["step"] for state in states], hyper)


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
        direction = torch.zeros_like(grad)  # from here a step of length -1 leads to N: one pass for six
        hyper = _hyper(-1.0, group["betas"], group["eps"], weight_decay=0.0)
        alike = _one_layout(direction, grad, *moments)
        _torch_adamw(([direction], [grad], *([m] for m in moments), [_steps_before(age, grad)]), alike, hyper)
        return direction

    def descend(self, weight: Tensor, grad: Tensor, state: State, age: int, group: dict[str, Any], lr) -> None:
        hyper = _hyper(lr, group["betas"], group["eps"], weight_decay=0.0)
        _adamw([weight], [grad], [state], [_steps_before(age, weight)], hyper)


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
    for w, g in pieces(weight, grad):
        add_scaled(w, g.sign(), scale)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, some rows of each at a time, with at most PIECE entries or one row."""
    whole = tensors[0]
    if whole.numel() <= PIECE:
        yield tensors
    else:
        yield from zip(*(t.split(max(len(whole) * PIECE // whole.numel(), 1)) for t in tensors), strict=True)


def _adamw(weights, grads, states, steps, hyper: dict[str, Any]) -> None:
    """torch's AdamW: fused for tensors that are alike, a loop for other layouts, in pieces for mixed dtypes."""
    moments = ([state[name] for state in states] for name in Adam.buffers)
    rows = list(zip(weights, grads, *moments, steps, strict=True))
    for i, state in enumerate(states):
        if (body := vector_body(state, weights[i])) < weights[i].numel():
            _adamw_in_pieces(weights[i], grads[i], state, steps[i].clone(), hyper, body)
            rows[i] = (*(t[:body] for t in rows[i][:4]), steps[i])
    mixed = [len({t.dtype for t in row[:4]}) > 1 or row[2].dtype != wide(row[2].dtype) for row in rows]
    for fused in (True, False):
        alike = [row for row, no in zip(rows, mixed, strict=True) if not no and _one_layout(*row[:4]) == fused]
        if alike:
            _torch_adamw(map(list, zip(*alike, strict=True)), fused, hyper)
    for i, (weight, grad, _, _, step) in enumerate(rows):
        if mixed[i]:
            _adamw_in_pieces(weight, grad, states[i], step, hyper)


def _adamw_in_pieces(
    weight: Tensor, grad: Tensor, state: State, step: Tensor, hyper: dict[str, Any], begin: int = 0
) -> None:
    """One AdamW step of fp32 copies of weight, gradient and moments from entry `begin` on; `step` counts on."""
    flat_weight, flat_grad = weight.reshape(-1), grad.reshape(-1)  # copies, where there are gaps or a transpose
    for start in range(begin, weight.numel(), PIECE):
        stop = min(start + PIECE, weight.numel())
        m, v = moments = [load_piece(state, name, start, stop) for name in Adam.buffers]
        w, g = (flat[start:stop].to(m.dtype, copy=True) for flat in (flat_weight, flat_grad))
        before, behind = frame(state, start, stop)
        framed = [pad(t, (before, behind)) if before or behind else t for t in (w, g, m, v)]
        _torch_adamw((*([t] for t in framed), [step.clone()]), True, hyper)
        if before or behind:
            for t, padded in zip((w, g, m, v), framed, strict=True):
                t.copy_(padded[before : before + stop - start])
        flat_weight[start:stop].copy_(w)
        for name, moment in zip(Adam.buffers, moments, strict=True):
            store_piece(state, name, moment, start, stop)
    step += 1
    if not weight.is_contiguous():
        weight.copy_(flat_weight.view(weight.shape))


def vector_body(state: State, weight: Tensor) -> int:
    """How many entries the fused kernel may step in place: of a fragment on a CPU those before its last cache line.

    There the last entries of a tensor are summed in another order than the others. So the entries that a fragment has
    of the whole tensor's last line must be at the end of what is stepped, and no others.
    """
    if "whole.first" not in state or weight.device.type != "cpu":
        return weight.numel()
    last_line = int(state["whole.size"]) // LINE * LINE
    return max(min(weight.numel(), last_line - int(state["whole.first"])), 0) // LINE * LINE


def frame(state: State, start: int, stop: int) -> tuple[int, int]:
    """Entries that are missing before and behind some of a fragment, up to whole cache lines of the whole tensor."""
    if "whole.first" not in state:
        return 0, 0
    first, size = int(state["whole.first"]), int(state["whole.size"])
    return (first + start) % LINE, min(-(-(first + stop) // LINE) * LINE, size) - first - stop


def _torch_adamw(lists: Iterable[list[Tensor]], fused: bool, hyper: dict[str, Any]) -> None:
    """torch's AdamW on lists of weights, gradients, first and second moments and steps; counts the steps on."""
    weights, grads, firsts, seconds, steps = lists
    options: dict[str, Any] = dict(fused=fused, foreach=False, amsgrad=False, maximize=False)
    torch_adamw(weights, grads, firsts, seconds, [], steps, **options, **hyper)


def _hyper(lr, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    return dict(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay)


def _steps_before(age: int, like: Tensor) -> Tensor:
    return torch.full((), age - 1.0, dtype=torch.float32, device=like.device)


def _one_layout(weight: Tensor, *others: Tensor) -> bool:
    """Whether all lie alike in memory, and so without gaps: moments come from `zeros_like`, which leaves none."""
    return all(other.stride() == weight.stride() for other in others)
