"""The arguments of `thriftlab compare`: which methods, how often, one base configuration and what differs by method.

    thriftlab compare adamw frugal --seeds 5 --budget tokens=1e7 model.preset=micro optim.weight_decay=0.1 frugal.gap=50

`optim.KEY` is meant for every method and `METHOD.KEY` for one. One surprise: where a file names a method, as one for
`thriftlab train` does, the `optim` keys are that method's alone.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model

from thriftlab.optim import METHODS
from thriftlab.train import surface
from thriftlab.train.choice import Plugins, Section
from thriftlab.train.config import OPTIM, RunConfig
from thriftlab.train.errors import ConfigError
from thriftlab.train.settings import COMMAND_LINE, Settings, build, read


def split_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Rate = Annotated[float, Field(gt=0)]


class CompareConfig(Section):
    """How the methods are compared."""

    seeds: int = Field(3, ge=1, description="runs of each method, paired by initialisation and order of the data")
    lr_grid: Annotated[tuple[Rate, ...], Field(min_length=1), BeforeValidator(split_commas)] | None = Field(
        None,
        description="learning rates, as 3e-4,1e-3: every method first picks its own in short trials; null: none",
    )
    jobs: int | None = Field(None, ge=1, description="runs at the same time; null: what the machine bears")
    out: str = Field("runs/compare", min_length=1, description="folder of the study")


@dataclass(frozen=True)
class Comparison:
    """What was asked for, validated. `overrides` holds what was set for each method, without defaults."""

    methods: list[str]
    base: RunConfig
    overrides: dict[str, dict[str, Any]]
    options: CompareConfig


def describe() -> str:
    """The keys of `thriftlab compare` that `thriftlab train` does not have."""
    keys = surface.describe(CompareConfig)
    methods = surface.describe_choice("optim", OPTIM)
    return "\n".join([keys, "", *methods])


def arguments(argv: Sequence[str]) -> Comparison:
    """The command line and its files, validated. ConfigError as in `settings.load`."""
    return comparison(read(argv))


def comparison(settings: Settings) -> Comparison:
    """The same of what has been read."""
    build(Plugins, settings.pick(["plugins"]))
    methods = known_methods(settings.words)
    options = [*CompareConfig.model_fields]
    return Comparison(
        methods,
        build(RunConfig, settings.drop([*options, "optim", *METHODS])),
        method_overrides(methods, settings),
        build(CompareConfig, settings.pick(options)),
    )


def known_methods(words: Sequence[str]) -> list[str]:
    if not words:
        raise ConfigError(f"{COMMAND_LINE}: name the methods to compare, the baseline first: {', '.join(METHODS)}")
    for word in words:
        if word not in METHODS:
            known = ", ".join(METHODS) + surface.nearest(word, METHODS)
            raise ConfigError(f"{COMMAND_LINE}: method {word!r} is unknown; there are {known}")
    if len(set(words)) < len(words):
        raise ConfigError(f"{COMMAND_LINE}: a method is named twice: {' '.join(words)}")
    return list(words)


def method_overrides(methods: list[str], settings: Settings) -> dict[str, dict[str, Any]]:
    """What `optim.KEY` and `METHOD.KEY` set, for each method and without defaults."""
    own = Settings()
    for path, source in settings.origin.items():
        for method in meant(path, source, methods, settings):
            own.put((method, *path[1:]), functools.reduce(dict.__getitem__, path, settings.tree), source)
    fields = {method: (OPTIM.model(method), Field({}, validate_default=True)) for method in methods}
    built = build(create_model("Methods", __base__=Section, **fields), own)  # type: ignore[call-overload]
    return {method: getattr(built, method).model_dump(mode="json", exclude_unset=True) for method in methods}


def meant(path: tuple[str, ...], source: str, methods: list[str], settings: Settings) -> list[str]:
    """The methods for which a key is meant: those of `optim.KEY`, or the one of `METHOD.KEY`; none for other keys."""
    key = ".".join(path)
    if path[0] in METHODS and path[0] not in methods:
        raise ConfigError(f"{source}: {key} is for a method that is not compared; compared: {', '.join(methods)}")
    if path[0] != "optim":
        return [path[0]] if path[0] in METHODS else []
    section = settings.tree["optim"]
    name = section.get("name") if isinstance(section, dict) else None
    if name is not None and name not in methods:
        raise ConfigError(f"{source}: {key} is for {name!r}, which is not compared; compared: {', '.join(methods)}")
    if path == ("optim", "name"):
        return []
    for method in [name] if name else methods:
        takes = OPTIM.model(method).model_fields
        if len(path) > 1 and path[1] not in takes:
            hint = surface.nearest(path[1], takes) or f"; METHOD.{path[1]} is for one method"
            raise ConfigError(f"{source}: unknown key {key!r} with {method}, which takes {', '.join(takes)}{hint}")
    return [name] if name else methods
