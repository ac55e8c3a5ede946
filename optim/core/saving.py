"""Saving and loading: torch's `state_dict` and `load_state_dict`, with their hooks, and every bit of the state.

The surprise: torch's own `load_state_dict` casts state to the parameter's dtype (int32 indices to bfloat16, too) and
matches parameters by position. Here names decide where both sides have them, and a dtype stays as saved, unless the
weights have another one now: then state is kept as `state_spec` says for these.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thriftlab.optim.core import hyper
from thriftlab.optim.core.groups import match_groups
from thriftlab.optim.core.guard import fitting_spec, settle
from thriftlab.optim.core.sharded import states_here
from thriftlab.optim.core.tables import settled
from thriftlab.optim.state.keys import State


def saved_state(
    optimizer: Any, save: Callable[[], dict[str, Any]], show: Callable[[Any, dict[str, Any]], None]
) -> dict[str, Any]:
    """What `save`, torch's `state_dict`, gives, with the names of types in place of objects and what `show` makes of
    tensors that are cut, as the hooks leave it."""
    for hook in [*optimizer._optimizer_state_dict_pre_hooks.values()]:
        hook(optimizer)
    with no_hooks(optimizer, "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"):
        saved = save()
    show(optimizer, saved)
    for group in saved["param_groups"]:
        group.update({key: type(value).__name__ for key, value in group.items() if not is_data(value)})
    for hook in [*optimizer._optimizer_state_dict_post_hooks.values()]:
        changed = hook(optimizer, saved)
        saved = saved if changed is None else changed
    return saved


def load_state(optimizer: Any, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]) -> None:
    """Loads what the pre-hooks make of `state_dict`, groups by torch's own `load`; all is checked before a change."""
    state_dict = state_dict.copy()
    for hook in [*optimizer._optimizer_load_state_dict_pre_hooks.values()]:
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    groups = match_groups(optimizer.param_groups, state_dict["param_groups"])
    own = [kept_options(group, saved) for group, saved in zip(optimizer.param_groups, groups, strict=True)]
    every = [merged(optimizer, saved, options) for saved, options in zip(groups, own, strict=True)]
    found = states_here(optimizer, state_dict, every)
    states: dict[Tensor, State] = {}
    for group, saved in zip(optimizer.param_groups, every, strict=True):
        named = {}
        for name, p, index in zip(saved["names"], group["params"], saved["params"], strict=True):
            if index in found:
                states[p] = restored(optimizer, name, p, found[index], {**saved, "params": [p]})
                named[name] = p
        whole = {name: p for name, p in named.items() if not is_cut(p, states[p])}
        optimizer.check_loaded(whole, {name: states[p] for name, p in whole.items()}, saved, group)
    indices = {index for saved in groups for index in saved["params"]}
    others = {key: value for key, value in state_dict["state"].items() if key not in indices}
    with no_hooks(optimizer, "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"):
        load({**state_dict, "state": others, "param_groups": groups})
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)
        group.update(settled(optimizer, group))
    optimizer.state.update(states)
    for hook in [*optimizer._optimizer_load_state_dict_post_hooks.values()]:
        hook(optimizer)


@contextmanager
def no_hooks(optimizer: Any, *kinds: str) -> Iterator[None]:
    held = {kind: getattr(optimizer, kind) for kind in kinds}
    vars(optimizer).update({kind: OrderedDict() for kind in kinds})
    try:
        yield
    finally:
        vars(optimizer).update(held)


def kept_options(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The options of our own that a file does not bring: objects, and what is younger than the file."""
    return {key: v for key, v in group.items() if not is_data(v) or key not in saved}


def merged(optimizer: Any, saved: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A saved group with `options` of our own, checked."""
    if saved.get("amsgrad"):
        raise ValueError(f"the saved state is one of amsgrad=True, which {type(optimizer).__name__} does not have")
    group = {**saved, **options}
    group |= hyper.check(type(optimizer), group)
    return {**group, **settled(optimizer, group)}


def restored(optimizer: Any, name: str, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> State:
    """A copy of a parameter's saved state; ValueError where it does not fit."""
    state = {key: copied(value, p) for key, value in saved.items()}
    if is_cut(p, state):
        return state
    settle(state, fitting_spec(optimizer, name, p, state, group), casts=True)
    return state


def is_cut(p: Tensor, state: State) -> bool:
    """Whether a state is a rank's part of one, of which the shape of `p` says little."""
    return isinstance(p, DTensor) or "whole.first" in state


def copied(value: Any, p: Tensor) -> Any:
    """A tensor on the device of `p`, fp32 beside fp32 in its layout; counters on the CPU. Anything else as it is."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    alike = value.shape == p.shape and value.ndim and value.dtype == p.dtype in (torch.float32, torch.float64)
    if alike and not isinstance(p, DTensor):
        return torch.empty_like(p).copy_(value)
    return value.to(p.device if value.ndim else "cpu", copy=True)


def is_data(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | list | tuple | dict | Tensor)
