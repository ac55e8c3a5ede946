"""Which way a tensor goes through a step: by a kernel; by plain torch in an fp32 stand-in for few bits; or as it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim.core.fused import Parts, plan_step, step_fused
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.lists import refused
from thriftlab.optim.state.storage import wide
from thriftlab.optim.state.weights import few_bits


def step_each(
    method: Any, update: Callable[..., None], in_few_bits: Callable[..., None], parts: Parts, weights: list[Tensor],
    grads: list[Tensor], states: list[State], group: dict[str, Any], scale: Tensor | None, skip: Tensor | None,
) -> None:  # fmt: skip
    """Steps tensors or fragments: `in_few_bits` each one that is kept so, `update` the others that no kernel takes.

    Args:
        scale: 0-dim; the gradients count so many times. They may be multiplied in place.
        skip: 0-dim; where it is 1 and not 0 weights and states keep every bit, as where `group["applied"]` is 0.
    """
    group = group if skip is None else {**group, "applied": refused(skip)}
    left = step_fused(method, parts, weights, grads, states, group, scale)
    if weights and not left:
        return
    for i in (few := [i for i in left if few_bits(weights[i], group)]):
        in_few_bits(method, parts[i], weights[i], grads[i], states[i], group, scale)
    others = [i for i in left if i not in few]
    if others or not few:
        lists: list[list] = [[values[i] for i in others] for values in (parts, weights, grads, states)]
        update(lists[0], lists[1], scaled(lists[2], scale), lists[3], group)
    plan_step(method, parts, weights, grads, states, group)


def scaled(grads: list[Tensor], scale: Tensor | None) -> list[Tensor]:
    """The gradients, multiplied in place; those of fewer bits than fp32 in fp32, for a rounded scale is another one."""
    if scale is None or not grads:
        return grads
    grads = [grad.to(wide(grad.dtype)) for grad in grads]
    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return grads
