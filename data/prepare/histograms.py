"""How long documents are and what they scored, counted in bins that are the same everywhere, so that counts add up."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.prepare.parts import HELD, TRAIN, Parts
from thriftlab.data.prepare.scoring import UNSCORED

EDGES: dict[str, list[float]] = {
    "bytes": [0, *(2**k for k in range(4, 25))],
    "score": [k / 20 for k in range(21)],
    "trigram": [k / 2 for k in range(41)],  # nats; what is above is in the last bin
    "model": [k / 4 for k in range(61)],
}


def count_histograms(parts: Parts, sources: int, units: dict[str, int], part: int) -> dict[str, list[list[int]]]:
    """Of the documents of a part that stay: by column, for each source, the documents in each bin."""
    fate, rows = np.asarray(parts.array("fate", part)), parts.rows(part)
    stays = (fate == TRAIN) | (fate == HELD)
    columns: dict[str, NDArray[Any]] = {"bytes": parts.table(part)["bytes"].to_numpy()}
    for k, (name, unit) in enumerate(units.items()):
        if name != "pool":
            scores = np.asarray(parts.array("scores", part))[:, k]
            columns[name] = np.where(scores == UNSCORED, 0, scores) / unit
    return {
        name: [bins(values[rows[s] : rows[s + 1]][stays[rows[s] : rows[s + 1]]], EDGES[name]) for s in range(sources)]
        for name, values in columns.items()
    }


def bins(values: NDArray[Any], edges: list[float]) -> list[int]:
    """From an edge on, and below the next; the last bin has no end."""
    place = np.searchsorted(edges, values, "right") - 1
    return np.bincount(np.minimum(place, len(edges) - 2), minlength=len(edges) - 1).tolist()
