"""A seeded generator of text: sentences of a small grammar whose content words follow Zipf's law.

The same arguments give the same bytes on every machine and Python: only `random.Random(int).random()` is drawn from,
which Python promises never to change (its `choice` and `shuffle` are not promised), and the weights are sums of 1/k,
which IEEE arithmetic rounds alike everywhere.
"""

import inspect
from bisect import bisect
from collections.abc import Callable, Iterator
from itertools import accumulate
from random import Random
from typing import Any

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
_SHAPES = (  # d: determiner, p: preposition (both shared by all domains), n a v: noun, adjective, verb of the domain
    "dnvdn", "danvdn", "dnvdan", "dnvpdn", "dnvdnpdn", "danvpdan", "pdndnvdn",
)  # fmt: skip
_CLOSED = {"d": ("the", "a", "this", "every", "no"), "p": ("in", "on", "of", "with", "under", "before")}


def generate(
    documents: int = 100, words: int = 200, vocabulary: int = 500, repetition: float = 0.0, noise: float = 0.0,
    domain: int = 0, seed: int = 0,
) -> Iterator[str]:  # fmt: skip
    """Yields `documents` texts of at least `words` words each.

    Args:
        vocabulary: nouns, adjectives and verbs together; another `domain` has other ones, whatever the seed.
        repetition: chance that a sentence repeats an earlier one of its document, word for word.
        noise: chance that a word is replaced by random letters.
    """
    lexicon = _lexicon(vocabulary, domain)
    weights = list(accumulate(1 / rank for rank in range(1, vocabulary // 3 + 1)))
    for number in range(documents):
        draw = Random(draw_key(seed, domain, number)).random
        yield _document(draw, lexicon, weights, words, repetition, noise)


def documents(arguments: str = "") -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields (id, text, {}) for "documents=10,noise=0.1": the arguments of `generate`. ValueError names a wrong one."""
    chosen = parsed("synthetic", generate, arguments)
    if chosen["vocabulary"] < 3:
        raise ValueError("synthetic: vocabulary takes at least 3 words, a noun, an adjective and a verb")
    for number, text in enumerate(generate(**chosen)):
        yield str(number), text, {}


def parsed(prefix: str, generate: Callable[..., Any], arguments: str) -> dict[str, Any]:
    """The arguments of `generate`, as "NAME=VALUE,..." sets them or by default. ValueError names a wrong one."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(generate).parameters.items()}
    chosen = dict(defaults)
    for argument in filter(None, arguments.split(",")):
        name, _, value = argument.partition("=")
        if name not in defaults:
            raise ValueError(f"{prefix}:{argument}: no argument {name!r}; there are {', '.join(defaults)}")
        try:
            chosen[name] = type(defaults[name])(value)
        except ValueError:
            raise ValueError(f"{prefix}:{argument}: {name} takes a number like {defaults[name]}") from None
    return chosen


def draw_key(*parts: int) -> int:
    """One integer for a tuple of integers below 2**64, injectively."""
    return sum(part % 2**64 << 64 * position for position, part in enumerate(parts))


def pick(draw: Callable[[], float], items: Any) -> Any:
    return items[int(draw() * len(items))]


def _lexicon(vocabulary: int, domain: int) -> dict[str, list[str]]:
    draw = Random(draw_key(domain, 1)).random
    found: dict[str, None] = {}  # a dict, for its order
    size = vocabulary // 3
    while len(found) < 3 * size:
        found["".join(pick(draw, _SYLLABLES) for _ in range(2 + int(draw() * 3)))] = None
    ordered = list(found)
    return {"n": ordered[:size], "a": ordered[size : 2 * size], "v": ordered[2 * size :]}


def _document(
    draw: Callable[[], float], lexicon: dict[str, list[str]], weights: list[float], words: int, repetition: float,
    noise: float,
) -> str:  # fmt: skip
    sentences: list[str] = []
    length = 0
    while length < words:
        again = sentences and draw() < repetition
        sentence = pick(draw, sentences) if again else _sentence(draw, lexicon, weights, noise)
        sentences.append(sentence)
        length += sentence.count(" ") + 1
    return " ".join(sentences) + "\n"


def _sentence(draw: Callable[[], float], lexicon: dict[str, list[str]], weights: list[float], noise: float) -> str:
    words = []
    for kind in pick(draw, _SHAPES):
        if kind in _CLOSED:
            word = pick(draw, _CLOSED[kind])
        else:
            word = lexicon[kind][bisect(weights, draw() * weights[-1], hi=len(weights) - 1)]
        if draw() < noise:
            word = "".join(pick(draw, "abcdefghijklmnopqrstuvwxyz") for _ in word)
        words.append(word)
    return " ".join(words).capitalize() + "."
