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

from thriftlab.optim.core.guard import REMEDY
from thriftlab.optim.core.hyper import BelowOne, Betas, Count, Search, arguments
from thriftlab.optim.core.method import Method
from thriftlab.optim.core.spikes import STATISTICS, clean
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches
from thriftlab.optim.state.storage import StateDtype, kept_spec, key_rounding, make_zero, rounding_spec, wide
from thriftlab.optim.state.torch_adamw import MOMENTS, hyper_of, step_adamw


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
        ages: dict[tuple[int, int], list[int]] = {}  # (steps before, those before the last reset) -> places
        for i, (weight, state) in enumerate(zip(weights, states, strict=True)):
            if MOMENTS[0] not in state:
                make_zero(MOMENTS, weight, state, group)
                state.update({key: weight.new_zeros((), dtype=wide(weight.dtype)) for key in STATISTICS})
                state.update({key: torch.tensor(0, device="cpu") for key in ("step", "start")})
            state.update({key: state[key].to(weight.device) for key in STATISTICS})
            ages.setdefault((int(state["step"]), int(state["start"])), []).append(i)
        for (step, start), places in ages.items():
            for some in batches([weights[i] for i in places]):
                w, g, s = zip(*((weights[i], grads[i], states[i]) for i in places[some]), strict=True)
                descend(list(w), list(g), list(s), group, step + 1, start)

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        if MOMENTS[0] in state and STATISTICS[0] not in state:
            raise ValueError(f"{name}: the state has no means of norms, it is that of another method; {REMEDY}")

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        numbers: Spec = {"step": ((), torch.int64), "start": ((), torch.int64), **rounding_spec(group)}
        return {**numbers, **dict.fromkeys(STATISTICS, ((), wide(dtype))), **kept_spec(MOMENTS, shape, dtype, group)}


def descend(
    weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any], step: int, start: int
) -> None:
    """Step number `step`, from 1, of tensors whose moments were zero after step `start`."""
    exact, resets, share = group["reset"] == "exact", step % group["gap"] == 0, 1.0
    if group["total"] is not None:
        angle = math.pi * min(step / (group["total"] + 1), 1)
        share = group["eta_min"] + (1 - group["eta_min"]) / 2 * (1 + math.cos(angle))
    (g1, *others), (b1, b2) = group["gammas"], group["betas"]
    cleaned = clean(grads, states, (g1 * share, *others), step if exact else step - start, group["eps"])
    start = step - 1 if resets else start
    if resets and exact:
        forget(weights, states, group)
    for state in states:
        state["step"].fill_(step)
        state["start"].fill_(start)
    before = torch.full((len(weights),), step - start - 1.0, device=weights[0].device)  # [tensors]
    hyper = hyper_of(group["lr"], (b1 * share, b2), group["eps"], group["weight_decay"])
    step_adamw(weights, cleaned, states, list(before.unbind()), hyper)
    if resets and not exact:
        forget(weights, states, group)


def forget(weights: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    for weight, state in zip(weights, states, strict=True):
        make_zero(MOMENTS, weight, state, group)
