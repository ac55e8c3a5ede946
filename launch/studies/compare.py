"""`thriftlab compare`: from the command line to a study of methods, which share a base and have overrides of their own.

    thriftlab compare adamw lost+frugal --seeds 5 --budget tokens=1e7 model.preset=micro optim.weight_decay=0.1 \\
        lost+frugal.gap=50

A METHOD is the parts of a method joined by "+". `optim.KEY` is meant for every method that has such a part and
`METHOD.KEY` for one method; `METHOD.SECTION.KEY` says of which part, where two have the key. Where a file names a part,
as one for `thriftlab train` does, the keys of that section are for methods with that part alone.
"""

import functools
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, create_model

from thriftlab.data.errors import ConfigError
from thriftlab.data.paths import FilePath
from thriftlab.data.prepare.request import split_commas
from thriftlab.launch.studies.arms import Arm, StudyRequest, is_method, known_methods, present
from thriftlab.train.config.choice import Plugins, Section
from thriftlab.train.config.help import describe, describe_choice, nearest
from thriftlab.train.config.mistakes import KeyPath
from thriftlab.train.config.parse import Settings, validate
from thriftlab.train.config.schema import SEAMS, RunConfig

Rate = Annotated[float, Field(gt=0)]
Grid = Annotated[tuple[Rate, ...], Field(min_length=1), BeforeValidator(split_commas)]


class CompareConfig(Section):
    """How the methods are compared."""

    seeds: int = Field(3, ge=1, description="runs of each method, paired by initialisation and order of the data")
    lr_grid: Grid | None = Field(
        None,
        description="learning rates, as 3e-4,1e-3: every method first picks its own in short trials; null: none",
    )
    jobs: int | None = Field(None, ge=1, description="runs at the same time; null: one a GPU, or what the cores allow")
    out: FilePath = Field("runs/compare", min_length=1, description="folder of the study")


@dataclass(frozen=True)
class Comparison:
    """What was asked for, validated. `overrides` holds what was set for each method by section, without defaults."""

    methods: dict[str, dict[str, str]]  # METHOD -> section -> name
    base: RunConfig
    overrides: dict[str, dict[str, dict[str, Any]]]
    options: CompareConfig

    def request(self) -> StudyRequest:
        o = self.options
        shared = {key: value for key, value in self.base.model_dump(mode="json").items() if key not in SEAMS}
        arms = [
            Arm(method, {s: {"name": name, **self.overrides[method][s]} for s, name in parts.items()}, o.seeds,
                tuple(sorted(set(o.lr_grid or ()))))
            for method, parts in self.methods.items()
        ]  # fmt: skip
        return StudyRequest(arms, shared, shared["budget"], o.out, o.jobs)


def describe_keys() -> str:
    """The keys of `thriftlab compare` that `thriftlab train` does not have."""
    parts = [line for section, registry in SEAMS.items() for line in describe_choice(section, registry)]
    return "\n".join([describe(CompareConfig), "", *parts])


def make_request(settings: Settings) -> StudyRequest:
    """The study that the command line and its files ask for. ConfigError for what does not fit."""
    return make_comparison(settings).request()


def make_comparison(settings: Settings) -> Comparison:
    validate(Plugins, settings.pick(["plugins"]))
    methods = known_methods(settings.words)
    options = [*CompareConfig.model_fields]
    of_methods = [key for key in settings.tree if key in SEAMS or key not in RunConfig.model_fields and is_method(key)]
    return Comparison(
        methods,
        validate(RunConfig, settings.drop([*options, *of_methods])),
        method_overrides(methods, settings),
        validate(CompareConfig, settings.pick(options)),
    )


def method_overrides(methods: dict[str, dict[str, str]], settings: Settings) -> dict[str, dict[str, dict[str, Any]]]:
    """What `SECTION.KEY` and `METHOD.KEY` set, for each method and section, without defaults."""
    by_section = {section: Settings() for section in SEAMS}
    for path, source in settings.origin.items():
        value = functools.reduce(dict.__getitem__, path, settings.tree)
        for method, section, key in targets(path, source, methods, settings):
            by_section[section].put((method, *key), value, source)
    found: dict[str, dict[str, dict[str, Any]]] = {method: {} for method in methods}
    for section, given in by_section.items():
        registry = SEAMS[section]
        fields = {m: (registry.model(parts[section]), Field({}, validate_default=True)) for m, parts in methods.items()}
        built = validate(create_model("Methods", __base__=Section, **fields), given)  # type: ignore[call-overload]
        for method in methods:
            found[method][section] = getattr(built, method).model_dump(mode="json", exclude_unset=True)
    return found


def targets(
    path: KeyPath, source: str, methods: dict[str, dict[str, str]], settings: Settings
) -> list[tuple[str, str, KeyPath]]:
    """(METHOD, section, key) of every method that a leaf of the settings is for; none where it is for all runs."""
    if path[0] in SEAMS:
        return section_targets(path, source, methods, settings)
    if path[0] in RunConfig.model_fields or path[0] in CompareConfig.model_fields or not is_method(path[0]):
        return []
    if path[0] not in methods:
        raise ConfigError(
            f"{source}: {'.'.join(path)} is for a method that is not compared; compared: {', '.join(methods)}"
        )
    return [(path[0], *method_target(path, source, methods[path[0]]))]


def method_target(path: KeyPath, source: str, parts: dict[str, str]) -> tuple[str, KeyPath]:
    """Section and key of METHOD.KEY or METHOD.SECTION.KEY."""
    method, *rest = path
    if len(rest) > 1 and rest[0] in SEAMS:
        section, takes = rest[0], keys_taken(rest[0], parts)
        if rest[1] not in takes:
            names = ", ".join(takes) + nearest(rest[1], takes)
            raise ConfigError(f"{source}: unknown key {'.'.join(path)!r} with {parts[section]}, which takes {names}")
        return section, tuple(rest[1:])
    sections = present(parts)
    takers = [section for section in sections if rest and rest[0] in keys_taken(section, parts)]
    if len(takers) > 1:
        ways = " or ".join(f"{method}.{section}.{rest[0]}" for section in takers)
        raise ConfigError(f"{source}: {'.'.join(path)} may be of two parts; write {ways}")
    nearby = [s for s in sections if rest and nearest(rest[0], keys_taken(s, parts))]
    return (takers or nearby or sections)[0], tuple(rest)


def section_targets(
    path: KeyPath, source: str, methods: dict[str, dict[str, str]], settings: Settings
) -> list[tuple[str, str, KeyPath]]:
    """SECTION.KEY: the methods that have something to set there, or those with the part that the file names."""
    section, *rest = path
    key, tree = ".".join(path), settings.tree[section]
    name = tree.get("name") if isinstance(tree, dict) else None
    if name:
        concerned = [method for method, parts in methods.items() if parts[section] == name]
    else:
        concerned = [method for method, parts in methods.items() if section in present(parts)]
    if not concerned:
        whom = repr(name) if name else f"a {section}"
        raise ConfigError(f"{source}: {key} is for {whom}, which is not compared; compared: {', '.join(methods)}")
    if rest == ["name"]:
        return []
    for method in concerned:
        takes = keys_taken(section, methods[method])
        if rest and rest[0] not in takes:
            hint = nearest(rest[0], takes) or f"; METHOD.{rest[0]} is for one method"
            raise ConfigError(f"{source}: unknown key {key!r} with {method}, which takes {', '.join(takes)}{hint}")
    return [(method, section, tuple(rest)) for method in concerned]


def keys_taken(section: str, parts: dict[str, str]) -> dict[str, Any]:
    """The keys that a method's part takes."""
    return dict(SEAMS[section].model(parts[section]).model_fields)
