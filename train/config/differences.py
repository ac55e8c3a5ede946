"""How a run in a folder differs from the one that is asked for: the keys, with their old and new values, in words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from thriftlab.train.config.schema import RunConfig, counted

SHOWN = 4  # keys; another method has many


def what_changed(out: Path, config: RunConfig) -> str:
    """`differences` from the run in a folder, as its config.json has it."""
    try:
        past = json.loads((out / "config.json").read_bytes())
    except (OSError, ValueError):
        return f"{out}/config.json, which would say what differs, is missing or damaged"
    return differences(past, config)


def differences(past: dict[str, Any], config: RunConfig) -> str:
    """The keys that count and differ; where none does, what else may: contents that are no values."""
    new = dict(leaves(counted(config)))
    try:
        old = dict(leaves(counted(RunConfig.model_validate(past))))
    except ValidationError:  # of an older version
        old = {key: value for key, value in leaves(past) if key in new}
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    words = [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in keys[:SHOWN]]
    more = [f"and {len(keys) - SHOWN} more"] if len(keys) > SHOWN else []
    return ", ".join(words + more) or f"other data, in {' or '.join(contents(config))}: no key differs"


def contents(config: RunConfig) -> Iterator[str]:
    """What counts by its content."""
    yield f"data.path = {config.data.path}"
    yield from (f"plugin {path}" for path in config.plugins)
    if reference := getattr(config.signal, "reference", None):
        yield f"signal.reference = {reference}"


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, f"{key}.{name}" if key else name)
    else:
        yield key, tree
