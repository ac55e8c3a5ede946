"""DoReMi (arXiv 2305.10429): domains on which the model could still get better count more.

    lambda_k = mean over the tokens of domain k of max(loss - reference loss, 0)
    alpha   <- softmax(ln alpha + eta lambda), then (1 - c) alpha + c / K
    L        = sum_k alpha_k * mean loss of domain k

The weights to train the next model with are the mean of alpha over all updates, `mean_alpha` in the record. What the
published code does otherwise: its losses are divided by one sum of weights instead of the tokens of each domain; with
accumulation most micro-batches use weights that are a step old; one of its descendants clips the mean of a domain where
the paper clips each token, and so lets good tokens cancel bad ones. A domain that the batch does not have keeps its
last score.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.data.paths import FilePath
from thriftlab.optim.core.hyper import Search
from thriftlab.train.signals.base import Signal, State, domain_means


class DoReMi(Signal, name="doremi"):
    """DoReMi (2305.10429): sources in which loss exceeds that of a reference model count more, multiplicatively.

    Args:
        reference: folder that `thriftlab reference` wrote
        eta: step size of the weights
        smoothing: part of the weights that is uniform
    """

    unit = "domain"

    def __init__(
        self,
        reference: Annotated[FilePath, Field()],
        eta: Annotated[float, Field(gt=0), Search(0.05, 2.0)] = 1.0,
        smoothing: Annotated[float, Field(ge=0, le=1)] = 1e-3,
    ):
        self.reference, self.eta, self.smoothing = reference, eta, smoothing

    def state(self, domains: Sequence[str]) -> State:
        zeros = torch.zeros(len(domains), dtype=torch.float64)
        return {"alpha": zeros + 1 / len(domains), "excess": zeros, "sum": zeros.clone(), "updates": zeros[0].clone()}

    def score(self, token_loss: Tensor, reference_loss: Tensor | None) -> Tensor:
        assert reference_loss is not None
        return (token_loss - reference_loss).clamp(min=0)

    def statistics(self, losses: Tensor, mask: Tensor, domain_id: Tensor, state: State, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return {"excess": domain_means(losses, mask, domain_id, otherwise=state["excess"])}

    def update(self, statistics: dict[str, Tensor], state: State, **_: Any) -> None:
        state["excess"] = statistics["excess"]
        alpha = (state["alpha"].log() + self.eta * state["excess"]).softmax(0)
        state["alpha"] = (1 - self.smoothing) * alpha + self.smoothing / len(alpha)
        state["sum"] = state["sum"] + state["alpha"]
        state["updates"] = state["updates"] + 1

    def weights(self, domain_id: Tensor, domain_tokens: Tensor, state: State, **_: Any) -> Tensor:  # type: ignore[override]
        return (state["alpha"] / domain_tokens)[domain_id]

    def report(self, state: State) -> dict[str, Tensor]:
        return {"alpha": state["alpha"], "mean_alpha": state["sum"] / state["updates"].clamp(min=1)}
