"""The state of any torch optimizer, by parameter name: tensors and JSON, exact in both directions.

Tensors are called "PARAMETER/KEY", which says where they belong and survives a change of the order of parameters and
groups. A state that this cannot say (numbers, nested dicts, a tensor in several places; none of our methods has them)
is in the JSON as well: as a tree with {"__tensor__": name} in the place of each tensor.
Tensors come back with their own dtype: torch's `load_state_dict` would cast fp32 moments and int64 indices of a bf16
parameter to bf16.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from thriftlab.data.errors import CheckpointError
from thriftlab.optim import Method

IDENTITY = ("params", "names", "param_names")  # of a group: what says which parameters it has


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, rest): `rest` is JSON, the hyper-parameters of the groups and what else is no tensor.

    Tensors are not copied. One tensor in several places is stored once and comes back
    as one. Names are the groups' `names` (or torch's `param_names`), else the positions of the parameters.
    """
    names = group_names(optimizer)
    flat = [name for group in names for name in group]
    saved = state_here(optimizer)
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}
    trees = {flat[index]: _detach(entries, flat[index], tensors, keys) for index, entries in saved["state"].items()}
    told = state_trees(tensors, {})
    groups = [
        {"names": names[i], "options": _detach(_options(group), f"group {i}", tensors, keys)}
        for i, group in enumerate(saved["param_groups"])
    ]
    return tensors, {"state": {n: tree for n, tree in trees.items() if tree != told.get(n)}, "groups": groups}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    rest: dict[str, Any],
    owns: Callable[[str], bool] = lambda name: True,
) -> None:
    """Give `optimizer` the state and hyper-parameters that `pack_optimizer` took, bit for bit.

    Tensors are asked for as they are needed: of the parameters for which `owns(name)` holds, and of the groups.
    Raises CheckpointError if the groups do not have the same parameters.
    """
    names = group_names(optimizer)
    flat = [name for group in names for name in group]
    options = {frozenset(group["names"]): group["options"] for group in rest["groups"]}
    _check_same_groups(names, list(options))
    trees = state_trees(tensors, rest["state"])
    copy = functools.cache(lambda key: tensors[key].clone())  # training must not write into the checkpoint
    state = {name: _attach(trees[name], copy) for name in flat if name in trees and owns(name)}

    current = state_here(optimizer)
    groups = [
        _merge(group, _attach(options[frozenset(named)], copy))
        for group, named in zip(current["param_groups"], names, strict=True)
    ]
    by_index = {index: state[name] for index, name in enumerate(flat) if name in state}
    optimizer.load_state_dict({**current, "state": by_index, "param_groups": groups})

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(flat, parameters, strict=True):
        if name in state:
            optimizer.state[parameter] = _exact(state[name], optimizer.state[parameter])


def state_here(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict, of our own methods without zeros for what is idle."""
    return optimizer.rank_state_dict() if isinstance(optimizer, Method) else optimizer.state_dict()


def state_trees(keys: Iterable[str], written: dict[str, Any]) -> dict[str, Any]:
    """By parameter its state, with {"__tensor__": key} in the place of each tensor.

    Args:
        keys: Of the tensors, "PARAMETER/KEY".
        written: The trees in the JSON; those that are not empty win. Runs of one process used to write all of them.
    """
    told: dict[str, Any] = {}
    for key in keys:
        name, _, entry = key.rpartition("/")
        told.setdefault(name, {})[entry] = {"__tensor__": key}
    return told | {name: tree for name, tree in written.items() if tree or name not in told}


def group_names(optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of every group's parameters; positions over all groups where there are no names."""
    names, count = [], 0
    for group in optimizer.param_groups:
        positions = [str(count + i) for i in range(len(group["params"]))]
        names.append(list(group.get("names") or group.get("param_names") or positions))
        count += len(positions)
    flat = [name for group in names for name in group]
    if len(flat) != count or len(set(flat)) != count:
        raise CheckpointError("the optimizer's groups need one unique name for each parameter to be saved by name")
    return names


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in IDENTITY}


def _merge(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The group with its saved hyper-parameters; tensors (a learning rate) stay on the device where they are."""
    for key, now in group.items():
        if isinstance(now, Tensor) and isinstance(saved.get(key), Tensor):
            saved[key] = saved[key].to(now.device)
    return {**group, **saved}


def _check_same_groups(names: list[list[str]], saved: list[frozenset[str]]) -> None:
    present = [frozenset(group) for group in names]
    if sorted(map(sorted, present)) == sorted(map(sorted, saved)):
        return
    here, there = frozenset().union(*present), frozenset().union(*saved)
    raise CheckpointError(
        f"the optimizer's {len(present)} groups do not have the parameters of the checkpoint's {len(saved)}: "
        f"missing {sorted(there - here)[:5]}, new {sorted(here - there)[:5]}"
        f"{'' if here != there else ', the same parameters in other groups'}. "
        "Resume with the configuration that wrote it, or start anew in another folder"
    )


def _detach(value: Any, key: str, tensors: dict[str, Tensor], keys: dict[int, str]) -> Any:
    """The tree with every tensor replaced by {"__tensor__": key of it in `tensors`}."""
    if isinstance(value, Tensor):
        if id(value) not in keys:
            if key in tensors:
                raise CheckpointError(f"two tensors of the optimizer are called {key!r}")
            keys[id(value)], tensors[key] = key, value
        return {"__tensor__": keys[id(value)]}
    if isinstance(value, dict):
        return {name: _detach(item, f"{key}/{name}", tensors, keys) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_detach(item, f"{key}/{i}", tensors, keys) for i, item in enumerate(value))
    return value


def _attach(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """The tree with its tensors again."""
    if isinstance(value, dict):
        if list(value) == ["__tensor__"]:
            return tensor(value["__tensor__"])
        return {name: _attach(item, tensor) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_attach(item, tensor) for item in value)
    return value


def _exact(saved: Any, loaded: Any) -> Any:
    """What was saved, on the devices where `load_state_dict` put it."""
    if isinstance(saved, Tensor):
        return loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
    if isinstance(saved, dict):
        return {**loaded, **{key: _exact(item, loaded[key]) for key, item in saved.items()}}
    if isinstance(saved, list | tuple):
        return type(saved)(_exact(item, there) for item, there in zip(saved, loaded, strict=True))
    return saved
