"""Launches whose bytes are known: for each a formula, in bytes an entry, and the launch at a size that shows it.

Sizes are multiples of a tile and large enough that what a launch reads beside its tensors is small.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.tools.triton_trace import Moved, trace


class Case(NamedTuple):
    formula: float  # bytes of an entry
    launch: Callable[[], int]  # gives the number of entries
    asked: float = 1.15  # what instructions may ask for, in formulas

    def run(self) -> tuple[Moved, int]:
        with trace() as moved:
            entries = self.launch()
        return moved, entries


SHAPES = ((64, 512), (16, 1024))  # rows are channels of the first, columns of the second
ROWS = [True, False]


def matrices() -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


def channel_norms() -> int:
    from thriftlab.kernels import norm_rows

    norm_rows.norms(matrices(), ROWS)
    return entries()


def adam_small(directions: bool, sizes: bool) -> int:
    from thriftlab.kernels import norm_rows

    given = (matrices(), matrices(), matrices(), torch.ones(2))
    norm_rows.adam_small(*given, (0.9, 0.999), 1e-8, ROWS, directions, sizes)
    return entries()


def scale_add() -> int:
    from thriftlab.kernels import norm_rows

    norm_rows.scale_add(matrices(), matrices(), [torch.zeros(64, 1), torch.zeros(1, 1024)], ROWS)
    return entries()


def entries() -> int:
    return sum(rows * columns for rows, columns in SHAPES)


CASES: dict[str, Case] = {
    "norms": Case(4, channel_norms),
    "adam_small of galore: N": Case(12 + 8 + 4, lambda: adam_small(True, False)),
    "adam_small of fira: N and norms": Case(12 + 8 + 4, lambda: adam_small(True, True)),
    "adam_small of apollo: norms": Case(12 + 8, lambda: adam_small(False, True)),
    "scale_add": Case(8 + 4, scale_add),
}
