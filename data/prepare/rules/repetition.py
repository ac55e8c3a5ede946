"""Gopher's repetition rules (arXiv 2112.11446, table A1), as FineWeb applies them (datatrove 0.10).

Only the second and later occurrences of something are duplicates. Shares are of the characters of the whole text.

Word n-grams are counted on numbers. The most frequent one: a word is its number in the text's vocabulary, and an n-gram
a number with these as digits. Duplicates are n-grams whose words, joined *without* spaces, occurred before, so that
"to day" repeats "today"; a walk along the text passes over the words of each duplicate that it finds. Only n-grams
whose hash occurs twice can be duplicates, and only these are looked at by the walk, as strings: what it finds does not
depend on the hash.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.rules import Text, register

FAMILIES = ("gopher", "gopher-repetition")
TOP = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
_INVERSE = pow(_BASE, -1, 2**64)

Integers = NDArray[np.int64]
Hashes = NDArray[np.uint64]


def repetition(name: str, most: float):
    return register(name, {"most": most}, FAMILIES, late=True)


# --- lines and paragraphs --------------------------------------------------------------------------------------------


def _paragraphs(text: Text) -> tuple[int, int, int]:
    """Of what two line ends or more separate."""
    return _duplicates([part.lstrip("\n") for part in text.strip().split("\n\n") if part])


def _lines(text: Text) -> tuple[int, int, int]:
    """Of what line ends separate; those at the beginning and at the end leave an empty line there."""
    return _duplicates([*filter(None, text.split("\n")), *[""] * (text.startswith("\n") + text.endswith("\n"))])


def _duplicates(parts: list[str]) -> tuple[int, int, int]:
    """How many are duplicates, their characters, how many there are."""
    once = set(parts)
    return len(parts) - len(once), sum(map(len, parts)) - sum(map(len, once)), len(parts)


@repetition("gopher-duplicate-paragraphs", 0.30)
def paragraphs(text: Text) -> float:
    """duplicate paragraphs, of all paragraphs"""
    count, _, total = text.shared(_paragraphs)
    return count / total


@repetition("gopher-duplicate-paragraph-characters", 0.20)
def paragraph_characters(text: Text) -> float:
    """characters in duplicate paragraphs, of all characters"""
    return text.shared(_paragraphs)[1] / len(text)


@repetition("gopher-duplicate-lines", 0.30)
def lines(text: Text) -> float:
    """duplicate lines, of all lines"""
    count, _, total = text.shared(_lines)
    return count / total


@repetition("gopher-duplicate-line-characters", 0.20)
def line_characters(text: Text) -> float:
    """characters in duplicate lines, of all characters"""
    return text.shared(_lines)[1] / len(text)


# --- the most frequent n-gram ----------------------------------------------------------------------------------------


class _Numbered(NamedTuple):
    words: Integers  # number of each word in the vocabulary: [words]
    size: int  # of the vocabulary


def _numbered(text: Text) -> _Numbered:
    numbers = {word: number for number, word in enumerate(dict.fromkeys(text.words))}
    return _Numbered(np.fromiter(map(numbers.__getitem__, text.words), np.int64, len(text.words)), len(numbers))


def _grams(text: Text, n: int) -> Integers:
    """A number for each n-gram, the same for the same words: [n-grams]."""
    words, size = text.shared(_numbered)
    grams, bound = words, size
    for offset in range(1, n):
        if bound > (2**63 - 1) // size:
            values, grams = np.unique(grams, return_inverse=True)
            bound = len(values)
        grams, bound = grams[: len(words) - offset] * size + words[offset:], bound * size
    return grams


def _top(text: Text, n: int) -> float:
    """Characters of the most frequent n-gram, with its spaces, times its occurrences; the first of equally frequent."""
    if len(text.words) < n:
        return 0.0
    grams = _grams(text, n)
    ordered = np.sort(grams)
    first_of = np.concatenate(([True], ordered[1:] != ordered[:-1], [True]))  # of a run of equal ones; and the end
    edges = np.flatnonzero(first_of)  # [runs + 1]
    counts = edges[1:] - edges[:-1]
    most = int(counts.max())
    first = int(_among(grams, ordered[edges[:-1][counts == most]]).argmax()) if most > 1 else 0
    return (sum(map(len, text.words[first : first + n])) + n - 1) * most / len(text)


def _among(values: NDArray[Any], some: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each value is one of `some`, which is sorted."""
    return some[np.minimum(np.searchsorted(some, values), len(some) - 1)] == values


# --- duplicate n-grams -----------------------------------------------------------------------------------------------


class _Joined(NamedTuple):
    characters: str  # of all words, without space
    starts: Integers  # where each word begins, and the end: [words + 1]
    prefixes: Hashes  # sum of character * _BASE**place before each of `starts`, modulo 2**64: [words + 1]
    inverses: Hashes  # _BASE**-start: [words + 1]


def _joined(text: Text) -> _Joined:
    characters = "".join(text.words)
    codes = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), np.uint32)  # [characters]
    starts = np.zeros(len(text.words) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, text.words), np.int64, len(text.words)), out=starts[1:])
    length = _power_of_two(len(characters) + 1)
    prefixes = np.zeros(len(characters) + 1, np.uint64)
    np.cumsum(codes * _powers(_BASE, length)[: len(characters)], out=prefixes[1:])
    return _Joined(characters, starts, prefixes[starts], _powers(_INVERSE, length)[starts])


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


@cache
def _powers(base: int, count: int) -> Hashes:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _repeated(text: Text) -> dict[int, int]:
    """n -> characters of the duplicate n-grams."""
    characters, starts, prefixes, inverses = text.shared(_joined)
    hashes = [(prefixes[n:] - prefixes[:-n]) * inverses[:-n] for n in DUPLICATE]  # each: [n-grams]
    ordered = np.sort(np.concatenate(hashes))
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return dict.fromkeys(DUPLICATE, 0)
    places = {n: np.flatnonzero(_among(each, twice)) for n, each in zip(DUPLICATE, hashes, strict=True)}
    return {n: _walk(characters, starts, places[n], n) for n in DUPLICATE}


def _walk(characters: str, starts: Integers, places: Integers, n: int) -> int:
    """Along `places`, which n-grams that occur twice are among: characters of the duplicates."""
    found, free, seen = 0, 0, set[str]()
    for place, start, end in zip(places.tolist(), starts[places].tolist(), starts[places + n].tolist(), strict=True):
        if place < free:
            continue
        gram = characters[start:end]
        if gram in seen:
            found, free = found + end - start, place + n
        else:
            seen.add(gram)
    return found


def _top_rule(n: int) -> None:
    def top(text: Text) -> float:
        return _top(text, n)

    top.__doc__ = f"characters in the most frequent {n} words in a row, of all characters"
    repetition(f"gopher-top-{n}-grams", TOP[n])(top)


def _duplicate_rule(n: int) -> None:
    def duplicate(text: Text) -> float:
        return text.shared(_repeated)[n] / len(text)

    duplicate.__doc__ = f"characters in duplicate sequences of {n} words, of all characters"
    repetition(f"gopher-duplicate-{n}-grams", DUPLICATE[n])(duplicate)


for n in TOP:
    _top_rule(n)
for n in DUPLICATE:
    _duplicate_rule(n)
