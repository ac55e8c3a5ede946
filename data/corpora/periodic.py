"""Sequences of letters in which looking back pays: the data of a miniature of learning from repeated text (2205.10487).

A letter is followed by one of its own few successors, and about half of the sequences are periodic: they repeat their
first 6 to 31 letters to the end, which a model predicts if it copies what followed before. A sequence is a function of
(seed, number), the successors of the seed alone, drawn as in synthetic.py.
"""

from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from random import Random
from typing import Any

from thriftlab.data.corpora.synthetic import draw_key, parsed, pick

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEF"
SHORTEST, LONGEST = 6, 31  # periods
DECAY = 0.3  # the k-th successor has the weight 1 / k^DECAY


def generate(
    documents: int = 20_000, length: int = 63, successors: int = 6, periodic: float = 0.5, seed: int = 0
) -> Iterator[str]:
    """Yields `documents` sequences of `length` letters.

    Args:
        successors: letters that may follow a letter.
        periodic: chance that a sequence is periodic.
    """
    chain = _chain(successors, seed)
    weights = list(accumulate(round(k**-DECAY, 6) for k in range(1, successors + 1)))  # rounded: alike on all machines
    for number in range(documents):
        draw = Random(draw_key(seed, number, 1)).random
        period = SHORTEST + int(draw() * (LONGEST - SHORTEST + 1)) if draw() < periodic else length
        letters = pick(draw, LETTERS)
        while len(letters) < min(period, length):
            letters += chain[letters[-1]][bisect(weights, draw() * weights[-1], hi=successors - 1)]
        yield (letters * (length // len(letters) + 1))[:length]


def _chain(successors: int, seed: int) -> dict[str, str]:
    """Letter -> its successors, the most frequent first."""
    draw = Random(draw_key(seed, 0, 0)).random
    return {letter: "".join(sorted(LETTERS, key=lambda _: draw())[:successors]) for letter in LETTERS}


def documents(arguments: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (id, text, {}) for "documents=10,length=49": the arguments of `generate`. ValueError names a wrong one."""
    chosen = parsed("periodic", generate, arguments)
    if not 1 <= chosen["successors"] <= len(LETTERS):
        raise ValueError(f"periodic: successors takes 1 to {len(LETTERS)}, the number of letters")
    if chosen["length"] < 1:
        raise ValueError("periodic: length takes at least 1")
    for number, text in enumerate(generate(**chosen)):
        yield str(number), text, {}
