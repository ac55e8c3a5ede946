"""Text to hashed words: what the scores count, before there is a tokenizer.

A word is a run of letters and digits in lower case, or of other marks. Which characters are letters is a question to
Python's tables of Unicode, so that nodes with another Python may cut otherwise.
"""

import hashlib
import re
from array import array

import numpy as np
from numpy.typing import NDArray

WORD = re.compile(r"\w+|[^\w\s]+")
ID_BITS = 20
IDS = 1 << ID_BITS  # 200 k different words lose a tenth of them to collisions
LARGEST_CACHE = 2**18  # words, about 50 MB


class _Hashes(dict[str, int]):
    def __missing__(self, word: str) -> int:
        digest = hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest()
        return self.setdefault(word, int.from_bytes(digest, "little"))


_hashes = _Hashes()


def hash_words(text: str) -> NDArray[np.uint64]:
    """The words of a text in their order as 64 bits each, [words]."""
    if len(_hashes) > LARGEST_CACHE:
        _hashes.clear()
    return np.array(array("Q", map(_hashes.__getitem__, WORD.findall(text.lower()))), np.uint64)


def word_ids(text: str) -> NDArray[np.int64]:
    """The words of a text as ids below IDS, [words]: what a trigram counts."""
    return (hash_words(text) >> np.uint64(64 - ID_BITS)).astype(np.int64)
