"""What is wrong with a configuration, in one line: who said it, the key, the value, and what would be right.

For example: base.yaml: unknown key 'model.dimm'; did you mean 'model.dim'?
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from thriftlab.train.surface import keys, nearest, registry_of, words

Path = tuple[str, ...]


def explain(model: type[BaseModel], tree: dict[str, Any], origin: dict[Path, str], error: ErrorDetails) -> str:
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
    field = field_at(fields, path)
    if field and error["type"] not in ("value_error", "plugin"):
        if isinstance(value, dict):
            return f"{source}: {key} is not a section and has no {', '.join(map(repr, value))}; it takes {words(field)}"
        return f"{source}: {key} = {value!r} is not possible; it takes {words(field)}"
    said = f"{key} = {value!r}: " if field else f"{key}: " if key else ""
    return f"{source}: {said}{error['msg'].removeprefix('Value error, ')}"


def unknown_key(model: type[BaseModel], tree: dict[str, Any], origin: dict[Path, str], path: Path) -> str:
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


def field_at(fields: dict[str, FieldInfo], path: Path) -> FieldInfo | None:
    """The field that the path, which may go on into a list or a union, is in."""
    prefixes = (".".join(path[:n]) for n in range(len(path), 0, -1))
    return next((fields[key] for key in prefixes if key in fields), None)


def sources(origin: dict[Path, str], path: Path) -> str:
    """Who set the value at the path, or the values of the section."""
    found = [source for leaf, source in origin.items() if leaf[: len(path)] == path[: len(leaf)]]
    return ", ".join(dict.fromkeys(found)) or "default"


def dotted(path: Sequence[str | int]) -> str:
    """`plugins[0]`, `optim.lr`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
