"""CoBa, the convergence balancer (arXiv 2410.06741): tasks arrive together, and one that diverges is held back.

Every few steps the held-out loss of each task is measured and divided by its first value. s_k is the slope of task k
over a window of these, s_max that of the largest of the tasks' losses.

    RCS = softmax_k( K s_k / sum_k |s_k| )                  a task that improves slower than others counts more
    ACS = softmax_k( -n s_k / sum_t |s_k(t)| )              one that does worse than it used to counts less
    DF  = min(1, t softmax_t( -tau t s_max / sum |s_max| )) near 1 while even the worst improves as it did
    w   = softmax( K (DF RCS + (1 - DF) ACS) ), at least 1 / (10 K)

Of the released code this keeps the outer softmax and the floor. Where it does otherwise: DF is bounded, for beyond 1
ACS would count negatively; the window of slopes is a window of slopes (there its start is counted in steps, and with a
warm-up as long as the window it is empty); a task without a loss on one rank is no zero in a mean over ranks, because
held-out losses are sums over all ranks, divided once.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Count
from thriftlab.train.signals.base import Signal, State


class CoBa(Signal, name="coba"):
    """CoBa (2410.06741): weights of the sources that let them converge together, from their held-out losses.

    Args:
        every: steps between two measurements of the held-out losses; each costs a forward pass over `tokens`
        tokens: held-out tokens of each source that are measured
        window: steps over which a slope is fitted
        warmup: steps before the first slope; all sources count alike
        tau: how sharply a worst source that improves less shifts the balance to ACS
    """

    unit = "domain"

    def __init__(
        self,
        every: Count = 10,
        tokens: Count = 4096,
        window: Count = 200,
        warmup: Count = 100,
        tau: Annotated[float, Field(gt=0)] = 5.0,
    ):
        if window < 2 * every:
            raise ValueError(f"window {window} holds no two measurements; raise it or lower every {every}")
        self.validate_every, self.validate_tokens, self.tau = every, tokens, tau
        self.window, self.first_slope = window // every, max(2, warmup // every)

    def state(self, domains: Sequence[str]) -> State:
        k = len(domains)
        empty = torch.zeros(0, k, dtype=torch.float64)
        return {
            "losses": empty,  # over their first value, the last `window` of them
            "slopes": empty.clone(),
            "worst": empty[:, 0].clone(),
            "first": torch.full((k,), torch.nan, dtype=torch.float64),
            "alpha": torch.full((k,), 1 / k, dtype=torch.float64),
        }

    def validated(self, losses: Tensor, state: State, step: int, **_: Any) -> None:  # type: ignore[override]
        state["first"] = torch.where(state["first"].isnan(), losses, state["first"])
        state["losses"] = torch.cat([state["losses"], (losses / state["first"])[None]])[-self.window :]
        if step < self.first_slope * self.validate_every:
            return
        slopes, worst = slope(state["losses"]), slope(state["losses"].amax(1))
        state["slopes"] = torch.cat([state["slopes"], slopes[None]])[-self.window :]
        state["worst"] = torch.cat([state["worst"], worst[None]])
        state["alpha"] = balance(state["slopes"], state["worst"], self.tau)

    def weights(self, domain_id: Tensor, domain_tokens: Tensor, state: State, **_: Any) -> Tensor:  # type: ignore[override]
        return (state["alpha"] / domain_tokens)[domain_id]

    def report(self, state: State) -> dict[str, Tensor]:
        return {"alpha": state["alpha"]}


def slope(values: Tensor) -> Tensor:
    """Of the least-squares line through values [n, ...] at 0, 1, ..., n - 1."""
    t = torch.arange(len(values), dtype=values.dtype, device=values.device)
    t = t - t.mean()
    return torch.tensordot(t, values, 1) / t.square().sum()


def balance(slopes: Tensor, worst: Tensor, tau: float) -> Tensor:
    """Weights [tasks] of sum 1 from slopes [n, tasks] and those of the largest loss [t], newest last."""
    (n, k), t, now = slopes.shape, len(worst), slopes[-1]
    relative = (k * share(now, now)).softmax(0)
    absolute = (-n * share(now, slopes)).softmax(0)
    divergence = (t * (-tau * t * share(worst, worst)).softmax(0)[-1]).clamp(max=1.0)
    weights = (k * (divergence * relative + (1 - divergence) * absolute)).softmax(0)
    floor = 1 / (10 * k)
    return torch.where((weights < floor).any(), (1 - k * floor) * weights + floor, weights)


def share(slopes: Tensor, of: Tensor) -> Tensor:
    return slopes / of.abs().sum(0).clamp(min=torch.finfo(of.dtype).tiny)
