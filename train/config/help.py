"""The keys of a configuration: their names, their types in words, and the `--help` text made of them.

A section chosen by name has other keys under another name, so the keys depend on the tree of values.
"""

import difflib
import json
import textwrap
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from thriftlab.train.config.choice import Registry

WIDTH, COLUMN = 100, 40
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
PLAIN = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}


def registry_of(field: FieldInfo) -> Registry | None:
    return next((mark for mark in field.metadata if isinstance(mark, Registry)), None)


def entries(field: FieldInfo, value: Any) -> dict[str, tuple[type[BaseModel], Any]]:
    """The sections below a field, as suffix of the key -> (model, value); nothing for a plain value."""
    value = value if isinstance(value, dict) else {}
    if registry := registry_of(field):
        name = value.get("name", registry.default)
        return {"": (registry.model(name if name in list(registry.entries) else registry.default), value)}
    if is_model(field.annotation):
        return {"": (field.annotation, value)}
    if get_origin(field.annotation) is dict and is_model(get_args(field.annotation)[1]):
        return {f".{name}": (get_args(field.annotation)[1], part) for name, part in (value or {"NAME": {}}).items()}
    return {}


def keys(model: type[BaseModel], tree: Any, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key of the model with its field; where names are to be chosen, as chosen in the tree of values."""
    tree = tree if isinstance(tree, dict) else {}
    for name, field in model.model_fields.items():
        yield from keys_below(prefix + name, field, tree.get(name))


def keys_below(key: str, field: FieldInfo, value: Any = None) -> Iterator[tuple[str, FieldInfo]]:
    sections = entries(field, value)
    for suffix, (section, part) in sections.items():
        yield from keys(section, part, f"{key}{suffix}.")
    if not sections:
        yield key, field


def all_keys(model: type[BaseModel]) -> list[str]:
    """Every key there is, once, sorted; those of one choice only as `optim.gap (optim.name=frugal)`."""
    found = {key for key, _ in keys(model, {})}
    for name, field in model.model_fields.items():
        if registry := registry_of(field):
            found = {key for key in found if not key.startswith(f"{name}.")}
            found |= {f"{name}.{key}" for key in registry.base.model_fields}
            for entry in registry.entries:
                found |= {f"{name}.{key} ({name}.name={entry})" for key in own(registry, entry)}
    return sorted(found)


def own(registry: Registry, entry: str) -> dict[str, FieldInfo]:
    """The fields that an entry adds to what all entries have."""
    return {k: f for k, f in registry.model(entry).model_fields.items() if k not in registry.base.model_fields}


def nearest(word: str, options: Iterable[str]) -> str:
    """What the user may have meant, as the end of a sentence: `; did you mean 'x'?` or nothing."""
    options = list(options)
    ends = [option for option in options if option.split(".")[-1] == word]
    found = ends or difflib.get_close_matches(word, options, 1)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def words(field: FieldInfo) -> str:
    """What a field takes: `integer >= 1 or null`, `fp32 | bf16`, `[number >= 0, number >= 0]`."""
    return type_words(field.annotation, field.metadata)


def type_words(kind: Any, marks: Iterable[Any] = ()) -> str:
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        marks = [*marks, *(m for mark in more for m in (mark.metadata if isinstance(mark, FieldInfo) else [mark]))]
    bounds = [f"{sign} {getattr(m, name):g}" for m in marks for name, sign in BOUNDS.items() if hasattr(m, name)]
    inner = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_words(member, marks if member is not type(None) else ()) for member in inner)
    if get_origin(kind) is Literal:
        return " | ".join(map(text, inner))
    if get_origin(kind) is dict:
        return f"{{NAME: {type_words(inner[1])}}}"
    if get_origin(kind) in (tuple, list):
        many = get_origin(kind) is list or inner[-1] is ...
        return f"list of {type_words(inner[0])}" if many else f"[{', '.join(map(type_words, inner))}]"
    return " ".join([PLAIN.get(kind, getattr(kind, "__name__", str(kind))), " and ".join(bounds)]).rstrip()


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def describe(model: type[BaseModel]) -> str:
    """All keys by section: key=default, what it means, what it takes."""
    lines = [line(name, field) for name, field in model.model_fields.items() if not entries(field, {})]
    for name, field in model.model_fields.items():
        if registry := registry_of(field):
            lines += ["", *describe_choice(name, registry)]
        elif entries(field, {}):
            section = field.annotation if is_model(field.annotation) else None
            default = field.get_default(call_default_factory=True) if section else None
            lines += ["", *title(name, section.__doc__ if section else field.description)]
            lines += [line(key, below, default) for key, below in keys_below(name, field)]
    return "\n".join(lines)


def describe_choice(name: str, registry: Registry) -> list[str]:
    shared = [line(f"{name}.{key}", field) for key, field in registry.base.model_fields.items() if key != "name"]
    lines = [
        *title(name, registry.base.__doc__),
        row(f"{name}.name={registry.default}", " | ".join(registry.entries)),
        *shared,
    ]
    for entry in registry.entries:
        lines += title(f"  {name}.name={entry}", registry.model(entry).__doc__)
        lines += [line(f"{name}.{key}", field, indent=4) for key, field in own(registry, entry).items()]
    return lines


def title(name: str, summary: str | None) -> list[str]:
    return textwrap.wrap(f"{name}: {summary or ''}".removesuffix(": "), WIDTH, subsequent_indent="    ")


def line(key: str, field: FieldInfo, section: Any = None, indent: int = 2) -> str:
    default = getattr(section, key.split(".")[-1], field.get_default(call_default_factory=True))
    shown = "" if field.is_required() else text(default)
    return row(f"{key}={shown}", f"{(field.description or '').rstrip('.')} ({words(field)})".lstrip(), indent)


def row(left: str, right: str, indent: int = 2) -> str:
    head = " " * indent + left
    wrapped = textwrap.wrap(right, WIDTH - COLUMN, break_on_hyphens=False)
    if len(head) >= COLUMN - 1:
        return "\n".join([head, *(" " * COLUMN + part for part in wrapped)])
    return "\n".join([head.ljust(COLUMN) + wrapped[0], *(" " * COLUMN + part for part in wrapped[1:])])


def is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
