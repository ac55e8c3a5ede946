"""LOST (2508.02668): a low-rank layer with an activation inside, beside a few input channels that stay dense.

    y = gamma act(x A^T) B^T + (1 - gamma) x_I S^T

It starts from a dense weight W = U diag(s) V^T: A and B are its best approximation of the rank, I the columns with the
largest norms in what that leaves, W_comp, and S the columns W[:, I] of the weight itself. I stays for the whole run.

One surprise: the layer does not begin as W. The activation and gamma leave about a third of its output, and that costs
more than anything else measured here wins; `init_gain="dense"` gives it back.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from thriftlab.optim.core.hyper import Search, check
from thriftlab.optim.layers.base import EXCLUDED, Conversion, convert
from thriftlab.optim.layers.factored import Act, Factored, Gain, Rank, svd

Score = Literal["rest_l2", "rest_l1", "weight_l2", "random"]
Values = Literal["orig", "comp", "zero"]
Sigma = Literal["both", "in", "out"]


class LostLinear(Factored, name="lost"):
    """LOST: low-rank with an activation inside, plus a few dense input channels.

    Args:
        rank: of the low-rank branch; below 1 a share of the layer's smaller side, above that side that side.
        density: share of the input channels that stay dense, rounded down; at least one does.
        gamma: weight of the low-rank branch, a constant; the sparse branch has 1 - gamma.
        act: the activation between the factors.
        score: norms by which channels are chosen: of the columns of W_comp (rest_l2, rest_l1), of W, or drawn.
        values: the dense channels' first weights: of W, of W_comp, or zero.
        window: singular values that W_comp is made of: null: all after the rank; k > 0: the next k; k < 0: the last -k.
        sigma: where the singular values go: both factors take the root, or one takes all.
        multiple: the number of channels is rounded to a multiple of this; 8 suits tensor cores.
        init_gain: scales lr_out once. A number: the low-rank branch, gamma included, starts as this many times
            B act(x A^T); dense: the layer's output on normal noise starts as large as the Linear's; null: as published.

    In Python `score` is also a tensor [in] of your own; the largest stay dense.
    """

    sp_weight: Tensor
    sp_index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        density: Annotated[float, Field(gt=0, le=1), Search(choices=[0.01, 0.03, 0.1])] = 0.01,
        gamma: Annotated[float, Field(ge=0, le=1), Search(choices=[0.25, 0.5, 0.7, 0.9])] = 0.7,
        act: Annotated[Act, Field()] = "silu",
        score: Annotated[Score | Tensor, Field()] = "rest_l2",
        values: Annotated[Values, Field()] = "orig",
        window: Annotated[int | None, Field()] = None,
        sigma: Annotated[Sigma, Field()] = "both",
        multiple: Annotated[int, Field(ge=1)] = 1,
        init_gain: Annotated[Gain, Field()] = None,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        check(LostLinear, locals())
        if window == 0:
            raise ValueError("window = 0 leaves nothing of W_comp; give null for all of it")
        if isinstance(score, Tensor) and score.shape != (in_features,):
            raise ValueError(f"score: a tensor of shape {[*score.shape]}; one number for each input is [{in_features}]")
        count = channels(density, in_features, multiple)
        super().__init__(
            in_features, out_features, rank, act, init_gain, gamma, count, bias=bias, device=device, dtype=dtype
        )
        self.density, self.multiple = density, multiple
        self.score, self.values, self.window, self.sigma = score, values, window, sigma

    def load_branches(self, weight: Tensor, generator: torch.Generator) -> None:
        left, s, right = svd(weight)
        self.load_factors(left, s, right, {"both": 0.5, "in": 1.0, "out": 0.0}[self.sigma])
        kept = window_of(self.window, self.rank, len(s))
        rest = left[:, kept] * s[kept] @ right[kept]  # W_comp [out, in]
        index = self.scores(weight, rest, generator).topk(self.channels).indices.sort().values
        self.sp_index.copy_(index)
        values = {"orig": weight, "comp": rest, "zero": torch.zeros_like(weight)}[self.values]
        self.sp_weight.copy_(values[:, index])

    def scores(self, weight: Tensor, rest: Tensor, generator: torch.Generator) -> Tensor:
        """One number for each input channel, [in]; the largest are kept."""
        if isinstance(self.score, Tensor):
            return self.score.to(weight.device)
        if self.score == "random":
            return torch.rand(self.in_features, generator=generator, dtype=torch.float64).to(weight.device)
        order = 1 if self.score == "rest_l1" else 2
        return torch.linalg.vector_norm(weight if self.score == "weight_l2" else rest, ord=order, dim=0)


def channels(density: float, in_features: int, multiple: int) -> int:
    """How many inputs stay dense, at least one: rounded down as the code does, or to the nearest multiple."""
    count = round(density * in_features / multiple) if multiple > 1 else math.floor(density * in_features + 1e-9)
    return min(max(1, count) * multiple, in_features)


def window_of(window: int | None, rank: int, last: int) -> slice:
    """The singular values of W_comp among `last`: all after the rank, the next `window`, or the last `-window`."""
    if window is None:
        return slice(rank, last)
    return slice(rank, min(rank + window, last)) if window > 0 else slice(max(rank, last + window), last)


def convert_lost(
    model: nn.Module,
    rank: Any = 0.25,
    density: Any = 0.01,
    gamma: Any = 0.7,
    include: Sequence[str] = ("",),
    exclude: Sequence[str] = EXCLUDED,
    seed: int = 0,
    **options: Any,
) -> Conversion:
    """Puts `LostLinear`s in the place of a model's Linears, in place.

    Args:
        rank, density, gamma, options: of `LostLinear`; each is one value, a map {regular expression: value}, of which
            the first that is found in a name counts, or a function of (name, Linear). So
            `gamma={"attn": 0.5, "": 0.7}`, `act={"mlp": "silu", "": "none"}`, `rank=lambda name, linear: ...`.
        include, exclude, seed: of `layers.convert`, as is what is left.
    """
    return convert(model, LostLinear, include, exclude, seed, rank=rank, density=density, gamma=gamma, **options)


@torch.no_grad()
def activation_score(model: nn.Module, batches: Iterable[Any]) -> Callable[[str, nn.Linear], Tensor]:
    """A `score` for `convert_lost` that asks data: the sum over tokens of x_j^2 |W_:j|^2, from `model(batch)`s."""
    energy: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            energy[name] = energy.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)  # type: ignore[operator]

        return hook

    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        for batch in batches:
            model(batch)
    finally:
        for handle in hooks:
            handle.remove()
    return lambda name, linear: energy[name] * linear.weight.detach().double().square().sum(0)
