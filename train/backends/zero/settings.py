"""Keys of DeepSpeed's JSON that DeepSpeed does not know: it passes over many of them in silence.

So its own reader is handed dicts that note what is looked up in them; what nobody looked for is unknown. Sections that
it validates itself refuse unknown keys with an exception, which becomes one line.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from thriftlab.data.errors import BackendError


class Noting(dict):
    """A dict that notes which keys are looked up, in it and in the dicts below."""

    def __init__(self, tree: dict[str, Any]):
        super().__init__({key: Noting(value) if isinstance(value, dict) else value for key, value in tree.items()})
        self.noted: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.noted.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.noted.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.noted.add(str(key))
        return super().__contains__(key)


def refuse_unknown(settings: dict[str, Any]) -> None:
    """BackendError for a key that DeepSpeed does not read, or a value that it does not take. It is imported by now."""
    from deepspeed.runtime.config import DeepSpeedConfig

    read = Noting(settings)
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        first = error.errors()[0]
        key, section = ".".join(map(str, first["loc"])), section_of(settings, str(first["loc"][0]))
        raise BackendError(f"backend.settings: {section}{key} = {first['input']!r}: {first['msg']}") from None
    except Exception as error:  # its own checks are assertions, and a value of another type is whatever happens
        raise BackendError(f"backend.settings: DeepSpeed says: {' '.join(str(error).split())}") from None
    for path, known in unread(read, ""):
        near = difflib.get_close_matches(path.rpartition(".")[2], known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BackendError(f"backend.settings: DeepSpeed knows no key {path!r}{hint}")


def section_of(settings: dict[str, Any], key: str) -> str:
    """`zero_optimization.` where the key is below that section; pydantic names it from there on."""
    return next((f"{name}." for name, part in settings.items() if isinstance(part, dict) and key in part), "")


def unread(tree: Noting, path: str) -> Iterator[tuple[str, set[str]]]:
    """Keys that nobody looked up, with those that somebody did; not of sections that are validated as a whole."""
    for key, value in tree.items():
        if key not in tree.noted:
            yield f"{path}{key}", tree.noted
        elif isinstance(value, Noting) and value.noted and key != "zero_optimization":
            yield from unread(value, f"{path}{key}.")
