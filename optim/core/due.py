"""When a refresh is due, and how often the host asks the device for it: not at all in a plain step, once in another."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from thriftlab.optim.state.counters import Age, bound, capturing, count_on, counts_on_host, learn
from thriftlab.optim.state.keys import State, keyed_seed

Due = Callable[[str, int, dict[str, Any]], int | None]  # (name, steps so far, group) -> number of what is due, or None


def due_refresh(name: str, step: int, group: dict[str, Any]) -> int | None:
    """The number of the refresh that is due at this step, or None.

    With `stagger` all matrices refresh at step 0, then each at an offset of its own within the gap.
    """
    if step == 0:
        return 0
    early = keyed_seed(group["seed"], name, 0) % group["gap"] if group.get("stagger") else 0
    count, since = divmod(step + early, group["gap"])
    return count if since == 0 else None


def steps_to_refresh(name: str, state: State, group: dict[str, Any]) -> int:
    """How many steps there are, at least, before the next refresh; 0: it may be due now, or nobody knows."""
    counter = state["step"]
    known = bound(counter)
    if known is None and counter.device.type != "cpu":
        return 0
    count = known.most if known else int(counter)
    if count == 0:
        return 0
    early = keyed_seed(group["seed"], name, 0) % group["gap"] if group.get("stagger") else 0
    return -(count + early) % group["gap"]


def may_be_due(name: str, state: State, group: dict[str, Any], due: Due = due_refresh) -> bool:
    """Whether a refresh is due, as far as the host knows without waiting."""
    known = bound(state["step"]) if "step" in state else None
    return known is None or due(name, known.most, group) is not None


def ask(
    names: list[str], weights: list[Tensor], states: list[State], group: dict[str, Any], due: Due = due_refresh,
    grads: Sequence[Tensor] = (),
) -> dict[str, Any] | None:  # fmt: skip
    """The group of a step with `applied`: as it is if no refresh can be due. Otherwise the device is read, and the
    group says what it was "asked": where a refresh may be due, whether the gradient is finite, if it has to be; None if
    the step is refused."""
    places = [i for i, name in enumerate(names) if may_be_due(name, states[i], group, due)]
    if capturing() or not places:
        return group
    finite = [grads[i].isfinite().all() for i in places] if grads else []
    told = learn([group["applied"].to(weights[0].device), *finite, *(state["step"] for state in states)]) or [1]
    return {**group, "asked": dict(zip(places, told[1 : 1 + len(finite)], strict=False))} if told[0] else None


def due_refreshes(
    names: list[str], weights: list[Tensor], states: list[State], group: dict[str, Any], due: Due = due_refresh
) -> list[int | None]:
    """The numbers of the refreshes that are due, of each matrix; of a step that is applied, as `ask` has found out."""
    counters = [state["step"] for state in states]
    if not counters or (group.get("applied") is not None and "asked" not in group):  # nothing can be due
        return [None] * len(names)
    if counts_on_host(weights[0], group):
        counts = [int(counter) for counter in counters]
    else:
        told = None if capturing() else learn(counters)
        bounds = [bound(counter) for counter in counters]
        counts = told or [known.most if known else -1 for known in bounds]
    return [due(name, count, group) if count >= 0 else None for name, count in zip(names, counts, strict=True)]


def kept_of(states: list[State]) -> list[Tensor]:
    """What a plain step writes of some states, counters apart."""
    return [
        value
        for state in states
        for key, value in state.items()
        if isinstance(value, Tensor) and is_written(key, value)
    ]


def is_written(key: str, value: Tensor) -> bool:
    return (value.ndim > 0 and not key.startswith(("basis.", "whole.", "weight."))) or key in (
        "limiter",
        "diagnostic.limiter",
    )


def lame_of(grads: list[Tensor], due: list[int | None], group: dict[str, Any]) -> set[int]:
    """Where a refresh is due and the gradient is not finite, as it was asked, or by one read of the device."""
    places = [i for i, count in enumerate(due) if count is not None]
    asked = group.get("asked")
    found = [asked[i] for i in places] if asked else are_finite([grads[i] for i in places])
    return {i for i, finite in zip(places, found, strict=True) if not finite}


def are_finite(grads: list[Tensor]) -> list[bool]:
    """Whether each gradient is, by one read of the device; one without data (meta, fake) is."""
    if not grads or any(grad.is_meta for grad in grads):
        return [True] * len(grads)
    try:
        return torch.stack([grad.isfinite().all() for grad in grads]).cpu().tolist()
    except DataDependentOutputException:
        return [True] * len(grads)


def next_age(weights: list[Tensor], states: list[State], group: dict[str, Any]) -> Age:
    """Counts the step of some matrices; how many it has been since their moments were zero."""
    if counts_on_host(weights[0], group):
        [state] = states
        state["step"] += 1
        return int(state["step"]) - int(state["start"])
    steps, starts = ([state[key] for state in states] for key in ("step", "start"))
    count_on(steps, group.get("applied"))
    return (torch.stack(steps) - torch.stack(starts)).double()
