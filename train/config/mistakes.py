"""What is wrong with a configuration, in one line: who said it, the key, the value, and what would be right.

For example: base.yaml: unknown key 'model.dimm'; did you mean 'model.dim'?
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from thriftlab.train.config.help import keys, nearest, registry_of, words

KeyPath = tuple[str, ...]


def explain(model: type[BaseModel], tree: dict[str, Any], origin: dict[KeyPath, str], error: ErrorDetails) -> str:
    """One line for one error that pydantic found in the tree.

    Args:
        origin: path of every leaf that was set -> file or command line.
    """
    path = tuple(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return unknown_key(model, tree, origin, path)
    key, value, source = dotted(error["loc"]), error["input"], sources(origin, path)
    if error["type"] == "unknown_name":
        name, known = error["ctx"]["name"], error["ctx"]["known"]
        return f"{source}: {key}.name = {name!r} is unknown; there are {', '.join(known)}{nearest(str(name), known)}"
    fields = dict(keys(model, tree))
    if error["type"] in ("model_type", "dict_type"):
        example = next((k for k in fields if k.startswith(f"{key}.")), f"{key}.NAME")
        return f"{source}: {key} = {value!r} is not a section; set its keys, as in {example}=VALUE"
    field_key = next((k for k in prefixes(path) if k in fields), "")
    if not field_key:
        return f"{source}: {key}: {said(error)}" if key else f"{source}: {said(error)}"
    takes, depth = words(fields[field_key]), field_key.count(".") + 1
    key = dotted([*path[:depth], *(part for part in error["loc"][depth:] if isinstance(part, int))])
    if error["type"] == "missing":
        return f"{sources(origin, path[:-1])}: {key} is missing; it takes {takes}"
    if error["type"] in ("value_error", "plugin"):
        return f"{source}: {key} = {value!r}: {said(error)}"
    if error["type"] == "string_unicode":
        return f"{source}: {key} = {value!r} is not UTF-8; choose another name"
    if isinstance(value, dict):
        return f"{source}: {key} is not a section and has no {', '.join(map(repr, value))}; it takes {takes}"
    return f"{source}: {key} = {value!r} is not possible; it takes {takes}"


def unknown_key(model: type[BaseModel], tree: dict[str, Any], origin: dict[KeyPath, str], path: KeyPath) -> str:
    path = next((leaf for leaf in origin if leaf[: len(path)] == path), path)
    key, fields = ".".join(path), dict(keys(model, tree))
    start = f"{sources(origin, path)}: unknown key {key!r}"
    top = model.model_fields.get(path[0])
    registry = registry_of(top) if top else None
    if registry is None or len(path) != 2:
        return start + (nearest(key, fields) or "; --help lists all keys")
    name = tree[path[0]].get("name", registry.default)
    takers = [f"{path[0]}.name={entry}" for entry in registry.entries if path[1] in registry.model(entry).model_fields]
    hint = f"; it belongs to {' or '.join(takers)}" if takers else nearest(key, fields)
    return f"{start} with {path[0]}.name={name}, which takes {', '.join(registry.model(name).model_fields)}{hint}"


def prefixes(path: KeyPath) -> Iterator[str]:
    """The path as a key, and the keys of what it is in; the path may go on into a list or a union."""
    return (".".join(path[:n]) for n in range(len(path), 0, -1))


def said(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ")


def sources(origin: dict[KeyPath, str], path: KeyPath) -> str:
    """Who set the value at the path, or the values of the section."""
    found = [source for leaf, source in origin.items() if leaf[: len(path)] == path[: len(leaf)]]
    return ", ".join(dict.fromkeys(found)) or "default"


def dotted(path: Sequence[str | int]) -> str:
    """`plugins[0]`, `optim.lr`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
