"""Parameter groups: chosen by name, completed with names, matched with those of a file; and names in words."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor


def split_groups(model: Any, include: Sequence[str], exclude: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Parameter groups by name: `[{"params", "names", "split"}, ...]`, every parameter that takes gradients in one.

    The matrices with a name that a pattern of `include` is found in, and none of `exclude`, are split. A tied parameter
    appears once, under its first name; a pattern may match any of its names. A pattern that matches none of the model's
    parameters is a ValueError.
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

    return [
        {"params": [tensors[key] for key in keys], "names": [names[key][0] for key in keys], "split": split}
        for split in (True, False)
        if (keys := [key for key in names if tensors[key].requires_grad and wanted(key) == split])
    ]


def near(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that look most like what the pattern may have meant."""
    words = re.sub(r"\W+", ".", pattern).strip(".")
    return difflib.get_close_matches(words, names, n=3, cutoff=0.0)


def named_tensors(group: dict[str, Any], start: int) -> dict[str, list]:
    """`params` and `names` of a group of tensors or `(name, tensor)` pairs; without names they count from `start`."""
    if isinstance(group["params"], set):
        raise TypeError("parameters in a set have no order; use a list")
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    names = group.get("names")
    if params and isinstance(params[0], tuple):
        names, params = map(list, zip(*params, strict=True))
    names = [str(start + i) for i in range(len(params))] if names is None else list(names)
    if len(names) != len(params):
        raise ValueError(f"a parameter group has {len(params)} parameters and {len(names)} names")
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter group lists a parameter twice; list a tied parameter once")
    return {"params": params, "names": names}


def match_groups(own: list[dict], saved: list[dict]) -> list[dict]:
    """The saved groups in the order of our own: by name where both have names, else by position as in torch."""
    if len(own) != len(saved):
        raise ValueError(f"the saved optimizer state has {len(saved)} parameter groups, this optimizer has {len(own)}")
    if not (_named(own) and _named(saved)):
        return [{**s, "names": o["names"]} for o, s in zip(own, saved, strict=True)]
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
