"""Parameter groups: chosen by name or role, completed with names, matched with those of a file; and names in words."""

import difflib
import functools
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

ROLES = ("matrix", "input", "output", "vector")  # the last: all that is none of the others


def split_groups(
    model: Any, include: Sequence[str], exclude: Sequence[str] = (), roles: bool = False
) -> list[dict[str, Any]]:
    """Parameter groups by name: `[{"params", "names", "split"}, ...]`, every parameter that takes gradients in one.

    The matrices with a name that a pattern of `include` is found in, and none of `exclude`, are split. A tied parameter
    appears once, under its first name; a pattern may match any of its names. A pattern that matches none of the model's
    parameters is a ValueError.

    Args:
        roles: make a group for each role, and write it down as `role`: the methods with `roles` take embedding and head
            by themselves.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
        tensors[id(p)] = p
    every = [name for tied in names.values() for name in tied]
    for pattern in (*include, *exclude):
        if not any(re.search(pattern, name) for name in every):
            raise ValueError(f"pattern {pattern!r} matches no parameter; near: {', '.join(near(pattern, every))}")

    def wanted(key: int) -> bool:
        found = [any(re.search(p, name) for p in patterns for name in names[key]) for patterns in (include, exclude)]
        return tensors[key].ndim == 2 and found == [True, False]

    found: dict[tuple[bool, str], list[int]] = {}  # in this order
    if roles:
        ends = embedding_and_head(model)
        role = {key: ends.get(key, "matrix" if wanted(key) else "vector") for key in names}
        found = {(kind == "matrix", kind): [key for key in names if role[key] == kind] for kind in ROLES}
    else:
        found = {(split, ""): [key for key in names if wanted(key) == split] for split in (True, False)}
    groups = []
    for (split, kind), keys in found.items():
        if keys := [key for key in keys if tensors[key].requires_grad]:
            group = {"params": [tensors[key] for key in keys], "names": [names[key][0] for key in keys], "split": split}
            groups.append({**group, "role": kind} if roles else group)
    return groups


def embedding_and_head(model: nn.Module) -> dict[int, str]:
    """Roles of the weights of embeddings and of the Linear that makes the logits, by their ids.

    The weight of every `nn.Embedding` is input. That of the last Linear with an output for each row of one of them is
    output, and so is a tied weight, which is both.
    """
    modules = list(model.modules())
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    sizes = {module.num_embeddings for module in embeddings}
    heads = [module for module in modules if isinstance(module, nn.Linear) and module.out_features in sizes]
    found = {id(module.weight): "input" for module in embeddings}
    return found | {id(module.weight): "output" for module in heads[-1:]}


def table_patterns(model: nn.Module) -> list[str]:
    """Regular expressions of the names of these weights, with which they are matrices among the others."""
    tables = embedding_and_head(model)
    return [f"^{re.escape(name)}$" for name, p in model.named_parameters() if id(p) in tables]


def role_of(group: dict[str, Any]) -> str:
    """The role of a group's matrices; without one, those that are split are matrices."""
    return group.get("role") or ("matrix" if group["split"] else "vector")


def check_role(group: dict[str, Any]) -> None:
    if role_of(group) not in ROLES:
        raise ValueError(f"role={group['role']!r}: a group of parameters is one of {', '.join(ROLES)}")


def near(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that look most like what the pattern may have meant."""
    words = re.sub(r"\W+", ".", pattern).strip(".")
    return difflib.get_close_matches(words, names, n=3, cutoff=0.0)


def named_tensors(group: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, list]:
    """`params` and `names` of a group of tensors or `(name, tensor)` pairs; without names they count on from `others`.

    What torch would call `param_names` is there as well, as it was given. Such names need not be unique, since two
    modules have like ones; from the second on, `names` has "weight#2" for "weight".
    """
    refuse_set(group["params"])
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    local, params = unzipped(params) if any(not isinstance(p, Tensor) for p in params) else (None, params)
    local = group.get("param_names") if local is None else local
    taken = [name for other in others for name in other["names"]]
    if group.get("names") is not None:
        names = list(group["names"])
    elif local is not None:
        names = unique(list(local), taken)
    else:
        names = [str(len(taken) + i) for i in range(len(params))]
    for given in (names, local if local is not None else names):
        if len(given) != len(params):
            raise ValueError(f"a parameter group has {len(params)} parameters and {len(given)} names")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter group lists a parameter twice; list a tied parameter once")
    if len({*taken, *names}) < len(taken) + len(names):
        doubles = {name for name in names if [*taken, *names].count(name) > 1}
        raise ValueError(f"two parameters have one name: {sorted(doubles)}")
    return {"params": params, "names": names, **({} if local is None else {"param_names": list(local)})}


def refuse_set(params: Any) -> None:
    """TypeError for a set: names, and with them randomness and the state of a file, would change from run to run."""
    if isinstance(params, set | frozenset):
        raise TypeError("parameters in a set have no order; use a list")


def unzipped(pairs: list[Any]) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of `(name, tensor)` pairs."""
    for i, pair in enumerate(pairs):
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            what = f"a tensor {tuple(pair.shape)}" if isinstance(pair, Tensor) else f"{pair!r:.60}"
            error = ValueError if isinstance(pair, Tensor) else TypeError  # as in torch
            raise error(
                f"parameter {i} of the group is {what}; a group has tensors, or (name, tensor) pairs for all of them"
            )
    return [name for name, _ in pairs], [p for _, p in pairs]


def unique(names: list[str], taken: list[str]) -> list[str]:
    """The names with "#2", "#3" ... behind those that are there already."""
    found: list[str] = []
    for name in names:
        count, candidate = 1, name
        while candidate in taken or candidate in found:
            count += 1
            candidate = f"{name}#{count}"
        found.append(candidate)
    return found


SWITCHES = ("foreach", "fused", "capturable", "differentiable", "amsgrad")  # of torch's optimizers


def refuse_switches(kind: type, values: dict[str, Any]) -> None:
    """ValueError for a switch of torch's optimizers that is on; off it says what is the case."""
    if on := [switch for switch in SWITCHES if values.get(switch)]:
        raise ValueError(f"{kind.__name__}: {on[0]}={values[on[0]]!r} is not supported; leave it out")


def without_switches(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that also takes torch's switches, where it does not have them itself, if they are off."""
    own = inspect.signature(init).parameters

    @functools.wraps(init)
    def call(self: Any, *args: Any, **values: Any) -> None:
        switches = {key: values.pop(key) for key in SWITCHES if key in values and key not in own}
        refuse_switches(type(self), switches)
        init(self, *args, **values)

    return call


def match_groups(own: list[dict], saved: list[dict]) -> list[dict]:
    """The saved groups in the order of our own: by name where both have names, else by position as in torch.

    Where our own are positions, the saved names are taken over, for randomness depends on them.
    """
    if len(own) != len(saved):
        raise ValueError(f"the saved optimizer state has {len(saved)} parameter groups, this optimizer has {len(own)}")
    saved = with_names(saved)
    if not (_named(own) and _named(saved)):
        for o, s in zip(own, saved, strict=True):
            if len(o["params"]) != len(s["params"]):
                raise ValueError(
                    f"a saved parameter group has {len(s['params'])} parameters, and the size of the optimizer's is "
                    f"{len(o['params'])}, from {o['names'][:1]} on"
                )
        return [{**s, "names": (s if _named(saved) else o)["names"]} for o, s in zip(own, saved, strict=True)]
    by_names = {frozenset(group["names"]): group for group in saved}
    groups = []
    for group in own:
        found = by_names.get(frozenset(group["names"]))
        if found is None:
            strangers = set(group["names"]) ^ {name for s in saved for name in s["names"]}
            raise ValueError(f"the saved optimizer state has other parameter groups; for example {min(strangers)!r}")
        index = dict(zip(found["names"], found["params"], strict=True))
        groups.append({**found, "names": group["names"], "params": [index[name] for name in group["names"]]})
    return groups


def with_names(groups: list[dict]) -> list[dict]:
    """Saved groups whose `names` are torch's `param_names` where there are no others."""
    taken: list[str] = []
    found = []
    for group in groups:
        if "names" not in group and "param_names" in group:
            group = {**group, "names": unique(list(group["param_names"]), taken)}
        taken += group.get("names", [])
        found.append(group)
    return found


def _named(groups: list[dict]) -> bool:
    return all("names" in group and not all(name.isdigit() for name in group["names"]) for group in groups)


def by_reason(left: dict[str, str]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in left.items():
        reasons.setdefault(reason, []).append(name)
    return "; ".join(f"{reason}: {shortened(names)}" for reason, names in reasons.items())


def shortened(names: list[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
