"""Focal loss (arXiv 1708.02002) for next tokens: what is predicted well counts less.

    L = (1 - p)^gamma * -ln p

Two things that implementations get wrong and this does not. 1 - p, of a token that is predicted almost surely, has no
digits left when it is subtracted, and is -expm1(-loss) here. And the paper differentiates the factor as well, which
others detach: then the gradient is another. It can be had of a weight all the same, by the product rule:

    dL/d(-ln p) = (1 - p)^gamma * (1 + gamma * p * -ln p / (1 - p))
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Search
from thriftlab.train.signals.base import Signal


class Focal(Signal, name="focal"):
    """Focal loss (1708.02002), divided by the number of tokens: tokens that are predicted well count less.

    Args:
        gamma: power of the factor 1 - p; 0 is plain cross-entropy
        detached: false: the gradient is that of the focal loss; true: the factor alone is the weight
    """

    unit = "token"
    denominator = "mask"

    def __init__(
        self,
        gamma: Annotated[float, Field(ge=0), Search(0.25, 4.0)] = 2.0,
        detached: Annotated[bool, Field()] = False,
    ):
        self.gamma, self.detached = gamma, detached

    def weights(self, token_loss: Tensor, **_: Any) -> Tensor:
        missed = -torch.expm1(-token_loss.clamp(min=0))  # 1 - p; rounding can make a loss of 0 negative
        factor = missed**self.gamma
        if self.detached:
            return factor
        limit = torch.where(missed > 0, (1 - missed) * token_loss / missed, 1)  # p l / (1 - p), 1 at l = 0
        return factor * (1 + self.gamma * limit)
