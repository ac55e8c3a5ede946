"""LOST (2508.02668): a low-rank layer with an activation inside, beside a few input channels that stay dense.

    y = gamma act(x A^T) B^T + (1 - gamma) x_I S^T

It starts from a dense weight W = U diag(s) V^T: A and B are its best approximation of the rank, I the columns with the
largest norms in what that leaves, W_comp, and S the columns W[:, I] of the weight itself. I stays for the whole run.

One surprise: the layer does not begin as W. The activation and gamma leave about a third of its output, and that costs
more than anything else measured here wins; `init_gain="dense"` gives it back.
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from thriftlab.kernels.lost_linear import activate, lost_linear
from thriftlab.optim.hyper import Search
from thriftlab.optim.layers import Conversion, Layer, convert, size_of

Act = Literal["silu", "gelu", "relu2", "none"]
Rank = int | float
Score = Literal["rest_l2", "rest_l1", "weight_l2", "random"]
Values = Literal["orig", "comp", "zero"]
Start = Literal["svd", "gauss"]
Split = Literal["both", "in", "out"]
Gain = Literal["dense"] | float | None
PROBES = 1024  # rows of normal noise by which the output of a fresh layer is measured


class LostLinear(Layer, name="lost"):
    """LOST: low-rank with an activation inside, plus a few dense input channels.

    Args:
        rank: of the low-rank branch; below 1 a share of the layer's smaller side.
        density: share of the input channels that stay dense; at least one does.
        gamma: weight of the low-rank branch, a constant; the sparse branch has 1 - gamma.
        act: the activation between the factors.
        score: norms by which channels are chosen: of the columns of W_comp (rest_l2, rest_l1), of W, or drawn.
        values: the dense channels' first weights: of W, of W_comp, or zero.
        window: singular values that W_comp is made of: null: all after the rank; k > 0: the next k; k < 0: the last -k.
        sigma: where the singular values go: both factors take the root, or one takes all.
        multiple: the number of channels is rounded to a multiple of this; 8 suits tensor cores.
        init_gain: dense: scale the low-rank branch so that the fresh layer's output is as large as the Linear's; a
            number: so that it is that many times the branch with gamma = 1; null: the paper's.
    """

    lr_in: Tensor  # [rank, in]
    lr_out: Tensor  # [out, rank]
    sp_weight: Tensor  # [out, channels]
    sp_index: Tensor  # [channels] int64, sorted

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        density: Annotated[float, Field(ge=0, le=1), Search(choices=[0.01, 0.03, 0.1])] = 0.01,
        gamma: Annotated[float, Field(ge=0, le=1), Search(choices=[0.25, 0.5, 0.7, 0.9])] = 0.7,
        act: Annotated[Act, Field()] = "silu",
        score: Annotated[Score, Field()] = "rest_l2",
        values: Annotated[Values, Field()] = "orig",
        window: Annotated[int | None, Field()] = None,
        sigma: Annotated[Split, Field()] = "both",
        multiple: Annotated[int, Field(ge=1)] = 1,
        init_gain: Annotated[Gain, Field()] = None,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.gamma, self.act, self.score, self.values = gamma, act, score, values
        self.window, self.sigma, self.init_gain = window, sigma, init_gain
        self.rank = size_of(rank, in_features, out_features)
        self.channels = channels(density, in_features, multiple)
        like = {"device": device, "dtype": dtype}
        self.lr_in = nn.Parameter(torch.empty(self.rank, in_features, **like))
        self.lr_out = nn.Parameter(torch.empty(out_features, self.rank, **like))
        if self.channels:
            self.sp_weight = nn.Parameter(torch.empty(out_features, self.channels, **like))
            self.register_buffer("sp_index", torch.empty(self.channels, dtype=torch.int64, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        sparse = (self.sp_weight, self.sp_index) if self.channels else (None, None)
        y = lost_linear(x, self.lr_in, self.lr_out, *sparse, self.gamma, self.act)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def load_dense(self, weight: Tensor, generator: torch.Generator, bias: Tensor | None = None) -> None:
        weight = weight.double()
        self.load_factors(weight, generator)
        if self.channels:
            rest = remainder(weight, self.rank, self.window)
            scores = channel_scores(weight, rest, self.score, generator)
            index = scores.topk(self.channels).indices.sort().values
            values = {"orig": weight, "comp": rest, "zero": torch.zeros_like(weight)}[self.values]
            self.sp_index.copy_(index)
            self.sp_weight.copy_(values[:, index])
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)
        if self.init_gain is not None:
            self.lr_out.mul_(self.gain(weight, generator))

    def load_factors(self, weight: Tensor, generator: torch.Generator) -> None:
        """A and B from a weight in float64."""
        left, right, s = truncated_svd(weight, self.rank)
        share = {"both": 0.5, "in": 1.0, "out": 0.0}[self.sigma]
        self.lr_in.copy_(s[:, None] ** share * right)
        self.lr_out.copy_(left * s ** (1 - share))

    def gain(self, weight: Tensor, generator: torch.Generator) -> float:
        """What `lr_out` is multiplied by, so that `init_gain` holds; "dense": measured on normal noise."""
        if self.init_gain != "dense":
            return self.init_gain / self.gamma  # type: ignore[operator]
        x = torch.randn(PROBES, self.in_features, generator=generator, dtype=torch.float64).to(weight.device)
        low = self.gamma * activate(x @ self.lr_in.double().T, self.act) @ self.lr_out.double().T
        sparse = torch.zeros_like(low)
        if self.channels:
            sparse = (1 - self.gamma) * x[:, self.sp_index] @ self.sp_weight.double().T
        # |g low + sparse|^2 = |x W^T|^2
        a, b, c = low.square().sum(), (low * sparse).sum(), sparse.square().sum() - (x @ weight.T).square().sum()
        return ((b.square() - a * c).clamp(min=0).sqrt() - b).item() / max(a.item(), 1e-300)

    def flops_per_token(self) -> int:
        return 6 * (self.lr_in.numel() + self.lr_out.numel() + self.channels * self.out_features)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        """The Linear that this is, [out, in] in float64. ValueError with an activation: then it is none."""
        if self.act != "none":
            raise ValueError(f"with act={self.act!r} between its factors this layer is no Linear; use export()")
        weight = self.gamma * self.lr_out.double() @ self.lr_in.double()
        if self.channels:
            weight[:, self.sp_index] += (1 - self.gamma) * self.sp_weight.double()
        return weight

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, rank={self.rank}, channels={self.channels}, "
            f"gamma={self.gamma}, act={self.act}"
        )


def channels(density: float, in_features: int, multiple: int) -> int:
    """density * in, rounded down as the code does; a multiple is rounded to the nearest. At least one, unless none."""
    if density == 0:
        return 0
    count = round(density * in_features / multiple) if multiple > 1 else math.floor(density * in_features + 1e-9)
    return min(max(1, count) * multiple, in_features)


def spectrum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors of the shorter side, [p, p] in descending order, and what they make of the rest, s v^T [p, q].

    By the Gram matrix in float64: faster than an SVD, and as exact for a matrix that is not ill-conditioned. Of two
    opposite vectors it takes the one whose largest entry is positive: SiLU tells them apart, rounding should not.
    """
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    vectors = torch.linalg.eigh(short @ short.T).eigenvectors.flip(1)
    sign = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    vectors = vectors * sign
    return vectors, vectors.T @ short


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest: left vectors [out, rank], right vectors [rank, in], singular values [rank]."""
    vectors, rest = spectrum(weight)
    vectors, rest = vectors[:, :rank], rest[:rank]
    s = rest.norm(dim=1)
    other = rest / s.clamp(min=torch.finfo(s.dtype).tiny)[:, None]
    return (vectors, other, s) if weight.shape[0] <= weight.shape[1] else (other.T, vectors.T, s)


def remainder(weight: Tensor, rank: int, window: int | None) -> Tensor:
    """W_comp [out, in]: the part of the weight with the singular values after the rank, or a window of those."""
    vectors, rest = spectrum(weight)
    last = len(rest)
    start = max(rank, last + window) if window is not None and window < 0 else rank
    stop = min(rank + window, last) if window is not None and window > 0 else last
    found = vectors[:, start:stop] @ rest[start:stop]
    return found if weight.shape[0] <= weight.shape[1] else found.T


def channel_scores(weight: Tensor, rest: Tensor, score: Score, generator: torch.Generator) -> Tensor:
    """One number for each input channel, [in]; the largest are kept."""
    if score == "random":
        return torch.rand(weight.shape[1], generator=generator, dtype=torch.float64).to(weight.device)
    return torch.linalg.vector_norm(weight if score == "weight_l2" else rest, ord=1 if score == "rest_l1" else 2, dim=0)


def convert_lost(
    model: nn.Module,
    rank: Rank = 0.25,
    density: float = 0.01,
    gamma: float = 0.7,
    include: Sequence[str] = ("",),
    exclude: Sequence[str] = ("embed", "lm_head", "router"),
    seed: int = 0,
    **options: Any,
) -> Conversion:
    """Puts `LostLinear`s in the place of a model's Linears; see `layers.convert` and, for the options, `LostLinear`."""
    make = functools.partial(LostLinear, rank=rank, density=density, gamma=gamma, **options)
    return convert(model, make, include, exclude, seed)
