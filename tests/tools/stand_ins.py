"""Stand-ins for parts of the package that are handed over as an interface, so that their users are tested alone."""

import importlib.util
import sys
import types
from typing import NamedTuple

import numpy as np

from thriftlab.data.errors import DataError


def where_of(monkeypatch):
    """`thriftlab.data.where` if it is there, else one that knows NAME>NUMBER and NAME<NUMBER."""
    if importlib.util.find_spec("thriftlab.data.where") is None:
        module = types.ModuleType("thriftlab.data.where")
        module.parse = Where
        monkeypatch.setitem(sys.modules, "thriftlab.data.where", module)


class Where:
    def __init__(self, text):
        for operator in "<>":
            if operator in text:
                self.name, _, limit = text.partition(operator)
                self.text, self.operator, self.limit = text, operator, float(limit)
                return
        raise DataError(f"where={text!r}: not a comparison")

    def choose(self, columns, units):
        if self.name not in columns:
            raise DataError(f"where={self.text!r}: no score {self.name!r}; there is {', '.join(columns)}")
        value = np.asarray(columns[self.name]) / units[self.name]
        return value > self.limit if self.operator == ">" else value < self.limit


class Finding(NamedTuple):
    rule: str
    what: str
    value: float
    limit: float | None
    passed: bool


class Rules:
    """One rule: at least so many words."""

    def __init__(self, names, thresholds):
        if list(names) != ["words"]:
            raise DataError(f"rules: unknown rule {names[0]!r}")
        self.least = thresholds.get("words", {}).get("least", 5)

    def explain(self, text):
        count = len(text.split())
        return [Finding("words", "words", float(count), self.least, count >= self.least)]


def rules_of(monkeypatch):
    """A stand-in for `thriftlab.data.prepare.rules` with one rule, whatever the package has."""
    module = types.ModuleType("thriftlab.data.prepare.rules")
    module.chosen = Rules
    monkeypatch.setitem(sys.modules, "thriftlab.data.prepare.rules", module)
