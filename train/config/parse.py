"""Files and command line -> one validated model, or one line for every mistake.

    load(RunConfig, ["--config", "base.yaml", "optim.name=frugal", "--optim.gap=50", "--train.clip", "None"])

Later wins: file after file, then the command line, key after key; within a file a key is given once. pydantic-settings
does not serve: it builds its arguments before a plugin could register a method, knows neither
`data.sources.web.weight=2` nor the Python text of dicts and tuples that a wandb agent writes, and forgets which source
a bad value came from.
"""

import ast
import warnings
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from thriftlab.data.errors import ConfigError
from thriftlab.train.config.files import read_file, read_yaml
from thriftlab.train.config.mistakes import KeyPath, explain, sources

Model = TypeVar("Model", bound=BaseModel)
COMMAND_LINE = "command line"
SHORT = {"proxy_of": "data.proxy_of"}


class Settings:
    """A tree of values as they were given, where each leaf came from, and the bare words between them."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.tree: dict[str, Any] = {}
        self.origin: dict[KeyPath, str] = {}
        self.words = list(words)

    def put(self, path: KeyPath, value: Any, source: str) -> None:
        """Set a leaf, or all leaves of a dict, over what is there; an empty dict clears a section.

        True and False become text: a field of type bool reads it, and no number takes it for 1 or 0.
        """
        if isinstance(value, dict) and value:
            for key, part in value.items():
                self.put((*path, str(key)), part, source)
            return
        tree = self.tree
        for depth, key in enumerate(path[:-1], 1):
            if not isinstance(tree.setdefault(key, {}), dict):
                where = sources(self.origin, path[:depth])
                raise ConfigError(f"{where}: {key} = {tree[key]!r}, but {source}: {'.'.join(path)}; use one of the two")
            tree = tree[key]
        self.origin = {leaf: where for leaf, where in self.origin.items() if leaf[: len(path)] != path}
        self.origin[path] = source
        tree[path[-1]] = str(value).lower() if isinstance(value, bool) else value

    def pick(self, keys: Collection[str]) -> "Settings":
        """The part under these top-level keys, without the words."""
        part = Settings()
        part.tree = {key: value for key, value in self.tree.items() if key in keys}
        part.origin = {path: source for path, source in self.origin.items() if path[0] in keys}
        return part

    def drop(self, keys: Collection[str]) -> "Settings":
        """The part under the other top-level keys, without the words."""
        return self.pick(self.tree.keys() - set(keys))


def load(model: type[Model], argv: Sequence[str]) -> Model:
    """The model that files and command line describe. ConfigError with one line for every mistake."""
    return validate(model, read(argv))


def validate(model: type[Model], settings: Settings) -> Model:
    """The model that the settings describe. ConfigError as in `load`, also where there are bare words."""
    if settings.words:
        raise ConfigError(f"{COMMAND_LINE}: {settings.words[0]!r} has no value; write {settings.words[0]}=VALUE")
    try:
        return model.model_validate(settings.tree)
    except ValidationError as error:
        try:
            lines = [explain(model, settings.tree, settings.origin, details) for details in error.errors()]
        except UnicodeEncodeError as wrong:  # of pydantic, which says it in UTF-8
            raise ConfigError(f"{wrong.object!r} is not UTF-8; write it in UTF-8") from None
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def read(argv: Sequence[str]) -> Settings:
    """`--config FILE`, `--plugin FILE` any number of times; `key=value`, `--key=value`, `--key value`; bare words."""
    pairs, words = split(argv)
    settings = Settings(words)
    for key, file in pairs:
        if key == "config":
            for name, value in read_file(file).items():
                settings.put(tuple(str(name).split(".")), value, file)
    plugins = [value for key, value in pairs if key == "plugin"]
    if plugins:
        earlier = settings.tree.get("plugins", [])
        settings.put(("plugins",), (earlier if isinstance(earlier, list) else [earlier]) + plugins, COMMAND_LINE)
    for key, value in pairs:
        if key not in ("config", "plugin"):
            settings.put(tuple(SHORT.get(key, key).split(".")), parse(key, value), COMMAND_LINE)
    return settings


def split(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Arguments as pairs of key and text, and the words that are neither. `--lr-grid` is `lr_grid`."""
    pairs, words, rest = [], [], list(argv)
    while rest:
        word = rest.pop(0)
        key, has_value, value = word.removeprefix("--").partition("=")
        key = key if "." in key else key.replace("-", "_")
        if not has_value and not word.startswith("--"):
            words.append(word)
            continue
        if not has_value:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{COMMAND_LINE}: {word} has no value; write {word} VALUE")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs, words


def parse(key: str, value: str) -> Any:
    """Text as the value that it spells, in YAML or Python. Numbers stay text: the field knows its type."""
    if not value.startswith(("[", "{", "(")):
        return None if value in ("None", "none", "null") else value
    try:
        python = python_literal(value)
        if python is not None:
            return python
        return read_yaml(f"{COMMAND_LINE}, {key} = {value!r}", value)
    except ConfigError:
        raise
    except Exception:  # PyYAML raises anything where a tag does not fit
        raise ConfigError(f"{COMMAND_LINE}: {key} = {value!r} is not a list; brackets do not close or fit") from None


def python_literal(text: str) -> Any:
    """What Python printed, as a wandb agent passes it; None for other text, where a backslash is just a backslash."""
    try:
        with warnings.catch_warnings(action="ignore"):
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if repr(value) == text or text.startswith("(") else None
