"""Which way a tensor goes through a step: by a kernel; by plain torch in an fp32 stand-in for few bits; or as it is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thriftlab.kernels import dispatch
from thriftlab.optim.core import guard
from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.fused import Parts, Plan, lasting
from thriftlab.optim.core.kinds import kind_of, may_launch
from thriftlab.optim.state.keys import State
from thriftlab.optim.state.lists import refused
from thriftlab.optim.state.storage import wide
from thriftlab.optim.state.weights import few_bits

OPERATION = "fused_step"


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
    ways = ways_of(method, parts, weights, grads, states, group)
    for plan in ways.plans:
        plan.step(weights, grads, group, scale)
    left = sorted(set(range(len(weights))).difference(*[plan.places for plan in ways.plans]))
    if weights and not left:
        return
    for i in (few := [i for i in left if few_bits(weights[i], group)]):
        in_few_bits(method, parts[i], weights[i], grads[i], states[i], group, scale)
    others = [i for i in left if i not in few]
    if others or not few:
        lists: list[list] = [[values[i] for i in others] for values in (parts, weights, grads, states)]
        update(lists[0], lists[1], scaled(lists[2], scale), lists[3], group)
    if not ways.settled:  # states have begun, or been refreshed
        method.plans[key_of(parts)] = ways_now(method, parts, weights, grads, states, group)


class Ways(NamedTuple):
    """Which tensors of a call take kernels."""

    parts: list[str | Fragment]
    group: dict[str, Any]
    plans: list[Plan]
    settled: bool = True  # no kernel is for any other, in whatever state it is


NO_KERNELS = Ways([], {}, [])


def ways_of(
    method: Any, parts: Parts, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
) -> Ways:
    """The ways of this step: those of the last one, if nothing has changed."""
    if not takes_kernels(method, weights, group):
        method.plans.clear()
        return NO_KERNELS
    known = method.plans.get(key_of(parts))
    same = known and known.parts == list(parts) and known.group == lasting(group)
    if not same or not all([plan.fits(weights, grads, states) for plan in known.plans]):
        known = method.plans[key_of(parts)] = ways_now(method, parts, weights, grads, states, group)
    return known


def ways_now(
    method: Any, parts: Parts, weights: list[Tensor], grads: list[Tensor], states: list[State], group: dict[str, Any]
) -> Ways:
    """Plans of those tensors that kernels can step in the state that they have now."""
    rows = [*zip(parts, weights, grads, states, strict=True)]
    kinds = [kind_of(method, *row, group) for row in rows]
    if missing := [guard.name_of(part) for part, (kind, _) in zip(parts, kinds, strict=True) if kind is None]:
        dispatch.note(OPERATION, f"torch for tensors of {type(method).__name__} like {missing[0]}")
    now = {i: kind for i, (kind, yes) in enumerate(kinds) if kind and yes}
    alike: dict[Any, list[int]] = {}
    for i, kind in now.items():
        alike.setdefault((kind.plain, kind.numbers), []).append(i)
    for places in alike.values():
        guard.check(method, *([values[i] for i in places] for values in (parts, weights, grads, states)), group)
    plans = [Plan(rows, places, [now[i] for i in places], group) for places in alike.values()]
    return Ways(list(parts), lasting(group), plans, settled=all(yes or not kind for kind, yes in kinds))


def takes_kernels(method: Any, weights: list[Tensor], group: dict[str, Any]) -> bool:
    if not weights or torch.compiler.is_compiling() or dispatch.path(weights[0], OPERATION) != "triton":
        return False
    return may_launch(method, weights[0], group)


def key_of(parts: Parts) -> tuple[str | Fragment, int]:
    return parts[0], len(parts)


def scaled(grads: list[Tensor], scale: Tensor | None) -> list[Tensor]:
    """The gradients, multiplied in place; those of fewer bits than fp32 in fp32, for a rounded scale is another one."""
    if scale is None or not grads:
        return grads
    grads = [grad.to(wide(grad.dtype)) for grad in grads]
    torch._foreach_mul_(grads, scale.to(grads[0].dtype))
    return grads
