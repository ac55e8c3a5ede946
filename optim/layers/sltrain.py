"""SLTrain (2406.02214): a low-rank weight and a few single entries, anywhere in it, that are trained beside it.

    W = S + (alpha / rank) B A,   S zero but at floor(density out in) positions

The positions are drawn once, uniformly, and stay; what stands there starts uniform within 1 / sqrt(in).

One surprise: 64-bit positions weigh more than what stands there. In half precision, with two moments, an entry is six
bytes and its position eight.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from thriftlab.kernels.sltrain_linear import sltrain_linear
from thriftlab.optim.core.hyper import Search, check
from thriftlab.optim.layers.additive import Additive, uniform
from thriftlab.optim.layers.base import size_of
from thriftlab.optim.layers.factored import Rank


class SLTrain(Additive, name="sltrain"):
    """SLTrain: low-rank plus sparse, at random positions.

    Tensors: `lr_in` [rank, in], `lr_out` [out, rank], `sp_value` [entries] and the buffer `sp_index` [entries] int64,
    ascending, positions in W row after row; with a bias `bias` [out].

    Args:
        rank: of the low-rank part; below 1 a share of the layer's smaller side, above that side that side.
        density: share of W's entries that are trained by themselves, rounded down; at least one is.
        alpha: the low-rank part counts alpha / rank times; null: the paper's at that rank, 32 up to 128 (60M), 16 up to
            256 (130M, 350M), 8 above (1B, 7B).
    """

    sp_index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        density: Annotated[float, Field(gt=0, le=1), Search(choices=[0.01, 0.03, 0.1])] = 0.03,
        alpha: Annotated[float | None, Field(gt=0), Search(8.0, 128.0)] = None,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        check(SLTrain, locals())
        alpha = published_alpha(size_of(rank, in_features, out_features)) if alpha is None else alpha
        super().__init__(in_features, out_features, rank, alpha, bias=bias, device=device, dtype=dtype)
        self.density = density
        entries = max(1, math.floor(density * in_features * out_features + 1e-9))
        self.sp_value = nn.Parameter(torch.empty(entries, device=device, dtype=dtype))
        self.register_buffer("sp_index", torch.empty(entries, dtype=torch.int64, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = sltrain_linear(x, self.lr_in, self.lr_out, self.sp_value, self.sp_index, self.scale)
        return y if self.bias is None else y + self.bias

    def load_rest(self, weight: Tensor, generator: torch.Generator) -> None:
        """S, which takes nothing from the Linear's weight."""
        self.sp_value.copy_(uniform(self.sp_value.shape, self.in_features, generator))
        positions = torch.randperm(weight.numel(), generator=generator)
        self.sp_index.copy_(positions[: len(self.sp_index)].sort().values)

    def rest(self) -> Tensor:
        dense = self.sp_value.new_zeros(self.out_features, self.in_features, dtype=torch.float64)
        dense.view(-1)[self.sp_index] = self.sp_value.double()
        return dense

    def flops_per_token(self) -> int:
        """As of a Linear. The 8 rank in out of every micro-batch, however many tokens it has, come on top."""
        return 6 * self.in_features * self.out_features

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, entries={len(self.sp_index)}, "
            f"alpha={self.alpha}"
        )


def published_alpha(rank: int) -> float:
    return 32.0 if rank <= 128 else 16.0 if rank <= 256 else 8.0
