"""What SLTrain, LoRA and ReLoRA share: a weight that is low-rank beside something else.

    W = R + (alpha / rank) B A

One surprise: B starts at zero and A uniform within 1 / sqrt(in), so a fresh layer is R, and A's first gradient zero.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from thriftlab.optim.layers.base import Layer, size_of


class Additive(Layer):
    """`lr_in` [rank, in] and `lr_out` [out, rank] beside what a subclass adds; with a bias `bias` [out]."""

    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, rank: int | float, alpha: float,
        *, bias: bool = False, device: Any = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.alpha = size_of(rank, in_features, out_features), alpha
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lr_in = nn.Parameter(torch.empty(self.rank, in_features, **like))
        self.lr_out = nn.Parameter(torch.empty(out_features, self.rank, **like))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @torch.no_grad()
    def load_dense(self, weight: Tensor, generator: torch.Generator, bias: Tensor | None = None) -> None:
        self.load_factors(generator)
        self.load_rest(weight, generator)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)

    def load_factors(self, generator: torch.Generator) -> None:
        """A Kaiming-uniform with slope sqrt(5), B zero."""
        self.lr_in.copy_(uniform(self.lr_in.shape, self.in_features, generator))
        self.lr_out.zero_()

    def load_rest(self, weight: Tensor, generator: torch.Generator) -> None:
        """Fill R."""
        raise NotImplementedError

    def rest(self) -> Tensor:
        """R, [out, in] in float64."""
        raise NotImplementedError

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """W, [out, in] in float64."""
        return self.rest() + self.scale * self.lr_out.double() @ self.lr_in.double()

    def export(self) -> nn.Linear:
        like: dict[str, Any] = {"device": self.lr_in.device, "dtype": self.lr_in.dtype}
        made = nn.Linear(self.in_features, self.out_features, self.bias is not None, **like)
        bias = {} if self.bias is None else {"bias": self.bias}
        made.load_state_dict({"weight": self.to_dense(), **bias})
        return made


def uniform(shape: torch.Size, fan_in: int, generator: torch.Generator) -> Tensor:
    """Within 1 / sqrt(fan_in); float64, on the CPU."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / math.sqrt(fan_in)
