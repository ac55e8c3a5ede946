"""CoLA (2502.10940), y = B act(A x), and without its activation the plain low-rank layer y = B A x.

Both are LOST without its channels. One surprise: CoLA puts SiLU into every projection and keeps the one of SwiGLU as
well, in its smaller models; the larger ones drop that (`model.gate=none`).
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.hyper import Search
from thriftlab.optim.lost import Act, Gain, LostLinear, Rank

Start = Literal["gauss", "svd"]


class Factored(LostLinear):
    """Two factors alone. Beside LOST's start from the SVD they know CoLA's: normal, std rank^-1/4 (in + out)^-1/4."""

    init: Start

    def load_factors(self, weight: Tensor, generator: torch.Generator) -> None:
        if self.init == "svd":
            return super().load_factors(weight, generator)
        std = (self.rank * (self.in_features + self.out_features)) ** -0.25
        for factor in (self.lr_in, self.lr_out):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * std)


class CoLA(Factored, name="cola"):
    """CoLA: a low-rank layer with an activation between its factors.

    Args:
        rank: below 1 a share of the layer's smaller side.
        act: the activation between the factors.
        init: gauss as in the paper, or svd: the best approximation of the Linear's first weight.
        init_gain: dense: scale the layer so that its first output is as large as the Linear's; or a number.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        act: Annotated[Act, Field()] = "silu",
        init: Annotated[Start, Field()] = "gauss",
        init_gain: Annotated[Gain, Field()] = None,
        **place: Any,
    ):
        super().__init__(in_features, out_features, rank, density=0, gamma=1, act=act, init_gain=init_gain, **place)
        self.init = init


class LowRank(Factored, name="lowrank"):
    """Low-rank: W = B A.

    Args:
        rank: below 1 a share of the layer's smaller side.
        init: svd, the best approximation of the Linear's first weight, or gauss.
        init_gain: dense: scale the layer so that its first output is as large as the Linear's; or a number.
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
        super().__init__(in_features, out_features, rank, density=0, gamma=1, act="none", init_gain=init_gain, **place)
        self.init = init
