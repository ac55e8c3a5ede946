"""CoLA (2502.10940): two factors with an activation between them, y = B act(A x).

One surprise: CoLA puts SiLU into every projection and keeps the one of SwiGLU as well, in its smaller models; the
larger ones (350M and above) drop that: `model.gate=none`.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.hyper import Search, check
from thriftlab.optim.layers.factored import Act, Factored, Gain, Rank, svd

Start = Literal["gauss", "svd"]


class CoLA(Factored, name="cola"):
    """CoLA: a low-rank layer with an activation between its factors.

    Args:
        rank: below 1 a share of the layer's smaller side, above that side that side.
        act: the activation between the factors.
        init: gauss as in the paper, std rank^-1/4 (in + out)^-1/4; or svd: the Linear's best approximation.
        init_gain: scales lr_out once. A number: the layer starts as this many times B act(A x); dense: its output on
            normal noise starts as large as the Linear's; null: as published.
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
        check(type(self), locals())
        super().__init__(in_features, out_features, rank, act, init_gain, **place)
        self.init = init

    def load_branches(self, weight: Tensor, generator: torch.Generator) -> None:
        if self.init == "svd":
            return self.load_factors(*svd(weight))
        std = (self.rank * (self.in_features + self.out_features)) ** -0.25
        for factor in (self.lr_in, self.lr_out):
            factor.copy_(torch.randn(factor.shape, generator=generator, dtype=torch.float64) * std)
