"""Paths that a user wrote: `~` and `$NAME` as a shell would have expanded them, and folders that can be made."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from thriftlab.data.errors import ConfigError


def expanded(path: str) -> str:
    """The path with `~`, `~NAME`, `$NAME` and `${NAME}` replaced. ValueError for one that nothing is known of.

    A folder that has such a name stays what it is: a path is expanded more than once, here and where a job reads it.
    """
    if not path:
        raise ValueError("the path is empty, as after a variable that is not set; write . for this folder")
    full = os.path.expanduser(path)
    full = full if has_such_a_folder(full) else os.path.expandvars(full)
    if "\0" in full:
        raise ValueError("a path has no NUL character")
    if full.startswith("~"):
        raise ValueError(f"there is no home folder {full.split('/')[0]}; write the path in full, or ./~ for that name")
    if (unknown := re.search(r"\$(\w+|\{\w+\})", full)) and not has_such_a_folder(full):
        raise ValueError(f"{unknown[0]} is not set in the environment; set it, or write the path in full")
    if (shell := re.search(r"\$\{.*?\}|\$\(.*?\)|`.*?`", full)) and not has_such_a_folder(full):
        raise ValueError(f"{shell[0]} is known to a shell alone; write the path in full")
    return full


def has_such_a_folder(path: str) -> bool:
    """Whether a path with a "$" is there, up to the last part that has one."""
    if "\0" in path or "$" not in path:
        return False
    parts = Path(path).parts
    last = max(i for i, part in enumerate(parts) if "$" in part)
    return Path(*parts[: last + 1]).exists()


def expanded_text(value: object) -> object:
    return expanded(value) if isinstance(value, str) else value


Expanded = BeforeValidator(expanded_text)
FilePath = Annotated[str, Expanded]


def typed_path(text: str) -> Path:
    """As `expanded`, of a word of the command line that is no value of a key. ConfigError."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise ConfigError(f"{text}: {error}") from None
