"""A step of a weight that is kept in few bits (state/weights.py), under any rule and without a line in one.

    wide = join(weight, low)        fp32
    update(wide)                    the rule's own, with the gradient in fp32
    weight, low = split(wide)

So a rule sees fp32 weights and gradients only. The low bits lie in the state of their parameter, and so they are cut,
owned, saved and resumed as moments are. A tensor that a rule leaves alone keeps every bit, however it is rounded.

What a rule treats entry by entry, as an embedding under AdamW, is stepped in pieces through views of its state: else
weight and gradient in fp32 would take more than the low bits save. The bits are those of the whole tensor.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core.fragments import LOCAL, Fragment, locate
from thriftlab.optim.state.counters import count_on, counts_on_host
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.storage import BLOCK
from thriftlab.optim.state.torch_adamw import PIECE
from thriftlab.optim.state.weights import (
    LOW,
    LOW_BITS,
    STEP,
    begin,
    dtype_of_step,
    join,
    noise,
    rounds_randomly,
    split,
)

DEVICE_PIECE = 2**24  # entries that are stepped at once on a device; a multiple of storage.BLOCK, as PIECE is


def few_bits_step(
    method: Any, name: str, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any], scale: Tensor | None
) -> None:
    """Steps one whole tensor; `scale` multiplies the gradient, in fp32."""

    def update(wide: Tensor, slope: Tensor, state: State) -> None:
        method.update([name], [wide], [slope], [state], group)

    begin(weight, state, group)
    count(weight, state, group)
    if not (method.in_pieces(tuple(weight.shape), group) and weight.is_contiguous()):
        in_full(update, name, weight, grad, state, group, scale)
        return
    begin_moments(method, weight, state, group)
    flat, flat_grad = weight.view(-1), grad.reshape(-1)
    for start, stop, part in pieces(weight, state):
        in_full(update, name, flat[start:stop], flat_grad[start:stop], part, group, scale, start)
    for key in [key for key, value in part.items() if not value.ndim and key not in LOCAL]:
        state.setdefault(key, part[key]).copy_(part[key])


def few_bits_fragment_step(
    method: Any, fragment: Fragment, weight: Tensor, grad: Tensor, state: State, group: dict[str, Any],
    scale: Tensor | None,
) -> None:  # fmt: skip
    """Steps one fragment of a tensor that is stepped entry by entry."""

    def update(wide: Tensor, slope: Tensor, state: State) -> None:
        method.update_fragments([fragment], [wide], [slope], [state], group)

    begin(weight, state, group)
    count(weight, state, group)
    in_full(update, fragment.name, weight, grad, state, group, scale, fragment.start)


def in_full(
    update: Callable[[Tensor, Tensor, State], None], name: str, weight: Tensor, grad: Tensor, state: State,
    group: dict[str, Any], scale: Tensor | None, first: int = 0,
) -> None:  # fmt: skip
    """`update` of an fp32 stand-in for a weight, or a piece of one that begins at entry `first`."""
    wide = join(weight, state.get(LOW))
    slope = grad.float() if scale is None else grad.float() * scale.to(torch.float32)
    update(wide, slope, state)
    high, low = split(wide, LOW_BITS[group["weight_dtype"]], noise(name, state, group, first, wide))
    weight.copy_(high)
    if low is not None:
        state[LOW].copy_(low)


def count(weight: Tensor, state: State, group: dict[str, Any]) -> None:
    """One more rounding at random, unless the step is refused."""
    if rounds_randomly(group) and counts_on_host(weight, group):
        state[STEP] += 1
    elif rounds_randomly(group):
        count_on([state[STEP]], group.get("applied"))


def begin_moments(method: Any, weight: Tensor, state: State, group: dict[str, Any]) -> None:
    """The state of a new tensor, whole, so that there are views of it."""
    spec = method.spec(tuple(weight.shape), dtype_of_step(weight, group), **group)
    for key, (shape, dtype) in spec.items():
        if key not in state and key != "rounding":
            state[key] = torch.zeros(shape, dtype=dtype, device=weight.device)


def pieces(weight: Tensor, state: State) -> Iterator[tuple[int, int, State]]:
    """(start, stop, state) of pieces of a tensor: views of what has an entry for each of its own, and counters that
    every piece counts on from where they are."""
    by_blocks = any(value.dtype == torch.uint8 for value in state.values())
    entries, most = weight.numel(), PIECE if weight.device.type in ("cpu", "meta") else DEVICE_PIECE
    for start in range(0, max(entries, 1), most):
        stop = min(start + most, entries)
        part = {key: value if value.ndim else value.clone() for key, value in state.items()}
        for key, value in part.items():
            if value.ndim:
                scales = key.endswith(".scale")
                part[key] = value[start // BLOCK : -(-stop // BLOCK)] if scales else value.view(-1)[start:stop]
        if not by_blocks:
            locate(part, start, entries)
        yield start, stop, part


def narrow(weight: Tensor, state: State, group: dict[str, Any]) -> None:
    """What is kept of an fp32 weight, in its place; its low bits are those of the weight as it is."""
    high, low = split(weight.detach(), LOW_BITS[group["weight_dtype"]])
    weight.data = high
    if low is not None:
        state[LOW] = low
