"""A curriculum of weights that ends in the plain loss (MacAvaney et al., SIGIR 2020, arXiv 2004.14245).

    w = D (1 - i / m) + i / m up to step m, and 1 from there; D in [0, 1], large where a sample is easy

The paper ranks passages and takes D from a first-stage ranker. Here D comes from the losses of the windows, those of a
reference model or the model's own, by minimum and maximum of the batch; without its division by zero where all are
equal. Its code multiplies the mean loss of a batch by the mean weight, which is a learning rate and no curriculum; here
every sample has its own weight.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.data.paths import FilePath
from thriftlab.train.signals.base import Signal
from thriftlab.train.signals.reweight import bounds, normalised


class Curriculum(Signal, name="curriculum"):
    """Easy windows first, then all alike (MacAvaney et al. 2020).

    Args:
        until: fraction of the budget after which every window counts alike
        first: which windows count from the beginning
        reference: folder that `thriftlab reference` wrote, whose losses say what is hard; null: the model's own
    """

    denominator = "mask"

    def __init__(
        self,
        until: Annotated[float, Field(gt=0, le=1)] = 0.5,
        first: Annotated[Literal["easy", "hard"], Field()] = "easy",
        reference: Annotated[FilePath | None, Field()] = None,
    ):
        self.until, self.first, self.reference = until, first, reference

    def idle(self, progress: float) -> bool:
        return progress >= self.until

    def score(self, token_loss: Tensor, reference_loss: Tensor | None) -> Tensor:
        return token_loss if reference_loss is None else reference_loss

    def statistics(self, losses: Tensor, mask: Tensor, **_: Any) -> dict[str, Tensor]:
        low, high = bounds("minmax", torch.where(mask > 0, losses, torch.nan))
        return {"low": low, "high": high}

    def weights(  # type: ignore[override]
        self, token_loss: Tensor, statistics: dict[str, Tensor], progress: float, **_: Any
    ) -> Tensor:
        hard = (1 + normalised(token_loss, statistics["low"], statistics["high"])) / 2  # 0 to 1
        d = hard if self.first == "hard" else 1 - hard
        grown = progress / self.until
        return d * (1 - grown) + grown
