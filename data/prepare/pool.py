"""The distinct documents of one source, spooled to the disk, and which of them are held out.

Which are held out is a function of their text and the seed alone: machines with the same text agree, whatever its
order. Exact duplicates go before the split, so that no text lies on both sides.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.corpora.readers import Document, normalise

EMPTY, EXACT = "empty", "exact duplicate"
MOST = 0.2  # of a source, that a minimum of bytes may hold out

Chosen = NDArray[np.bool_]  # [documents]


class Pool(NamedTuple):
    file: Path  # UTF-8 texts, one after the other
    sizes: NDArray[np.int64]  # their bytes: [documents]
    points: NDArray[np.float64]  # where their hashes put them in [0, 1): [documents]
    text_sha256: str  # of all texts as read and normalised, duplicates too
    drops: Counter[str]  # documents left out, by reason

    def texts(self, chosen: Chosen) -> Iterator[str]:
        with self.file.open("rb") as file:
            for size, wanted in zip(self.sizes.tolist(), chosen.tolist(), strict=True):
                if wanted:
                    yield file.read(size).decode()
                else:
                    file.seek(size, 1)


def spool(documents: Iterator[Document], path: Path, seed: int, seen: set[bytes]) -> Pool:
    """Writes the normalised texts to `path`, without those that are empty or in `seen` (sha256), to which it adds."""
    sizes, points, drops = [], [], Counter[str]()
    whole = hashlib.sha256()
    with path.open("wb") as file:
        for document in documents:
            text = normalise(document.text).encode()
            whole.update(text + b"\0")  # which no text contains
            digest = hashlib.sha256(text).digest()
            if not text.strip() or digest in seen:
                drops[EXACT if text.strip() else EMPTY] += 1
                continue
            seen.add(digest)
            file.write(text)
            sizes.append(len(text))
            points.append(point(digest, seed))
    return Pool(path, np.array(sizes, np.int64), np.array(points), whole.hexdigest(), drops)


def point(digest: bytes, seed: int) -> float:
    """A uniform number in [0, 1) for the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()[:8], "little") / 2**64


def hold_out(pool: Pool, share: float, minimum: int) -> Chosen:
    """The documents whose point is below `share`, and those next in line until `minimum` bytes are held out.

    The minimum stops at a fifth of the source; one document is always held out.
    """
    line = np.argsort(pool.points)
    held_bytes = np.cumsum(pool.sizes[line])  # by each document and those before it
    enough = np.searchsorted(held_bytes, minimum) + 1
    most = np.searchsorted(held_bytes, MOST * held_bytes[-1], "right")
    chosen = pool.points < share
    chosen[line[: max(1, min(enough, most))]] = True
    return chosen
