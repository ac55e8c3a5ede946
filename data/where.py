"""Which documents a source gives: `where=score>0.7 and trigram<4`, over the scores that `prepare` kept.

Scores are integers in units, and a number in the expression is a fraction: `score>0.7` compares with 0.7 times the
units, exactly, so that no rounding decides about a document.
"""

import ast
import difflib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError

Mask = NDArray[np.bool_]
EXAMPLE = "write comparisons of a score with a number, joined by and, or, not: score>0.7 and (pool==3 or trigram<4)"
MIRRORED = {ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE, ast.Eq: ast.Eq, ast.NotEq: ast.NotEq}


class Where(NamedTuple):
    text: str
    tree: ast.expr

    @property
    def columns(self) -> list[str]:
        """The names that it asks for, sorted."""
        return sorted({node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)})

    def choose(self, columns: Mapping[str, NDArray[np.int32]], units: Mapping[str, int]) -> Mask:
        """Which documents it holds for, [documents].

        Args:
            columns: integers by name, [documents] each.
            units: how many of them make one, by name.
        """
        for name in self.columns:
            if name not in columns:
                near = difflib.get_close_matches(name, columns, 1)
                hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(columns) or 'none'}"
                raise DataError(f"where={self.text!r}: no score {name!r}; {hint}")
        return evaluate(self.tree, columns, units)


def parse(text: str) -> Where:
    """DataError, in one line, for what is not such an expression."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        reason = error.args[0] if type(error) is ValueError else "not an expression"
        raise DataError(f"where={text!r}: {reason}; {EXAMPLE}") from None
    return Where(text, tree)


def check(node: ast.expr) -> None:
    """ValueError for what `evaluate` does not know."""
    match node:
        case ast.BoolOp(values=parts):
            for part in parts:
                check(part)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            check(part)
        case ast.Compare():
            comparisons(node)
        case _:
            raise ValueError(f"{ast.unparse(node)} is not a comparison")


def comparisons(node: ast.Compare) -> list[tuple[str, type[ast.cmpop], Fraction]]:
    """Name, operator, number of each; `0.2 < score < 0.7` is two of them."""
    sides, found = [node.left, *node.comparators], []
    for op, left, right in zip(map(type, node.ops), sides, sides[1:], strict=False):
        match left, right:
            case (ast.Name(id=name), limit) if op in MIRRORED and not isinstance(limit, ast.Name):
                found.append((name, op, number(limit)))
            case (limit, ast.Name(id=name)) if op in MIRRORED and not isinstance(limit, ast.Name):
                found.append((name, MIRRORED[op], number(limit)))
            case _:
                raise ValueError(f"{ast.unparse(node)} does not compare a score with a number")
    return found


def number(node: ast.expr) -> Fraction:
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=part):
            return -number(part)
        case ast.Constant(value=int() | float() as value) if type(value) is not bool and math.isfinite(value):
            return Fraction(str(value))  # the decimals as written, up to 15, not the nearest binary fraction
    raise ValueError(f"{ast.unparse(node)} is not a number")


def evaluate(node: ast.expr, columns: Mapping[str, NDArray[np.int32]], units: Mapping[str, int]) -> Mask:
    match node:
        case ast.BoolOp(op=join, values=parts):
            masks = [evaluate(part, columns, units) for part in parts]
            return np.any(masks, axis=0) if isinstance(join, ast.Or) else np.all(masks, axis=0)
        case ast.UnaryOp(operand=part):
            return ~evaluate(part, columns, units)
        case ast.Compare():
            limits = comparisons(node)
            return np.all([compare(columns[name], op, limit * units[name]) for name, op, limit in limits], axis=0)
    raise AssertionError(node)


def compare(column: NDArray[np.int32], kind: type[ast.cmpop], limit: Fraction) -> Mask:
    """column > limit and so on; an integer is above a fraction if it is above its floor, below if below its ceiling."""
    floor, ceiling = (np.int64(min(max(side, -(2**40)), 2**40)) for side in (math.floor(limit), math.ceil(limit)))
    if kind is ast.Gt:
        return column > floor
    if kind is ast.GtE:
        return column >= ceiling
    if kind is ast.Lt:
        return column < ceiling
    if kind is ast.LtE:
        return column <= floor
    equal = (column == floor) & (floor == ceiling)
    return equal if kind is ast.Eq else ~equal
