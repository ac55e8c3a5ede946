"""The plain low-rank layer, y = B A x: CoLA without its activation, and what other layers are measured against."""

from typing import Annotated, Any

from pydantic import Field

from thriftlab.optim.core.hyper import Search
from thriftlab.optim.layers.cola import CoLA, Start
from thriftlab.optim.layers.factored import Gain, Rank


class LowRank(CoLA, name="lowrank"):
    """Low-rank: W = B A.

    Args:
        rank: below 1 a share of the layer's smaller side, above that side that side.
        init: svd, the Linear's best approximation; or gauss, std rank^-1/4 (in + out)^-1/4.
        init_gain: scales lr_out once. A number: the layer starts as this many times B A x; dense: its output on normal
            noise starts as large as the Linear's; null: as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        init: Annotated[Start, Field()] = "svd",
        init_gain: Annotated[Gain, Field()] = None,
        **place: Any,
    ):
        super().__init__(in_features, out_features, rank, "none", init, init_gain, **place)
