"""Keeps near-duplicates of held-out documents out of training, by exact containment of word shingles.

A shingle is `SHINGLE` consecutive words (lower case, numbers as 0, punctuation ignored); a document is the set of its
shingles, and one of fewer words is one shingle. For a training document T, a held-out one H, and all held-out ones U:

    |T & U| / |T|  the share of T that is held out: T is an excerpt of the test, and training on it rehearses the test;
    |T & H| / |H|  the share of H that T shows: T quotes or contains a document of the test.

Either leaks without the other: an excerpt may be a small part of H, and H may be a small part of a long T. Jaccard
similarity (MinHash) sees neither, being small whenever the lengths differ. So the larger of the two shares decides.

Cost: linear in the corpus; memory is 12 bytes for every held-out shingle. Surprise: languages written without spaces
have few, long "words", and are compared by clauses rather than words.
"""

import re
from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHINGLE = 8  # words
_NUMBER, _WORD = re.compile(r"\d+"), re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication is a bijection of the 64-bit integers


def shingles(text: str) -> np.ndarray:
    """The set of the text's shingles, as sorted unique 64-bit hashes: uint64 [count]."""
    words = _WORD.findall(_NUMBER.sub("0", text.lower()))
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))  # [words]
    width = min(SHINGLE, len(words))
    count = len(words) - width + 1 if words else 0
    rolled = np.zeros(count, np.uint64)  # a polynomial in _BASE over the words' hashes
    for offset in range(width):
        rolled = rolled * _BASE + hashes[offset : offset + count]
    return np.unique(rolled)


class HeldOut(NamedTuple):
    """An inverted index of the held-out documents: shingle -> documents."""

    sizes: NDArray[np.int64]  # [documents], shingles
    hashes: NDArray[np.uint64]  # [shingles], sorted; a shingle of two documents is there twice
    documents: NDArray[np.int32]  # [shingles]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "HeldOut":
        sets = [shingles(text) for text in texts]
        sizes = np.array([len(each) for each in sets], np.int64)
        hashes = np.concatenate([*sets, np.empty(0, np.uint64)])
        order = np.argsort(hashes, kind="stable")
        return cls(sizes, hashes[order], np.repeat(np.arange(len(sets), dtype=np.int32), sizes)[order])

    def save(self, folder: Path) -> None:
        for name, array in self._asdict().items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def load(cls, folder: Path) -> "HeldOut":
        """Mapped into memory, which tasks of one machine share."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._fields))

    def overlap(self, text: str) -> float:
        """max(|T & U| / |T|, max over H of |T & H| / |H|), in [0, 1]."""
        own = shingles(text)
        first, last = np.searchsorted(self.hashes, own, "left"), np.searchsorted(self.hashes, own, "right")
        shared = last > first
        if not shared.any():
            return 0.0
        matches = np.concatenate([self.documents[a:b] for a, b in zip(first[shared], last[shared], strict=True)])
        documents, counts = np.unique(matches, return_counts=True)
        return float(max(shared.mean(), (counts / self.sizes[documents]).max()))


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
