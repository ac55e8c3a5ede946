"""Sections of a configuration that are chosen by name: `optim.name=frugal` brings the keys of FRUGAL, and no others.

A section is looked up in its registry when a value arrives, not when the configuration is defined, so that what a
plugin registers has its place like anything else.
One surprise: validating a list of plugins runs them, because what they register may be asked for in the next line.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from thriftlab.data.errors import DataError
from thriftlab.data.paths import FilePath
from thriftlab.data.plugins import load_plugin
from thriftlab.optim.core.hyper import Later, model_of

T = TypeVar("T")
Plumbing = Annotated[T, "plumbing"]
Speed = Annotated[T, "speed"]
Steps = Annotated[int, Field(ge=0)]

config_model = functools.cache(model_of)  # one class per method, so that equal configurations are equal


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def without_off(section: Section, dump: SerializerFunctionWrapHandler, *keys: str) -> dict[str, Any]:
    """A section as it is written, without those of its keys that are at their default: so the fingerprints of runs
    stay what they were before there were such keys."""
    off = [key for key in keys if getattr(section, key) == type(section).model_fields[key].default]
    return {key: value for key, value in dump(section).items() if key not in off}


class Choice(Section):
    """A section whose `name` picks an entry of a registry and whose further keys are that entry's hyper-parameters."""

    name: str

    @model_serializer(mode="wrap")
    def without_what_came_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields.items()
        return without_off(self, dump, *(key for key, field in fields if Later() in field.metadata))

    def hyperparameters(self) -> dict[str, Any]:
        """What the chosen thing takes, without what every choice of this kind has."""
        shared = cast(type[Choice], type(self).__base__).model_fields
        return {key: getattr(self, key) for key in type(self).model_fields if key not in shared}


class Registry:
    """Annotates a Choice: values are validated by the model of the entry that they name.

    Args:
        entries: name -> factory, read at every validation.
        base: the keys that all entries share.
        default: the entry of a value that names none.
    """

    def __init__(self, entries: Mapping[str, Callable], base: type[Choice], default: str):
        self.entries, self.base, self.default = entries, base, default

    def model(self, name: str) -> type[Choice]:
        return config_model(self.entries[name], name, self.base)

    def validate(self, value: Any) -> Choice:
        if isinstance(value, Choice):
            value = value.model_dump()
        if not isinstance(value, dict):
            raise PydanticCustomError("model_type", "is a section")
        name = value.get("name", self.default)
        if name not in list(self.entries):
            raise PydanticCustomError("unknown_name", "unknown name", {"name": name, "known": list(self.entries)})
        return self.model(name).model_validate(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        kind: Any = Annotated[self.base, BeforeValidator(self.validate), SerializeAsAny()]
        return handler.generate_schema(kind)


def regular_expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{error}, in a regular expression") from None
    return pattern


Pattern = Annotated[str, AfterValidator(regular_expression)]


def run_plugin(path: str) -> str:
    try:
        load_plugin(path)
    except DataError as error:
        raise PydanticCustomError("plugin", "{error}", {"error": str(error)}) from error
    return path


Plugin = Annotated[FilePath, AfterValidator(run_plugin)]


class Plugins(Section):
    """The plugins alone, to run them before anything else is looked at."""

    plugins: tuple[Plugin, ...] = ()
