"""A configuration file -> its tree: YAML, TOML or JSON, in UTF-8 or UTF-16. A key that is given twice is an error.

Parsers let the last of two values win, so the keys are read a second time, with their lines. The surprise: a dotted key
at the top is the key below its section, so `optim.lr` and `optim: {lr: ...}` are one key, too.
"""

import codecs
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import yaml

from thriftlab.data.errors import ConfigError
from thriftlab.data.paths import typed_path
from thriftlab.train.config.mistakes import KeyPath

Place = tuple[KeyPath, int | None]  # a key, and its line where that is known
JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:\n]')


def read_file(file: str) -> dict[Any, Any]:
    """The tree in a file. ConfigError names the file, the line where it is known, and what is wrong."""
    path = typed_path(file)
    if path.suffix.lower() not in READERS:
        raise ConfigError(f"{file}: a configuration file ends in {', '.join(READERS)}")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    try:
        content = READERS[path.suffix.lower()](file, text_of(raw))
    except (ConfigError, MemoryError):
        raise
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line}: {error.problem}") from None
    except RecursionError:
        raise ConfigError(f"{file}: it is nested too deeply, or refers to itself") from None
    except Exception as error:  # JSON, TOML and UTF-8 say the place; PyYAML raises anything where a tag does not fit
        raise ConfigError(f"{file}: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(content, dict | None):
        raise ConfigError(f"{file}: keys and values are expected, not {content!r:.40}")
    return content or {}


def text_of(raw: bytes) -> str:
    """As editors write it: UTF-8 with or without a mark of the byte order, or UTF-16 with one."""
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if marked else "utf-8-sig")


def refuse_twice(source: str, places: Iterable[Place]) -> None:
    """ConfigError for the first key that is given a second time."""
    seen: dict[KeyPath, int | None] = {}
    for path, line in places:
        path = (*path[0].split("."), *path[1:])
        if path in seen:
            where = f"{source}, line {line}" if line else source
            first = f", first in line {seen[path]}" if seen[path] else ""
            raise ConfigError(f"{where}: {'.'.join(path)} is given twice{first}; keep one of them")
        seen[path] = line


def read_yaml(source: str, text: str) -> Any:
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    if node is None:
        return None
    refuse_twice(source, yaml_keys(loader, node))  # before merges (`<<`) are resolved, which may be overridden
    return loader.construct_document(node)


def yaml_keys(loader: yaml.SafeLoader, node: yaml.Node, path: KeyPath = ()) -> Iterator[Place]:
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from yaml_keys(loader, item, (*path, str(number)))
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                merge = key.tag == "tag:yaml.org,2002:merge"
                below = (*path, "<<" if merge else str(loader.construct_object(key)))
                yield below, key.start_mark.line + 1
                yield from yaml_keys(loader, value, below)


def read_json(source: str, text: str) -> Any:
    content = json.loads(text)
    refuse_twice(source, json_keys(text))
    return content


def json_keys(text: str) -> Iterator[Place]:
    """Of valid JSON."""
    path: list[str | int] = []  # in an object the key, in a list the number
    line, last = 1, ""
    for token in (match[0] for match in JSON_TOKEN.finditer(text)):
        if token == "\n":
            line += 1
        elif token in ("{", "["):
            path.append("" if token == "{" else 0)
        elif token in ("}", "]"):
            path.pop()
        elif token == ":":
            path[-1] = json.loads(last)
            yield tuple(map(str, path)), line
        elif token == ",":
            path[-1] = path[-1] + 1 if isinstance(path[-1], int) else path[-1]
        last = token


def read_toml(source: str, text: str) -> Any:
    """TOML itself refuses a key that is given twice, without its name; but not a dotted one in quotes."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        refuse_twice(source, toml_keys(text))
        raise
    refuse_twice(source, tree_keys(content))
    return content


def toml_keys(text: str) -> Iterator[Place]:
    """The keys that begin a line, below the section above them; a list of sections begins anew."""
    section: KeyPath = ()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*(\[\[?)([^\]]+)\]", line):
            section = named(match[2]) if match[1] == "[" else (*named(match[2]), f"line {number}")
            if match[1] == "[":
                yield section, number
        elif match := re.match(r"""\s*((?:[\w.\s-]|"[^"]*"|'[^']*')+?)\s*=""", line):
            yield (*section, *named(match[1])), number


def named(key: str) -> KeyPath:
    return tuple(part.strip().strip("\"'") for part in key.split("."))


def tree_keys(tree: Any, path: KeyPath = ()) -> Iterator[Place]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key), None
            yield from tree_keys(value, (*path, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from tree_keys(value, (*path, str(number)))


READERS: dict[str, Callable[[str, str], Any]] = {
    ".yaml": read_yaml,
    ".yml": read_yaml,
    ".json": read_json,
    ".toml": read_toml,
}
