"""Stable-SPAM (2502.17055): AdamW on gradients without spikes and with even norms (core/spikes.py).

    G <- clean(G)     what is above the mean largest entry is clipped; |G| becomes its mean over its root mean square
    AdamW with G; at every `gap`-th step of a tensor its moments start from zero

That is the paper, reset="exact". The published code, and the results made with it, are reset="reference": the step of a
reset is made with the old moments and the bias correction of a first step, and then they are zero; and the means of the
cleaning, which go on, are corrected as if they were new, so that after the first reset almost nothing is clipped.
With `total`, g1 and b1 fall to `eta_min` of themselves along a cosine.

One surprise: all tensors are treated alike, embeddings and vectors too, and none is stepped in pieces.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.due import ask, due_refreshes, kept_of
from thriftlab.optim.core.guard import REMEDY
from thriftlab.optim.core.hyper import BelowOne, Betas, Count, Search, arguments
from thriftlab.optim.core.method import Method
from thriftlab.optim.core.spikes import STATISTICS, clean, numbers
from thriftlab.optim.state.counters import Age, begin_counting, count_on, counts_on_host
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches, by_dtype, kept_unless
from thriftlab.optim.state.rules import add_scaled, decay
from thriftlab.optim.state.storage import (
    StateDtype,
    kept_spec,
    key_rounding,
    load,
    make_zero,
    rounding_spec,
    store,
    wide,
)
from thriftlab.optim.state.torch_adamw import MOMENTS, hyper_of, step_adamw, steps_before

COUNTERS = ("step", "start")


class StableSPAM(Method, name="stable_spam"):
    """Stable-SPAM: AdamW after clipping of spikes, with norms of gradients evened out and moments reset now and then.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominators, after bias correction.
        weight_decay: decoupled decay per step, times lr.
        gammas: decay of the mean norm, of the mean squared norm, and of the mean of the largest entries.
        gap: steps between resets of the moments.
        reset: as in the paper (exact) or as in the published code (reference).
        total: steps over which the first gamma and the first beta fall; none, and they stay.
        eta_min: what they fall to, as a part of themselves.
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
        gammas: Annotated[tuple[BelowOne, BelowOne, BelowOne], Field()] = (0.7, 0.9, 0.999),
        gap: Annotated[Count, Field()] = 1000,
        reset: Annotated[Literal["exact", "reference"], Field()] = "exact",
        total: Annotated[Count | None, Field()] = None,
        eta_min: Annotated[float, Field(ge=0, le=1)] = 0.5,
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
        for weight, state in zip(weights, states, strict=True):
            if MOMENTS[0] not in state:
                make_zero(MOMENTS, weight, state, group)
                state.update({key: weight.new_zeros((), dtype=wide(weight.dtype)) for key in STATISTICS})
            begin_counting(COUNTERS, weight, state, group)
            state.update({key: state[key].to(weight.device) for key in STATISTICS})
        known = group if group.get("applied") is None else ask(names, weights, states, group, due_reset)
        if known is None:
            return
        due = due_refreshes(names, weights, states, known, due_reset)
        for places in by_dtype(weights, range(len(weights))):
            for resets in (False, True):
                alike = [i for i in places if (due[i] is not None) == resets]
                w, g = ([values[i] for i in alike] for values in (weights, grads))
                for some in batches(w):
                    descend(w[some], g[some], [states[i] for i in alike[some]], known, resets)

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        if MOMENTS[0] in state and STATISTICS[0] not in state:
            raise ValueError(f"{name}: the state has no means of norms, it is that of another method; {REMEDY}")

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        numbers: Spec = {"step": ((), torch.int64), "start": ((), torch.int64), **rounding_spec(group)}
        return {**numbers, **dict.fromkeys(STATISTICS, ((), wide(dtype))), **kept_spec(MOMENTS, shape, dtype, group)}


def due_reset(name: str, step: int, group: dict[str, Any]) -> int | None:
    """The number of the reset that comes with the step after this many, or None."""
    count, since = divmod(step + 1, group["gap"])
    return count if since == 0 else None


def descend(
    weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], resets: bool
) -> None:
    """A step of tensors of one dtype; `resets`: with it their moments start from zero."""
    exact, applied = group["reset"] == "exact", group.get("applied")
    step, start = count_step(weights, states, applied, resets)
    share = share_of(step, group)
    (g1, *others), (b1, b2) = group["gammas"], group["betas"]
    with kept_unless(applied, [state[key] for state in states for key in STATISTICS]):
        cleaned = clean(grads, states, (g1 * share, *others), step if exact else step - start, group["eps"])
    if resets and exact:
        forget(weights, states, group)
    age = step - (step - 1 if resets else start)
    if isinstance(share, Tensor) and isinstance(age, Tensor):
        step_by_hand(weights, cleaned, states, age, b1 * share, group)
    else:
        hyper = hyper_of(group["lr"], (b1 * share, b2), group["eps"], group["weight_decay"])
        step_adamw(weights, cleaned, states, steps_before(age, weights), hyper, applied)
    if resets and not exact:
        forget(weights, states, group)


def count_step(weights: list[Tensor], states: list[State], applied: Tensor | None, resets: bool) -> tuple[Age, Age]:
    """The number of this step, from 1, and after which the moments were last zero before it; `start` moves on."""
    steps, starts = ([state[key] for state in states] for key in COUNTERS)
    if counts_on_host(weights[0], {"applied": applied}):
        steps[0] += 1
        counts: tuple[Age, Age] = int(steps[0]), int(starts[0])
    else:
        count_on(steps, applied)
        counts = torch.stack(steps).double(), torch.stack(starts).double()  # [tensors]
    if resets:
        torch._foreach_copy_(starts, steps)
        torch._foreach_sub_(starts, 1)
    return counts


def share_of(step: Age, group: dict[str, Any]) -> float | Tensor:
    """What g1 and b1 are multiplied by."""
    if group["total"] is None:
        return 1.0
    part = step / (group["total"] + 1)
    wave = part.clamp(max=1).mul(math.pi).cos() if isinstance(part, Tensor) else math.cos(math.pi * min(part, 1))
    return group["eta_min"] + (1 - group["eta_min"]) / 2 * (1 + wave)


def step_by_hand(
    weights: list[Tensor], grads: list[Tensor], states: list[State], age: Tensor, b1: Tensor, group: dict[str, Any]
) -> None:
    """AdamW with a b1 for each tensor, which torch's kernels do not take."""
    b2, lr, plain = group["betas"][1], group["lr"], {**group, "applied": None}
    with kept_unless(group.get("applied"), [*weights, *kept_of(states)]):
        firsts, seconds = ([load(state, key) for state in states] for key in MOMENTS)
        for first, grad, new in zip(firsts, grads, numbers(1 - b1, grads), strict=True):
            first.lerp_(grad, new)
        torch._foreach_mul_(seconds, b2)
        torch._foreach_addcmul_(seconds, grads, grads, 1 - b2)
        roots = torch._foreach_sqrt(seconds)
        for root, size in zip(roots, numbers((1 - b2**age).sqrt(), grads), strict=True):
            root.div_(size)
        torch._foreach_add_(roots, group["eps"])
        moved = [weight.to(grad.dtype) for weight, grad in zip(weights, grads, strict=True)]
        decay(moved, plain)
        add_scaled(moved, list(torch._foreach_div(firsts, roots)), -lr / (1 - b1**age))
        for weight, new in zip(weights, moved, strict=True):
            if new is not weight:
                weight.copy_(new)
        for key, moments in zip(MOMENTS, (firsts, seconds), strict=True):
            for state, moment in zip(states, moments, strict=True):
                store(state, key, moment)


def forget(weights: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    for weight, state in zip(weights, states, strict=True):
        make_zero(MOMENTS, weight, state, group)
