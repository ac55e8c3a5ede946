"""No item too often in one step: exchanges of two places, as few as it takes."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.order import permute

Array = NDArray[np.int64]
TRIED = 256  # places at a time


def spread(items: Array, steps: Array, most: int, seed: int) -> Array:
    """The items so exchanged that none is more than `most` times in one step: [places], as are the steps.

    Each item that is too many changes places with the first that fits, in an order that is drawn by `seed`.
    """
    items, n = items.copy(), len(items)
    count = Counter(zip(steps.tolist(), items.tolist(), strict=True))
    for i in range(n):
        here, item = int(steps[i]), int(items[i])
        if count[here, item] <= most:
            continue
        j = partner(i, items, steps, count, most, seed)
        there, other = int(steps[j]), int(items[j])
        count.subtract([(here, item), (there, other)])
        count.update([(here, other), (there, item)])
        items[i], items[j] = other, item
    return items


def partner(i: int, items: Array, steps: Array, count: Counter[tuple[int, int]], most: int, seed: int) -> int:
    here, item, n = int(steps[i]), int(items[i]), len(items)
    for start in range(0, n, TRIED):
        places = permute(np.arange(start, min(start + TRIED, n)), n, seed, i + 1)
        for j in places.tolist():
            fits = count[here, int(items[j])] < most and count[int(steps[j]), item] < most
            if fits and steps[j] != here:
                return j
    raise DataError(
        f"max_same_per_step = {most}: no order of the pool has each item at most that often in a step; use more items, "
        "smaller steps, or a larger number"
    )
