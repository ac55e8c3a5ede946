"""The rules that a user chose, applied to a text in their order: line rules, document rules, those of repetition.

The first rule that fails names the reason. Line rules come by the way that they see lines: RefinedWeb's, C4's, own
ones. Line by line a rule sees what the one before it left. Own document rules come before those of repetition.
"""

import difflib
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from thriftlab.data.errors import DataError
from thriftlab.data.plugins import load_plugin
from thriftlab.data.rules import RULES, Lines, Rule, Text

BOUNDS = {"least": operator.ge, "most": operator.le}

Thresholds = Mapping[str, Mapping[str, float]]


class Cleaned(NamedTuple):
    text: str  # after line rules; as it was where one of them drops the document
    reason: str | None  # name of the first rule that fails
    edits: dict[str, int]  # line rule -> lines that it dropped or edited, of those that it saw


class Finding(NamedTuple):
    rule: str
    what: str  # is counted or measured
    value: float
    limit: float | None  # None where nothing is compared
    passed: bool


def families() -> dict[str, list[str]]:
    """Family -> names of its rules."""
    found: dict[str, list[str]] = {}
    for rule in RULES.values():
        for family in rule.families:
            found.setdefault(family, []).append(rule.name)
    return found


def chosen(names: Sequence[str], thresholds: Thresholds | None = None) -> "Rules":
    """Rules by the names of families and single ones. DataError for a name, or a threshold, that there is not."""
    members, thresholds = families(), thresholds or {}
    wanted: set[str] = set()
    for name in names:
        if name not in members.keys() | RULES.keys():
            raise DataError(f"rules: there is no {name!r}; {_near(name, [*members, *RULES])}")
        wanted.update(members.get(name, [name]))
    for name, given in thresholds.items():
        if name not in RULES:
            raise DataError(f"rule.{name}: there is no such rule; {_near(name, sorted(wanted))}")
        if name not in wanted:
            raise DataError(f"rule.{name}: is set, but not among the chosen rules; add {name} to rules")
        for key in given.keys() - RULES[name].thresholds.keys():
            has = ", ".join(RULES[name].thresholds) or "none"
            raise DataError(f"rule.{name}.{key}: there is no such threshold; those of {name}: {has}")
    return Rules([RULES[name] for name in RULES if name in wanted], thresholds)


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"near to it: {', '.join(near)}" if near else f"families: {', '.join(families())}; rules: docs/rules.md"


class Rules:
    """Can be pickled: a process that gets them runs the files of a user's own rules itself."""

    def __init__(self, rules: Sequence[Rule], thresholds: Thresholds):
        self.rules = sorted(rules, key=lambda rule: rule.stage)
        self.given = {name: dict(given) for name, given in thresholds.items()}
        self.thresholds = {rule.name: rule.thresholds | self.given.get(rule.name, {}) for rule in self.rules}
        bound = [(rule, _function(rule, self.thresholds[rule.name])) for rule in self.rules]
        self._edits = [
            (lines, list(group))
            for lines, group in groupby((each for each in bound if each[0].edits), lambda each: each[0].lines)
        ]
        self._measures = [each for each in bound if not each[0].edits]

    def __reduce__(self) -> tuple[Any, ...]:
        files = {rule.name: rule.file for rule in self.rules}
        return _again, (files, self.given)

    def clean(self, text: str) -> Cleaned:
        edited, reason, edits = self._edited(text)
        if reason is None:
            reason = next((rule.name for rule, value in self._values(edited) if not self._holds(rule, value)), None)
        return Cleaned(str(edited), reason, dict(edits))

    def explain(self, text: str) -> list[Finding]:
        """Every rule in order, also after one that fails."""
        edited, reason, edits = self._edited(text)
        lines = [
            Finding(rule.name, rule.what, float(edits[rule.name]), None, True)
            if rule.name != reason
            else Finding(rule.name, rule.what, 1.0, 0.0, False)
            for rule in self.rules
            if rule.edits
        ]
        measures = [
            Finding(rule.name, f"{rule.what}: at {bound}", value, limit, passed(value, limit))
            for rule, value in self._values(edited)
            for bound, passed in BOUNDS.items()
            if (limit := self.thresholds[rule.name].get(bound)) is not None
        ]
        return [*lines, *measures]

    def _edited(self, text: str) -> tuple[Text, str | None, Counter[str]]:
        """The text after line rules, and the line rule that drops the document."""
        edits: Counter[str] = Counter()
        passes: dict[str, tuple[str, str]] = {}
        edited, reason = text, None
        for lines, rules in self._edits:
            before = edited
            if lines:
                edited, reason = _by_line(before, lines, rules, edits)
                passes[lines.name] = before, edited
            else:
                edited = _whole(before, rules, edits)
            if reason:
                return Text(text), reason, edits
        document = Text(edited)
        document.passes = passes
        return document, None, edits

    def _values(self, text: Text) -> Iterator[tuple[Rule, float]]:
        """Lazily, for the last rules cost most."""
        for rule, measure in self._measures:
            yield rule, float(measure(text)) if text.words or rule.wordless else 0.0

    def _holds(self, rule: Rule, value: float) -> bool:
        limits = self.thresholds[rule.name]
        return limits.get("least", -inf) <= value <= limits.get("most", inf)


Bound = tuple[Rule, Callable[..., Any]]  # and its function with the thresholds that it is passed


def _by_line(text: str, lines: Lines, rules: list[Bound], edits: Counter[str]) -> tuple[str, str | None]:
    """The text of the lines that stay, and the rule that drops the document, where one does."""
    kept: list[str] = []
    for each in lines.split(text):
        line = Text(each)
        for rule, edit in rules if each or lines.empty else ():
            after = edit(line)
            if after is line:
                continue
            if after is None and rule.drops_document:
                return text, rule.name
            if after != line:
                edits[rule.name] += 1
            if after is None:
                break
            line = after if isinstance(after, Text) else Text(after)
        else:
            kept.append(line)
    return lines.join(kept), None


def _whole(text: str, rules: list[Bound], edits: Counter[str]) -> str:
    for rule, edit in rules:
        after = edit(text)
        if lines := text.count("\n") - after.count("\n"):
            edits[rule.name] += lines
        text = after
    return text


def _function(rule: Rule, thresholds: dict[str, float]) -> Callable[..., Any]:
    passed = thresholds if rule.edits else {key: value for key, value in thresholds.items() if key not in BOUNDS}
    function = partial(rule.function, **passed) if passed else rule.function
    return function if rule.file is None else partial(_own, rule, function)


def _own(rule: Rule, function: Callable[..., Any], text: Text) -> Any:
    """What the user's function gives, if it is what it should be."""
    try:
        result = function(text)
    except Exception as error:
        raise DataError(f"rule {rule.name}: {type(error).__name__}: {error}; mend it in {rule.file}") from error
    fits = result is None or isinstance(result, str) if rule.edits else isinstance(result, int | float)
    if not fits:
        wanted = "the line, or None to drop it" if rule.edits else "a number"
        raise DataError(f"rule {rule.name}: gives {result!r}, and not {wanted}; mend it in {rule.file}")
    return result


def _again(files: dict[str, Path | None], thresholds: Thresholds) -> Rules:
    """The same rules, in another process."""
    for name, file in files.items():
        if name not in RULES and file:
            try:
                load_plugin(file)
            except DataError as error:
                raise DataError(f"rule {name}: {file} cannot be run in a worker process: {error}") from None
    return chosen(list(files), thresholds)
