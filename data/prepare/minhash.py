"""Signatures of texts for finding near duplicates: MinHash of word 5-grams, in bands.

Broder 1997 ("On the resemblance and containment of documents"): under a random order of all shingles, two sets have the
same smallest element with probability J, their Jaccard similarity. With `rows` such minima in a band, two texts share
at least one of `bands` buckets with probability 1 - (1 - J^rows)^bands. On text: Lee et al. 2021 (arXiv 2107.06499);
14 bands of 8 rows over 5-grams are FineWeb's (arXiv 2406.17557).

Words are compared in lower case, without accents, every number as 0; all but letters and digits separates. One table
from character to character does that, so that leaving out the accents costs nothing. With integers modulo 2^64:

    word      w = mix64(sum_i c_i G^i)            c_i its characters, G the golden constant of splitmix64
    shingle   x = sum_j w_j G^(4 - j)             w_j five consecutive words
    minimum   m_k = min over x of (a_k x + b_k) // 2^32
    bucket    h = mix64(h G + m), over the minima m of a band, from h = mix64(its number, from 1)

a_1, b_1, a_2, ... are splitmix64's stream from seed 0, each a_k made odd. Signatures are equal on every machine, in
every batch, under one version of Python's Unicode tables. Surprises: repeats of a shingle do not count; a text of
fewer than five words has no shingle and no bucket; languages written without spaces have few, long "words". Memory is
about 50 bytes for each character of the longest text.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.order import GOLDEN, mix64

SPACE, ZERO, MARK, UNKNOWN = 0, ord("0"), 2**32 - 1, 2**32 - 2  # MARK: to be left out; UNKNOWN: not looked up yet
LONG = 1 << 20  # characters of a text that are worked on at once
CHARACTERS = 1 << 17  # of texts that are worked on together: their shingles stay in the processor's cache
_FOLDED = np.full(0x110000, UNKNOWN, np.uint32)  # [code points], filled as they occur


class Banding(NamedTuple):
    """How texts are compared: they meet where all `rows` minima of one of the `bands` are equal."""

    bands: int
    rows: int
    words: int = 5


def buckets_of(texts: Sequence[str], banding: Banding) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """The buckets of each text, uint64 [texts, bands], and whether it has words enough for any, bool [texts]."""
    buckets = np.zeros((len(texts), banding.bands), np.uint64)
    enough = np.zeros(len(texts), bool)
    for batch in _batches(texts):
        hashes, counts = shingles(texts[batch], banding.words)
        enough[batch] = counts > 0
        minima = signatures(hashes, counts[counts > 0], banding.bands * banding.rows)
        buckets[batch][enough[batch]] = _buckets(minima, banding)
    return buckets, enough


def shingles(texts: Sequence[str], words: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """All shingles of the texts, one text after the other, uint64 [shingles], and how many each text has [texts]."""
    hashes, counts = words_of(texts)
    total = max(len(hashes) - words + 1, 0)
    rolled = np.zeros(total, np.uint64)  # [windows of words], some of them across two texts
    for offset in range(words):
        rolled = rolled * GOLDEN + hashes[offset : offset + total]
    text = np.repeat(np.arange(len(texts)), counts)  # [words], which text each is of
    within = text[:total] == text[words - 1 :]
    return rolled[within], np.maximum(counts - words + 1, 0)


def words_of(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """As `word_hashes`; a text longer than LONG piece by piece, because its characters need some 50 bytes each."""
    if max(map(len, texts), default=0) <= LONG:
        return word_hashes(texts)
    found = [[word_hashes([piece])[0] for piece in _cut(text)] for text in texts]
    hashes = np.concatenate([np.empty(0, np.uint64), *(each for pieces in found for each in pieces)])
    return hashes, np.array([sum(map(len, pieces)) for pieces in found], np.int64)


def _cut(text: str) -> Iterator[str]:
    """Pieces of about LONG characters that end with a blank, or as far behind it as there is one."""
    start = 0
    while start < len(text):
        before = max(text.rfind(blank, start, start + LONG) for blank in " \n")
        behind = [at for blank in " \n" if (at := text.find(blank, start + LONG)) >= 0]
        stop = (before if before >= start else min(behind, default=len(text))) + 1
        stop = len(text) if len(text) - start <= LONG else stop
        yield text[start:stop]
        start = stop


def word_hashes(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hashes of all words, one text after the other, uint64 [words], and how many each text has, int64 [texts]."""
    encoded = "\n".join([*texts, ""]).encode("utf-32-le", "surrogatepass")
    characters = _fold(np.frombuffer(encoded, "<u4"))
    digit = characters == ZERO
    left_out = characters == MARK
    left_out[1:] |= digit[1:] & digit[:-1]
    place = np.flatnonzero(~left_out)  # [characters that are left], where each was
    characters = characters[place]
    begins = characters != SPACE
    begins[1:] &= characters[:-1] == SPACE
    begin = np.flatnonzero(begins)  # [words]
    power, inverse = _powers(max(len(characters), 2 * CHARACTERS).bit_length())
    sums = np.add.reduceat(characters * power[: len(characters)], begin)  # [words]; SPACE adds nothing
    hashes = mix64(sums * inverse[begin])
    ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
    return hashes, np.diff(np.searchsorted(place[begin], ends), prepend=0)


def signatures(hashes: NDArray[np.uint64], counts: NDArray[np.int64], size: int) -> NDArray[np.uint32]:
    """The minima of texts, of which each has counts > 0 of the shingles, one after the other: uint32 [texts, size]."""
    first = np.cumsum(counts) - counts
    minima = np.empty((size, len(counts)), np.uint32)
    values = np.empty_like(hashes)
    for row, a, b in zip(minima, *_constants(size), strict=True):
        np.multiply(hashes, a, out=values)
        np.add(values, b, out=values)
        row[:] = np.minimum.reduceat(values, first) >> np.uint64(32)  # the smallest has the smallest upper half
    return minima.T


def _buckets(minima: NDArray[np.uint32], banding: Banding) -> NDArray[np.uint64]:
    """uint64 [texts, bands]."""
    bands = minima.reshape(-1, banding.bands, banding.rows).astype(np.uint64)
    bucket = mix64(np.arange(1, banding.bands + 1, dtype=np.uint64))
    for row in range(banding.rows):
        bucket = mix64(bucket * GOLDEN + bands[:, :, row])
    return bucket


def _batches(texts: Sequence[str]) -> Iterator[slice]:
    first = size = 0
    for last, text in enumerate(texts, 1):
        size += len(text)
        if size >= CHARACTERS or last == len(texts):
            yield slice(first, last)
            first, size = last, 0


@lru_cache(maxsize=4)
def _constants(size: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """a_k and b_k, uint64 [size] each."""
    stream = mix64(np.arange(1, 2 * size + 1, dtype=np.uint64) * GOLDEN)
    return stream[::2] | np.uint64(1), stream[1::2]


@lru_cache(maxsize=1)
def _powers(bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """G^(i + 1) and its inverse modulo 2^64, uint64 [2^bits] each: a sum from any place on becomes a sum from 0 on."""
    inverse = np.uint64(pow(int(GOLDEN), -1, 2**64))
    power, back = (np.full(1 << bits, base, np.uint64) for base in (GOLDEN, inverse))
    return np.multiply.accumulate(power), np.multiply.accumulate(back)


def _fold(codes: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """What the characters are compared as, uint32 [characters]."""
    folded = np.take(_FOLDED, codes)
    unknown = np.unique(codes[folded == UNKNOWN])
    if len(unknown):
        _FOLDED[unknown] = [_folded(chr(code)) for code in unknown]
        folded = np.take(_FOLDED, codes)
    return folded


def _folded(character: str) -> int:
    """Of a letter its lower case without accents, if that is one letter: a syllable of Hangul stays whole."""
    if unicodedata.category(character).startswith("M"):
        return MARK
    if character.isdecimal():
        return ZERO
    if not character.isalnum():
        return SPACE
    letters = unicodedata.normalize("NFD", character.lower())
    base = [each for each in letters if not unicodedata.category(each).startswith("M")]
    return ord(base[0] if len(base) == 1 else character)
