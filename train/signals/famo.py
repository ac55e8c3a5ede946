"""FAMO (arXiv 2306.03792), as MFTCoder (arXiv 2311.02303) uses it: tasks improve at the same relative rate.

    z = softmax(xi);  the gradient of task k counts z_k / L_k, over the sum of these
    xi <- Adam step down  J_softmax(xi)^T (ln loss before - ln loss after)

with losses that are held out. A task that got better by a larger factor than the others loses weight. Of the
logarithm of the losses, which the paper minimises, only the factor 1 / L_k is left.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Count, Search
from thriftlab.train.signals.base import Signal, State, domain_means

BETAS, EPS = (0.9, 0.999), 1e-8


class FAMO(Signal, name="famo"):
    """FAMO (2306.03792): weights of the sources under which all improve by the same factor, on held-out losses.

    Args:
        every: steps between two measurements of the held-out losses; each costs a forward pass over `tokens`
        tokens: held-out tokens of each source that are measured
        step_size: learning rate of the weights
        decay: pull of the weights to equal ones
    """

    unit = "domain"

    def __init__(
        self,
        every: Count = 10,
        tokens: Count = 4096,
        step_size: Annotated[float, Field(gt=0), Search(2.5e-3, 0.25)] = 0.025,
        decay: Annotated[float, Field(ge=0)] = 1e-2,
    ):
        self.validate_every, self.validate_tokens, self.step_size, self.decay = every, tokens, step_size, decay

    def state(self, domains: Sequence[str]) -> State:
        state = {name: torch.zeros(len(domains), dtype=torch.float64) for name in ("xi", "mean", "square", "last")}
        state["last"] += torch.nan
        return {**state, "updates": torch.zeros((), dtype=torch.float64)}

    def validated(self, losses: Tensor, state: State, **_: Any) -> None:
        before, state["last"] = state["last"], losses.clone()
        if before.isnan().all():
            return
        gained = (before / losses).log()
        z = state["xi"].softmax(0)
        slope = z * (gained - (z * gained).sum()) + self.decay * state["xi"]
        state["updates"] = state["updates"] + 1
        state["mean"] = state["mean"].lerp(slope, 1 - BETAS[0])
        state["square"] = state["square"].lerp(slope.square(), 1 - BETAS[1])
        mean = state["mean"] / (1 - BETAS[0] ** state["updates"])
        square = state["square"] / (1 - BETAS[1] ** state["updates"])
        state["xi"] = state["xi"] - self.step_size * mean / (square.sqrt() + EPS)

    def statistics(self, losses: Tensor, mask: Tensor, domain_id: Tensor, state: State, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        known = torch.where(state["last"].isfinite(), state["last"], 1)  # of a source that this batch does not have
        return {"losses": domain_means(losses, mask, domain_id, otherwise=known)}

    def weights(  # type: ignore[override]
        self, domain_id: Tensor, domain_tokens: Tensor, statistics: dict[str, Tensor], state: State, **_: Any
    ) -> Tensor:
        return (state["xi"].softmax(0) / statistics["losses"] / domain_tokens)[domain_id]

    def report(self, state: State) -> dict[str, Tensor]:
        return {"alpha": state["xi"].softmax(0)}
