"""Hyper-parameters declared once: in the signature of the thing that uses them.

    def __init__(self, params, lr: Annotated[float, Field(ge=0), Search(1e-4, 1e-2)] = 1e-3, ...):

A parameter annotated with `Annotated[...]` is a hyper-parameter, of any class or function; the others (`params`,
`seed`, `progress`) are not. The one declaration serves four readers: the constructor (`check`), the configuration and
its `--help` (`model_of`, with the words of the docstring's "Args:"), and the study's search space (`search_space`).

The surprise: a hyper-parameter may also accept an object (`subspace: Literal["rows"] | Subspace`). The constructor
takes it; the configuration, which is text, sees only the part of the union that text can say.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from torch import Tensor

Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, Field(ge=1)]


BelowOne = Annotated[float, Field(ge=0, lt=1)]
Betas = tuple[BelowOne, BelowOne]


@dataclass(frozen=True)
class Search:
    """Where a study looks for a hyper-parameter: `Search(low, high, scale="log")` or `Search(choices=[...])`."""

    low: float | None = None
    high: float | None = None
    scale: Literal["log", "linear"] = "log"
    choices: Sequence[Any] = ()

    def __post_init__(self) -> None:
        interval = self.low is not None and self.high is not None and self.low < self.high
        if interval == bool(self.choices) or (interval and self.scale == "log" and self.low <= 0):  # type: ignore[operator]
            raise ValueError(f"{self}: give low < high (both above 0 on a log scale) or choices")


@dataclass(frozen=True)
class Later:
    """Marks a hyper-parameter that is younger than runs without it: a configuration does not write its default down,
    and so the fingerprints of those runs stay."""


def hyperparameters(factory: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of `factory` that are annotated with `Annotated[...]`, in the order of its signature."""
    signature = inspect.signature(factory, eval_str=True)
    return {name: p for name, p in signature.parameters.items() if get_origin(p.annotation) is Annotated}


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """What a constructor was called with, from its `locals()` on its first line."""
    return {name: value for name, value in values.items() if name not in ("self", "__class__")}


def search_space(factory: Callable) -> dict[str, Search]:
    """Hyper-parameter -> where to search it, for those that declare a `Search`."""
    metadata = {name: get_args(p.annotation)[1:] for name, p in hyperparameters(factory).items()}
    return {name: mark for name, marks in metadata.items() for mark in marks if isinstance(mark, Search)}


def model_of(factory: Callable, name: str, base: type[Model] = BaseModel) -> type[Model]:  # type: ignore[assignment]
    """The configuration of `factory`: a frozen pydantic model with `name` first and one field per hyper-parameter."""
    words = descriptions(factory)
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    for key, parameter in hyperparameters(factory).items():
        kind, *metadata = get_args(parameter.annotation)
        annotation = Annotated[(textual(kind), *metadata)]  # type: ignore[valid-type]
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[key] = (annotation, Field(default, description=words.get(key)))
    summary = (inspect.getdoc(factory) or "").split("\n\n")[0]
    return create_model(
        factory.__name__, __base__=base, __doc__=summary, __cls_kwargs__={"frozen": True, "extra": "forbid"}, **fields
    )


def check(factory: Callable, values: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among `values`, validated; ValueError names the hyper-parameter and its bound."""
    model = _constructor_model(factory)
    fields = model.model_fields
    given = {name: value for name, value in values.items() if name in fields}
    known = {name: one_element(factory, name, fields[name].annotation, value) for name, value in given.items()}
    try:
        checked = model(**known)
    except ValidationError as error:
        wrong = {str(e["loc"][0]): e for e in reversed(error.errors())}
        lines = [f"{name}={known.get(name)!r}: {e['msg']}" for name, e in sorted(wrong.items())]
        raise ValueError(f"{factory.__name__}: " + "; ".join(lines)) from None
    return {name: value if has_tensors(value) else getattr(checked, name) for name, value in known.items()}


def has_tensors(value: Any) -> bool:
    """Whether a pair, as of betas, has tensors, which may be filled with other numbers during training."""
    return isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value)


def one_element(factory: Callable, name: str, kind: Any, value: Any) -> Any:
    """The value, a tensor of one element as a 0-dim view of it; ValueError for one of more in the place of a number."""
    if has_tensors(value):
        return tuple(one_element(factory, name, kind, item) for item in value)
    if not isinstance(value, Tensor) or (Tensor in get_args(kind) and float not in get_args(kind)):  # a choice itself
        return value
    if value.numel() != 1:
        raise ValueError(f"{factory.__name__}: {name} is a tensor of shape {tuple(value.shape)}; give one number")
    return value.view(()) if value.ndim else value


def descriptions(factory: Callable) -> dict[str, str]:
    """Hyper-parameter -> its words in the docstring's "Args:" section, or in that of a base."""
    found: dict[str, str] = {}
    for kind in reversed(inspect.getmro(factory) if inspect.isclass(factory) else (factory,)):
        section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", inspect.getdoc(kind) or "", re.DOTALL | re.MULTILINE)
        text = section[1] if section else ""
        entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", text, re.DOTALL | re.MULTILINE)
        found |= {name: " ".join(words.split()) for name, words in entries}
    return {name: found[name] for name in hyperparameters(factory) if name in found}


def textual(kind: Any) -> Any:
    """`kind` without the members of its union that a configuration file cannot say (objects, functions, tensors)."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    return Union[tuple(member for member in get_args(kind) if _has_schema(member))]  # noqa: UP007


def _has_schema(kind: Any) -> bool:
    try:
        TypeAdapter(kind).json_schema()
    except PydanticUserError:
        return False
    return True


def _declared(factory: Callable) -> dict[str, inspect.Parameter]:
    """The hyper-parameters of a class and of those that it inherits from, which it may pass on without naming them."""
    if not inspect.isclass(factory):
        return hyperparameters(factory)
    ours = [kind for kind in factory.__mro__ if "__init__" in vars(kind) and not kind.__module__.startswith("torch.")]
    return {name: p for kind in reversed(ours[:-1]) for name, p in hyperparameters(kind).items()}


@functools.cache
def _constructor_model(factory: Callable) -> type[BaseModel]:
    """What the constructor accepts: like the configuration, but objects and tensors too."""
    fields: dict[str, Any] = {name: (p.annotation, None) for name, p in _declared(factory).items()}
    return create_model(factory.__name__, __config__=ConfigDict(arbitrary_types_allowed=True), **fields)
