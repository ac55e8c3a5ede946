"""JSON that comes back equal: tuples, torch dtypes, nan and infinities are tagged with what they were.

(1, nan)  <->  {"__tuple__": [1, {"__float__": "nan"}]}
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from thriftlab.data.errors import CheckpointError

DECODERS: dict[str, Callable[[Any], Any]] = {
    "__float__": float,
    "__tuple__": tuple,
    "__dtype__": lambda name: _dtype(getattr(torch, name)),
}


def to_json(value: Any) -> str:
    """Text that `from_json` turns back into an equal value."""
    return json.dumps(_tag(value, "meta"), indent=1, allow_nan=False)


def from_json(text: str | bytes) -> Any:
    """ValueError for what `to_json` did not write."""
    try:
        return json.loads(text, object_hook=_untag)
    except (AttributeError, RecursionError, TypeError) as error:
        raise ValueError(f"no JSON of a checkpoint: {error}") from None


def _dtype(value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{value!r} is no dtype")
    return value


def _tag(value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": repr(float(value))}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.dtype):
        return {"__dtype__": str(value).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"__tuple__": _tag(list(value), where)}
    if isinstance(value, list):
        return [_tag(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _tag(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(f"{where} is {value!r}, which JSON cannot hold: use numbers, text, lists, tuples and dicts")


def _untag(value: dict[str, Any]) -> Any:
    (key, content), *rest = value.items() or [("", None)]
    return DECODERS[key](content) if key in DECODERS and not rest else value
