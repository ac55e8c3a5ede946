"""LoRA from scratch, and ReLoRA (2307.05695), which merges what it has learnt into the frozen weight and starts anew.

    y = x (W0 + (alpha / rank) B A)^T
    every `merge_every` steps   W0 += (alpha / rank) B A,   A drawn anew,   B = 0,   state of A and B pruned

W0 is the Linear's first weight and gets no gradient. Steps between two merges are of one rank; their sum is not. The
paper trains at full rank for a while first; here W0 is random unless the model brings one. Its learning rate falls to
zero at each merge and rises again: `schedule.name=jagged`.

One surprise: W0 stays in fp32 whatever the model is in. What one merge adds is often less than bf16 tells apart.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from thriftlab.optim.core.hyper import Search, check
from thriftlab.optim.layers.additive import Additive
from thriftlab.optim.layers.factored import Rank


class LoRA(Additive, name="lora"):
    """LoRA: low-rank beside a frozen weight.

    Tensors: `weight` [out, in], frozen, `lr_in` [rank, in], `lr_out` [out, rank]; with a bias `bias` [out].

    Args:
        rank: of what is trained; below 1 a share of the layer's smaller side, above that side that side.
        alpha: it counts alpha / rank times.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        alpha: Annotated[float, Field(gt=0), Search(8.0, 128.0)] = 32.0,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        check(LoRA, locals())
        super().__init__(in_features, out_features, rank, alpha, bias=bias, device=device, dtype=dtype)
        weight = torch.empty(out_features, in_features, device=device, dtype=self.lr_in.dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.scale * F.linear(x, self.lr_in)  # [..., rank]
        return F.linear(x, self.weight.to(x.dtype), self.bias) + F.linear(h, self.lr_out)

    def load_rest(self, weight: Tensor, generator: torch.Generator) -> None:
        self.weight.copy_(weight)

    def rest(self) -> Tensor:
        return self.weight.double()

    def flops_per_token(self) -> int:
        """No gradient of W0 is made."""
        size = self.in_features * self.out_features
        return 4 * size + 6 * self.rank * (self.in_features + self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, alpha={self.alpha}"


class ReLoRA(LoRA, name="relora"):
    """ReLoRA: low-rank beside a frozen weight, into which it is merged again and again.

    Args:
        rank: of what is trained; below 1 a share of the layer's smaller side, above that side that side.
        alpha: it counts alpha / rank times.
        merge_every: steps from one merge to the next.
        prune: what a merge takes of the factors' optimizer state: 1: all, they begin anew; below 1, as published (0.8
            to 0.99): this share of each moment's entries, the smallest, become zero, and counts of steps go on.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: Annotated[Rank, Field(gt=0), Search(choices=[0.125, 0.25, 0.5])] = 0.25,
        alpha: Annotated[float, Field(gt=0), Search(8.0, 128.0)] = 32.0,
        merge_every: Annotated[int, Field(ge=1)] = 1000,
        prune: Annotated[float, Field(ge=0, le=1)] = 1.0,
        **place: Any,
    ):
        check(ReLoRA, locals())
        super().__init__(in_features, out_features, rank, alpha, **place)
        self.merge_every, self.prune = merge_every, prune
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.weight = nn.Parameter(self.weight.to(wide), requires_grad=False)

    def before_step(self, step: int, draw: Callable[[int], torch.Generator]) -> Sequence[str]:
        count, since = divmod(step, self.merge_every)
        if since or not count:
            return ()
        self.weight.addmm_(self.lr_out.to(self.weight.dtype), self.lr_in.to(self.weight.dtype), alpha=self.scale)
        self.load_factors(draw(count))
        return "lr_in", "lr_out"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, merge_every={self.merge_every}"
