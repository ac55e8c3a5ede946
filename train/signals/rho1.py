"""RHO-1's selective language modelling (arXiv 2404.07965): only tokens that are worth it are learned.

    excess = loss - reference loss; of the tokens of the batch the part `keep` with the largest excess counts

The training code was not published. Here the threshold is one of the global batch and not of a micro-batch, tokens that
are not predicted are never chosen, and the sum is divided by the number of chosen tokens. Tokens that tie at the
threshold share what is left for them in equal parts: a choice by position would depend on the order of rows.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.data.paths import FilePath
from thriftlab.optim.core.hyper import Search
from thriftlab.train.signals.base import Signal


class Rho1(Signal, name="rho1"):
    """RHO-1 (2404.07965): of all tokens of a batch those count whose loss exceeds a reference model's most.

    Args:
        reference: folder that `thriftlab reference` wrote
        keep: part of the predicted tokens that counts
    """

    unit = "token"

    def __init__(
        self,
        reference: Annotated[FilePath, Field()],
        keep: Annotated[float, Field(gt=0, le=1), Search(0.3, 1.0, scale="linear")] = 0.6,
    ):
        self.reference, self.keep = reference, keep

    def score(self, token_loss: Tensor, reference_loss: Tensor | None) -> Tensor:
        assert reference_loss is not None
        return token_loss - reference_loss

    def statistics(self, losses: Tensor, mask: Tensor, **_: Any) -> dict[str, Tensor]:
        """`threshold`, the smallest excess that counts, and the `part` that those who have just that count."""
        excess = torch.where(mask > 0, losses, -torch.inf).flatten()
        wanted = self.keep * mask.sum()
        last = (wanted.ceil().long() - 1).clamp(min=0)
        threshold = excess.sort(descending=True).values.take(last)
        above, equal = (excess > threshold).sum(), (excess == threshold).sum()
        return {"threshold": threshold, "part": (wanted - above) / equal}

    def weights(self, token_loss: Tensor, mask: Tensor, statistics: dict[str, Tensor], **_: Any) -> Tensor:  # type: ignore[override]
        above, equal = token_loss > statistics["threshold"], token_loss == statistics["threshold"]
        return mask * (above + equal * statistics["part"])
