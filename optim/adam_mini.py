"""Adam-mini (2406.16793, version 1.1.1 of its code): AdamW with one second moment for a whole block of entries.

    M <- b1 M + (1 - b1) G        v <- b2 v + (1 - b2) mean of G^2 over the block
    W <- (1 - lr wd) W - lr M^ / (sqrt(v^) + eps)              M^ = M / (1 - b1^t),  v^ = v / (1 - b2^t)

A block is the rows of a head in queries and keys, a row in other matrices, an entry of a bias, all of any other tensor.
One surprise: the kind of a tensor is told by its name, so `remarks` says where no head was found.
"""

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from thriftlab.optim.core.due import kept_of
from thriftlab.optim.core.entry_blocks import blocks_of, found, mean_squares, spread
from thriftlab.optim.core.hyper import Betas, Search, arguments
from thriftlab.optim.core.method import Method
from thriftlab.optim.state.counters import begin_counting, count_step
from thriftlab.optim.state.keys import Spec, State
from thriftlab.optim.state.lists import batches, kept_unless
from thriftlab.optim.state.rules import decay
from thriftlab.optim.state.storage import StateDtype, kept_spec, load, make_zero, store, wide
from thriftlab.optim.state.weights import dtype_of_step

Patterns = tuple[str, ...]
FIRST, BLOCKS = ("exp_avg",), "block_sq"


class AdamMini(Method, name="adam_mini"):
    """AdamW with a second moment for each block.

    Args:
        lr: the learning rate.
        betas: decay of the first and of the second moment.
        eps: added to the denominator, after bias correction.
        weight_decay: decoupled decay per step, times lr.
        heads: patterns of the names of matrices with a block for each head.
        whole: patterns of the names of tensors that are one block, such as values below 10,000 to 20,000 steps.
        state_dtype: how the first moment is kept; the second is in fp32.
        head_dim: rows of a head; `thriftlab train` has it from the model.
    """

    takes_applied = True

    def __init__(
        self,
        params,
        lr: Annotated[float | Tensor, Field(ge=0), Search(1e-4, 1e-2)] = 1e-3,
        betas: Annotated[Betas, Search(choices=[(0.9, 0.999), (0.9, 0.95)])] = (0.9, 0.999),
        eps: Annotated[float, Field(ge=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0), Search(choices=[0.0, 0.1])] = 0.0,
        heads: Annotated[Patterns, Field()] = (r"\.(q|k|q_proj|k_proj)\.weight$",),
        whole: Annotated[Patterns, Field()] = (),
        state_dtype: Annotated[StateDtype, Field()] = "fp32",
        head_dim: int | None = None,
        *,
        maximize: bool = False,
    ):
        super().__init__(**arguments(locals()))

    def update(
        self, names: list[str], weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
    ) -> None:
        counts = [blocks_of(name, tuple(weight.shape), group) for name, weight in zip(names, weights, strict=True)]
        for weight, state, count in zip(weights, states, counts, strict=True):
            begin_counting(("step",), weight, state, group)
            if FIRST[0] not in state:
                make_zero(FIRST, weight, state, group)
                state[BLOCKS] = torch.zeros(count, dtype=wide(weight.dtype), device=weight.device)
        for some in batches(weights):
            count_step(weights[some], states[some], group)
            with kept_unless(group.get("applied"), [*weights[some], *kept_of(states[some])]):
                descend(weights[some], grads[some], states[some], {**group, "applied": None})

    def spec(self, shape: tuple[int, ...], dtype: torch.dtype, name: str = "", **overrides: Any) -> Spec:
        group = {**self.defaults, **overrides}
        kept = kept_spec(FIRST, shape, dtype, group)
        return {"step": ((), torch.int64), **kept, BLOCKS: ((blocks_of(name, shape, group),), wide(dtype))}

    def expected_spec(self, name: str, weight: Tensor, group: dict[str, Any]) -> Spec:
        return self.spec(tuple(weight.shape), dtype_of_step(weight, group), name, **group)

    def state_spec(self, shape: tuple[int, ...], dtype: torch.dtype, state: State, group: dict[str, Any]) -> Spec:
        blocks = {BLOCKS: (tuple(state[BLOCKS].shape), wide(dtype))} if BLOCKS in state else {}
        return self.spec(shape, dtype, **group) | blocks  # `check_kind` has compared them

    def check_kind(self, name: str, weight: Tensor, state: State, group: dict[str, Any]) -> None:
        blocks, kept = blocks_of(name, tuple(weight.shape), group), len(state.get(BLOCKS, ()))
        if FIRST[0] in state and kept != blocks:
            raise ValueError(
                f"{name}: the state has second moments of {kept} blocks, and the weight {tuple(weight.shape)} has "
                f"{blocks}: of another method, or other heads; begin anew with optimizer.state[parameter].clear()"
            )

    def remarks(self) -> list[str]:
        if any(group["head_dim"] and found(n, group["heads"]) for group in self.param_groups for n in group["names"]):
            return []
        return ["heads or head_dim do not fit the model: each row is a block, in queries and keys too"]


def descend(weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]) -> None:
    """The step of some tensors, in place."""
    b1, b2 = group["betas"]
    firsts, seconds = [load(state, FIRST[0]) for state in states], [state[BLOCKS] for state in states]
    grads = [grad.to(first.dtype) for grad, first in zip(grads, firsts, strict=True)]
    torch._foreach_lerp_(firsts, grads, 1 - b1)
    sizes = [len(second) for second in seconds]
    means = [mean.to(second.dtype) for mean, second in zip(mean_squares(grads, sizes), seconds, strict=True)]
    torch._foreach_mul_(seconds, b2)  # no lerp: what has overflowed stays infinite, and its step 0
    torch._foreach_add_(seconds, means, alpha=1 - b2)
    decay(weights, group)
    ages = torch.stack([state["step"] for state in states]).double().to(weights[0].device)
    one, two = (torch.cat([c.expand(n) for c, n in zip(1 - b**ages, sizes, strict=True)]) for b in (b1, b2))
    factors = -group["lr"] / one / ((torch.cat(seconds) / two).sqrt() + group["eps"])  # [blocks of all]
    for weight, first, factor in zip(weights, firsts, factors.to(firsts[0].dtype).split(sizes), strict=True):
        weight.addcmul_(first, spread(factor, weight))
    for state, first in zip(states, firsts, strict=True):
        store(state, FIRST[0], first)
