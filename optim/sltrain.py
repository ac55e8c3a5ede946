"""SLTrain (2406.02214): a low-rank weight and a few single entries, anywhere in it, that are trained beside it.

    W = (alpha / rank) B A + S,   S zero but at floor(density out in) positions

The positions are drawn once, uniformly, and stay. A and the entries of S start uniform within 1 / sqrt(in), B at zero.

One surprise: 64-bit positions weigh more than what stands there. In half precision, with two moments, an entry is six
bytes and its position eight.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from thriftlab.kernels.sltrain_linear import sltrain_linear
from thriftlab.optim.factored import Rank
from thriftlab.optim.hyper import Search, check
from thriftlab.optim.layers import Layer, size_of


class SLTrain(Layer, name="sltrain"):
    """SLTrain: low-rank plus sparse, at random positions.

    Tensors: `lr_in` [rank, in], `lr_out` [out, rank], `sp_value` [entries] and the buffer `sp_index` [entries] int64,
    ascending, positions in W row after row; with a bias `bias` [out].

    Args:
        rank: of the low-rank part; below 1 a share of the layer's smaller side, above that side that side.
        density: share of W's entries that are trained by themselves, rounded down; at least one is.
        alpha: the low-rank part counts alpha / rank times. The paper's are 32 at rank 128 (60M), 16 at 256 (130M,
            350M), 8 at 512 (1B) and at 1024 (7B); the default is that of 60M.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        density: Annotated[float, Field(gt=0, le=1), Search(choices=[0.01, 0.03, 0.1])] = 0.03,
        alpha: Annotated[float, Field(gt=0), Search(8.0, 128.0)] = 32.0,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        check(SLTrain, locals())
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank = size_of(rank, in_features, out_features)
        self.density, self.alpha = density, alpha
        entries = max(1, math.floor(density * in_features * out_features + 1e-9))
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lr_in = nn.Parameter(torch.empty(self.rank, in_features, **like))
        self.lr_out = nn.Parameter(torch.empty(out_features, self.rank, **like))
        self.sp_value = nn.Parameter(torch.empty(entries, **like))
        self.sp_index: Tensor
        self.register_buffer("sp_index", torch.empty(entries, dtype=torch.int64, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        y = sltrain_linear(x, self.lr_in, self.lr_out, self.sp_value, self.sp_index, self.scale)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def load_dense(self, weight: Tensor, generator: torch.Generator, bias: Tensor | None = None) -> None:
        """Of the Linear only the bias is taken: SLTrain has a start of its own."""
        self.lr_in.copy_(uniform(self.lr_in.shape, self.in_features, generator))
        self.lr_out.zero_()
        self.sp_value.copy_(uniform(self.sp_value.shape, self.in_features, generator))
        positions = torch.randperm(self.out_features * self.in_features, generator=generator)
        self.sp_index.copy_(positions[: len(self.sp_index)].sort().values)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)

    def flops_per_token(self) -> int:
        """As of a Linear. The 8 rank in out of every micro-batch, however many tokens it has, come on top."""
        return 6 * self.in_features * self.out_features

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """W, [out, in] in float64."""
        weight = self.scale * self.lr_out.double() @ self.lr_in.double()
        weight.view(-1)[self.sp_index] += self.sp_value.double()
        return weight

    def export(self) -> nn.Linear:
        return linear(self.to_dense().to(self.lr_in.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, entries={len(self.sp_index)}, "
            f"alpha={self.alpha}"
        )


def uniform(shape: torch.Size, fan_in: int, generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with slope sqrt(5): within 1 / sqrt(fan_in); float64, on the CPU."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(fan_in)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A Linear of copies."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    values = {"weight": weight} | ({} if bias is None else {"bias": bias})
    made.load_state_dict({name: tensor.detach() for name, tensor in values.items()})
    return made
