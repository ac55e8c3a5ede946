"""Weights of whole sources: fixed ones, and MFTCoder's task balancing (arXiv 2311.02303).

    L = sum_k alpha_k L_k / sum_k alpha_k, over the domains k that the batch has; L_k the mean loss of domain k

The published code divides on each rank by the weights of the tasks that this rank happens to have, and its older
version takes two tasks of equal weight for one. Here the tokens of each domain are counted over the global batch, by
the domain's number.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.train.signals.base import Signal, State

Weight = Annotated[float, Field(ge=0)]


class Domains(Signal, name="domains"):
    """Fixed weights of the sources, whatever their shares of the batch.

    Args:
        alpha: weights by source, signal.alpha.NAME=2, relative to each other; those that are not named have 1
    """

    unit = "domain"

    def __init__(self, alpha: Annotated[dict[str, Weight] | None, Field()] = None):
        self.alpha = alpha or {}

    def state(self, domains: Sequence[str]) -> State:
        return {"alpha": named_weights(self.alpha, domains)}

    def weights(self, domain_id: Tensor, domain_tokens: Tensor, state: State, **_: Any) -> Tensor:  # type: ignore[override]
        return (state["alpha"] / domain_tokens)[domain_id]

    def report(self, state: State) -> dict[str, Tensor]:
        return {"alpha": state["alpha"]}


class MFTCoder(Signal, name="mftcoder"):
    """MFTCoder's balance of tasks (2311.02303): every task counts alike, however many tokens it has.

    Args:
        balance: what is averaged; task: the mean losses of the tasks, each over its tokens; sample: those of the
            windows; task-sample: those of the tasks, each the mean over its windows
    """

    unit = "domain"

    def __init__(self, balance: Annotated[Literal["task", "sample", "task-sample"], Field()] = "task"):
        self.balance = balance

    def weights(  # type: ignore[override]
        self, mask: Tensor, domain_id: Tensor, domain_tokens: Tensor, domain_samples: Tensor, **_: Any
    ) -> Tensor:
        if self.balance == "task":
            return (1 / domain_tokens)[domain_id]
        of_sample = 1 / mask.sum(1).clamp(min=1).double()
        return of_sample if self.balance == "sample" else of_sample * (1 / domain_samples)[domain_id]


def named_weights(alpha: dict[str, float], domains: Sequence[str]) -> Tensor:
    """float64 [domains], of sum 1."""
    if unknown := alpha.keys() - set(domains):
        raise ValueError(f"alpha names {min(unknown)!r}; the sources of this run are {', '.join(domains)}")
    weights = torch.tensor([alpha.get(name, 1.0) for name in domains], dtype=torch.float64)
    if not weights.any():
        raise ValueError("alpha is 0 for every source; give one of them a weight")
    return weights / weights.sum()
