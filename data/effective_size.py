"""What repetition has cost, in two units: the size of a model that does as well without, and the text that is missing.

Effective size (2205.10487): the size of a control, a model trained on as many tokens that are all seen once, which has
the same loss, by ln L = a - alpha ln N through the controls. One surprise: alpha is small, so d ln N_eff = -d ln L /
alpha is large. Four thousandths of a nat can be a sixth of the size; a size without an interval says nothing.

Damage: what the repeats did, beside what a run does that has the rest of its text alone. At a harm index of 0 they were
wasted, at -1 as good as other text, above 0 worse than nothing.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from thriftlab.data.errors import DataError

CONTROLS = 4  # sizes that a law takes at least


@dataclass(frozen=True)
class SizeLaw:
    """ln L = a - alpha ln N. `smallest` and `largest` are the sizes of its controls, `residual` the largest of ln L."""

    a: float
    alpha: float
    smallest: int
    largest: int
    residual: float

    def size(self, loss: float) -> float:
        """The N of this loss, also where there was no control: see `off_scale`."""
        return math.exp((self.a - math.log(loss)) / self.alpha)


def fit_size_law(losses: Mapping[int, float]) -> SizeLaw:
    """Least squares of ln L by ln N, over {N: loss} of controls at one budget.

    DataError for fewer than four sizes, or where the loss does not fall with size.
    """
    if len(losses) < CONTROLS:
        raise DataError(f"a law of size takes {CONTROLS} sizes of controls or more, and there are {len(losses)}")
    x, y = np.log(sorted(losses)), np.log([losses[size] for size in sorted(losses)])
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    if slope >= 0:
        raise DataError("the loss of the controls does not fall with their size; train them longer, or more seeds")
    a = float(y.mean() - slope * x.mean())
    residual = float(np.abs(y - a - slope * x).max())
    return SizeLaw(a, -slope, min(losses), max(losses), residual)


def off_scale(size: float, smallest: int, largest: int) -> str | None:
    """Why a size is not told: there was no control beyond it."""
    return "below" if size < smallest else "above" if size > largest else None


def interpolated_size(controls: Mapping[int, float], value: float) -> float:
    """The N of a control that has this value of a measure, linear in ln N between neighbours.

    The measure rises with N or falls; where noise turns the order of neighbours round they count as one, at the mean of
    both. 0 or inf for a value beyond the last control on that side; nan where the measure does not change with N.
    """
    sizes = sorted(controls)
    if not sizes:
        return math.nan
    x, y = np.log(sizes), np.array([controls[size] for size in sizes])
    sign = 1.0 if ((x - x.mean()) * (y - y.mean())).sum() > 0 else -1.0
    knots = rising(x, sign * y)
    if len(knots) < 2:
        return math.nan
    values = [knot[1] for knot in knots]
    if not values[0] <= sign * value <= values[-1]:
        return 0.0 if sign * value < values[0] else math.inf
    return math.exp(float(np.interp(sign * value, values, [knot[0] for knot in knots])))


def rising(x: Iterable[float], y: Iterable[float]) -> list[tuple[float, float]]:
    """Means of (x, y) over the fewest neighbours that make y rise (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # sum of x, sum of y, count
    for one, other in zip(x, y, strict=True):
        blocks.append((float(one), float(other), 1))
        while len(blocks) > 1 and blocks[-2][1] / blocks[-2][2] >= blocks[-1][1] / blocks[-1][2]:
            last, before = blocks.pop(), blocks.pop()
            blocks.append((before[0] + last[0], before[1] + last[1], before[2] + last[2]))
    return [(sum_x / count, sum_y / count) for sum_x, sum_y, count in blocks]


def harm_index(repeated: float, fewer: float, full: float) -> float:
    """(L_rep - L_(1-phi)D) / (L_(1-phi)D - L_D): the loss of the run with repeats, of one without them, and of one with
    other text instead. nan where less text has not cost anything."""
    return (repeated - fewer) / (fewer - full) if fewer > full else math.nan


def verdict(interval: tuple[float, float], cost: float) -> str:
    """What repeats were, by an interval of L_rep - L_(1-phi)D and what less text costs, L_(1-phi)D - L_D.

    Wasted: all of the interval is nearer to 0 than to what the same amount of other text would change.
    """
    low, high = interval
    if low > 0 or high < 0:
        return "harmful" if low > 0 else "useful"
    return "wasted" if max(-low, high) < cost / 2 else "no claim"
