"""What LOST, CoLA and low-rank layers share: two factors, and beside them, or not, input channels that stay dense.

    y = gamma act(x A^T) B^T + (1 - gamma) x_I S^T

One surprise: of two opposite singular vectors one is chosen, because an activation such as SiLU tells them apart.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftlab.kernels.lost_linear import ACTS, lost_linear
from thriftlab.optim.layers.base import Layer, size_of

Act = Literal["silu", "gelu", "relu2", "none"]
Rank = int | float
Gain = Literal["dense"] | float | None
PROBES = 1024  # rows of normal noise by which the output of a fresh layer is measured


class Factored(Layer):
    """Two factors with an activation between them, beside `channels` dense input channels.

    Tensors: `lr_in` [rank, in], `lr_out` [out, rank]; with channels `sp_weight` [out, channels] and the buffer
    `sp_index` [channels] int64, ascending; with a bias `bias` [out].
    """

    lr_in: Tensor
    lr_out: Tensor
    sp_weight: Tensor | None
    sp_index: Tensor | None
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, rank: Rank, act: Act, init_gain: Gain, gamma: float = 1.0,
        channels: int = 0, *, bias: bool = False, device: Any = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(init_gain, float | int) and init_gain < 0:
            raise ValueError(f"init_gain = {init_gain}: give a factor of at least 0, dense or null")
        if init_gain is not None and gamma == 0:
            raise ValueError("gamma = 0 leaves no low-rank branch that init_gain could scale; set init_gain to null")
        self.in_features, self.out_features, self.channels = in_features, out_features, channels
        self.rank = size_of(rank, in_features, out_features)
        self.act, self.init_gain, self.gamma = act, init_gain, gamma
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lr_in = nn.Parameter(torch.empty(self.rank, in_features, **like))
        self.lr_out = nn.Parameter(torch.empty(out_features, self.rank, **like))
        self.sp_weight = nn.Parameter(torch.empty(out_features, channels, **like)) if channels else None
        index = torch.empty(channels, dtype=torch.int64, device=device) if channels else None
        self.register_buffer("sp_index", index)
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = lost_linear(x, self.lr_in, self.lr_out, self.sp_weight, self.sp_index, self.gamma, self.act)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def load_dense(self, weight: Tensor, generator: torch.Generator, bias: Tensor | None = None) -> None:
        weight = weight.double()
        self.load_branches(weight, generator)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)
        if self.init_gain is not None:
            self.lr_out.mul_(self.gain(weight, generator).item())

    def load_branches(self, weight: Tensor, generator: torch.Generator) -> None:
        """Fill the factors, and the channels if there are any, from a weight in float64."""
        raise NotImplementedError

    def load_factors(self, left: Tensor, s: Tensor, right: Tensor, share: float = 0.5) -> None:
        """The best approximation of the rank, from an SVD; `share` is the power of the values that A takes."""
        s = s[: self.rank]
        self.lr_in.copy_(s[:, None] ** share * right[: self.rank])
        self.lr_out.copy_(left[:, : self.rank] * s ** (1 - share))

    def gain(self, weight: Tensor, generator: torch.Generator) -> Tensor:
        """What `lr_out` is multiplied by, so that `init_gain` holds; "dense": measured on normal noise, where the
        weight is: on the CPU, as the noise, wherever the layer is, so that it is the same number everywhere."""
        if self.init_gain != "dense":
            return torch.tensor(self.init_gain / self.gamma, dtype=torch.float64)  # type: ignore[operator]
        x = torch.randn(PROBES, self.in_features, generator=generator, dtype=torch.float64).to(weight.device)
        down, up = self.lr_in.to(weight), self.lr_out.to(weight)
        low = self.gamma * ACTS[self.act][0](x @ down.T) @ up.T
        sparse = torch.zeros_like(low)
        if self.sp_weight is not None and self.sp_index is not None:
            sparse = (1 - self.gamma) * x[:, self.sp_index.to(x.device)] @ self.sp_weight.to(weight).T
        # |g low + sparse|^2 = |x W^T|^2
        a, b, c = low.square().sum(), (low * sparse).sum(), sparse.square().sum() - (x @ weight.T).square().sum()
        return ((b.square() - a * c).clamp(min=0).sqrt() - b) / a.clamp(min=1e-300)

    def flops_per_token(self) -> int:
        return 6 * (self.rank * (self.in_features + self.out_features) + self.channels * self.out_features)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The weight of the Linear that this is, [out, in] in float64. ValueError with an activation: it is none."""
        if self.act != "none":
            raise ValueError(f"with act={self.act!r} between its factors this layer is no Linear; use export()")
        weight = self.gamma * self.lr_out.double() @ self.lr_in.double()
        if self.sp_weight is not None:
            weight[:, self.sp_index] += (1 - self.gamma) * self.sp_weight.double()
        return weight

    def export(self) -> "Folded":
        return Folded(self)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, channels={self.channels}, "
            f"gamma={self.gamma}, act={self.act}"
        )


class Folded(nn.Module):
    """A factored layer for inference, in plain torch: y = [act(x A^T) | x_I] [gamma B | (1 - gamma) S]^T."""

    index: Tensor | None

    def __init__(self, layer: Factored):
        super().__init__()
        self.act = layer.act
        parts = [layer.gamma * layer.lr_out.detach()]
        if layer.sp_weight is not None:
            parts.append((1 - layer.gamma) * layer.sp_weight.detach())
        self.down = nn.Parameter(layer.lr_in.detach().clone())  # [rank, in]
        self.up = nn.Parameter(torch.cat(parts, 1))  # [out, rank + channels]
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_buffer("index", None if layer.sp_index is None else layer.sp_index.clone())

    def forward(self, x: Tensor) -> Tensor:
        parts = [ACTS[self.act][0](F.linear(x, self.down))]
        if self.index is not None:
            parts.append(x.index_select(-1, self.index))
        return F.linear(torch.cat(parts, -1), self.up, self.bias)


def svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Left vectors [out, p], singular values [p] in descending order, right vectors [p, in]; p is the smaller side.

    By the Gram matrix of that side in float64: faster than an SVD, and as exact where the matrix is not
    ill-conditioned. Of two opposite vectors of that side it takes the one whose largest entry is positive.
    """
    wide = weight.shape[0] <= weight.shape[1]
    short = weight if wide else weight.T
    vectors = torch.linalg.eigh(short @ short.T).eigenvectors.flip(1)
    vectors *= vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    rest = vectors.T @ short  # the singular values times the vectors of the longer side
    s = rest.norm(dim=1)
    other = rest / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return (vectors, s, other) if wide else (other.T, s, vectors.T)
