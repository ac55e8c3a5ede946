"""What a rule is: a function of a text, registered under a name by `@document_rule` or `@line_rule`.

A document rule measures: its function gives a number, and the document goes where that is below `least` or above
`most`. A line rule edits: its function gives the line, another line in its place, or None, and then the line goes.
All numbers that a rule compares with are thresholds with defaults, which the user can set.

Those of the package are in data/prepare/rules, which also says in which order they act.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from thriftlab.data.errors import DataError

RULES: dict[str, "Rule"] = {}
OWN = Path(__file__).parent / "prepare" / "rules"  # of the package; rules from elsewhere are a user's

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


class Text(str):
    """A document, or a line of one, with what several rules want of it."""

    passes: Mapping[str, tuple[str, str]] = {}  # of a document: before and after the line rules of each `Lines`

    @cached_property
    def words(self) -> list[str]:
        return self.split()

    def shared(self, make: Callable[["Text"], T]) -> T:
        """make(self), made once."""
        memo = cast(dict[Any, Any], self.__dict__)
        return memo[make] if make in memo else memo.setdefault(make, make(self))

    def edited(self, text: str) -> "Text":
        """Another text that still counts the words of this one."""
        other = Text(text)
        other.words = self.words
        return other


class Lines(NamedTuple):
    """How some line rules see a text. Those with the same one are applied together, line by line."""

    name: str
    split: Callable[[str], list[str]]
    join: Callable[[list[str]], str]
    empty: bool = False  # whether they are shown empty lines; else these stay


MINE = Lines("own", lambda text: text.split("\n"), "\n".join)


@dataclass(frozen=True)
class Rule:
    name: str
    function: Callable[..., Any]
    thresholds: dict[str, float]  # and their defaults
    families: tuple[str, ...] = ()
    lines: Lines | None = None  # of a line rule
    drops_document: bool = False  # of a line rule: where it gives None, it is the document that goes
    whole: bool = False  # edits the text as a whole, after the line rules before it
    wordless: bool = False  # of a document rule: measures a text without words, too; else it has the value 0
    late: bool = False  # costs so much that it is applied after all others

    @property
    def edits(self) -> bool:
        return self.lines is not None or self.whole

    @property
    def stage(self) -> tuple[int, bool]:
        """Rules act in this order, and where it is the same in that of their registration."""
        return 0 if self.edits else 2 if self.late else 1, self.file is not None

    @property
    def what(self) -> str:
        return (self.function.__doc__ or self.function.__name__).strip().splitlines()[0]

    @property
    def file(self) -> Path | None:
        """Where a user defined it; None for those of this package."""
        path = Path(inspect.unwrap(self.function).__code__.co_filename)
        return None if path.parent == OWN else path.absolute()


def document_rule(name: str, **thresholds: float) -> Callable[[Function], Function]:
    """Registers a function of a text (`str`) that gives a number.

    Thresholds: `least`, `most` or both, which the number is compared with; others are passed on by name.
    """
    if not thresholds.keys() & {"least", "most"}:
        raise DataError(f"document rule {name}: never drops a document; give it least=NUMBER or most=NUMBER")
    return register(name, thresholds)


def line_rule(name: str, **thresholds: float) -> Callable[[Function], Function]:
    """Registers a function of a line that is not empty. It gives the line, an edited one, or None to drop it.

    Thresholds are passed on by name.
    """
    return register(name, thresholds, lines=MINE)


def register(
    name: str, thresholds: dict[str, float], families: tuple[str, ...] = (), **how: Any
) -> Callable[[Function], Function]:
    def add(function: Function) -> Function:
        rule = Rule(name, function, thresholds, families, **how)
        if (other := RULES.get(name)) and (other.file is None or other.file != rule.file):
            place = other.file or "thriftlab"
            raise DataError(f"rule {name}: there is one of that name in {place}; choose another name")
        RULES[name] = rule
        return function

    return add
