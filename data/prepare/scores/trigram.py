"""Nats per token of a document under a trigram: interpolated absolute discounting (Ney, Essen & Kneser 1994).

    p(w | uv) = max(c(uvw) - D, 0) / c(uv.) + D n(uv.) / c(uv.) p(w | v),    n(uv.): distinct words seen after uv,

and so on down to the uniform distribution, as in Chen & Goodman (1998), with D = 0.75. A token is any integer below a
vocabulary's size: ids of a tokenizer, or hashed words, which need none to be trained first.

A document is cheap for a model that has seen it. So the model is trained on one source that is named, as CCNet's is
on Wikipedia (Wenzek et al., 1911.00359), and a document of that source is scored without its own counts.

Counts are integers, of trigrams alone: all others are sums of them. A probability is a few IEEE operations, each
correctly rounded, and the logarithm is a table: a score is the same on every machine, in every batch.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.prepare.scores.tally import Tally, add, look_up, tally

DISCOUNT = 0.75
UNIT = 1 << 16  # of a nat
ID_BITS = 21  # three ids make a key of 63 bits
START = (1 << ID_BITS) - 1  # stands twice before a document
LARGEST = 2**22  # tokens to train on: about 25 MB of text, 300 MB of memory, a model of 100 MB

FINE = 8  # bits that a logarithm has more than a score
# -ln of the middle of each of 2**16 equal steps from 1/2 to 1, and ln 2.
LOGARITHMS = np.array([round(-(UNIT << FINE) * math.log(0.5 + (i + 0.5) / 2**17)) for i in range(2**16)])  # [65536]
LN2 = round((UNIT << FINE) * math.log(2))

Integers = NDArray[np.int64]


class Level(NamedTuple):
    """What is counted of n-grams for one n; a key is n ids, the predicted one in the lowest bits."""

    grams: Tally
    contexts: Integers  # [contexts], ascending: keys without the predicted id
    totals: Integers  # [contexts]: c(uv.)
    kinds: Integers  # [contexts]: n(uv.)


class Trigram(NamedTuple):
    levels: tuple[Level, ...]  # of one, two and three ids
    vocabulary: int
    documents: int  # it was trained on

    def score(self, documents: Sequence[ArrayLike], own: ArrayLike = False) -> NDArray[np.int32]:
        """Nats per token of documents of ids, in units of 1/UNIT, [documents]; 0 for one without tokens.

        Args:
            own: bool [documents] or one for all: whether the model was trained on it.
        """
        keys, document = trigrams(documents)
        is_own = np.broadcast_to(np.asarray(own, bool), len(documents))[document]
        p = np.full(len(keys), 1 / self.vocabulary)  # [tokens]
        for n, level in enumerate(self.levels, 1):
            p = interpolate(level, keys & (1 << n * ID_BITS) - 1, document, is_own, p)
        sums, sizes = np.zeros((2, len(documents)), np.int64)
        np.add.at(sums, document, nats(p))
        np.add.at(sizes, document, 1)
        return ((sums + sizes // 2) // np.maximum(sizes, 1)).astype(np.int32)


def train(documents: Iterable[ArrayLike], vocabulary: int) -> Trigram:
    """Counts the first LARGEST tokens of documents of ids, up to the end of the document where they are reached."""
    keys, taken, tokens = [np.empty(0, np.int64)], 0, 0
    for ids in documents:
        keys.append(trigrams([ids])[0])
        taken += 1
        tokens += len(keys[-1])
        if tokens >= LARGEST:
            break
    return model(tally(np.concatenate(keys)), vocabulary, taken)


def count(documents: Sequence[ArrayLike]) -> Tally:
    """The trigrams of some documents; `add` makes one tally of several."""
    return tally(trigrams(documents)[0])


def model(counts: Tally, vocabulary: int, documents: int) -> Trigram:
    if vocabulary > START:
        raise DataError(f"a trigram takes a vocabulary of at most {START} tokens, and this one has {vocabulary}")
    levels, grams = [level_of(counts)], counts
    for n in (2, 1):
        grams = add([Tally(grams.values & (1 << n * ID_BITS) - 1, grams.counts)])
        levels.append(level_of(grams))
    return Trigram(tuple(levels[::-1]), vocabulary, documents)


def level_of(grams: Tally) -> Level:
    contexts, starts, kinds = np.unique(grams.values >> ID_BITS, return_index=True, return_counts=True)
    totals = np.add.reduceat(grams.counts, starts) if len(starts) else kinds
    return Level(grams, contexts, totals, kinds)


def trigrams(documents: Sequence[ArrayLike]) -> tuple[Integers, Integers]:
    """The key of every token and the two before it, and the document that it is in, each [tokens]."""
    padded = [np.concatenate([[START, START], np.asarray(ids, np.int64)]) for ids in documents]
    flat = np.concatenate([*padded, np.empty(0, np.int64)])
    last = np.ones(len(flat), bool)  # is the last of a trigram
    starts = np.cumsum([0, *map(len, padded)])[:-1]
    last[starts], last[starts + 1] = False, False
    w = np.flatnonzero(last)
    keys = flat[w - 2] << 2 * ID_BITS | flat[w - 1] << ID_BITS | flat[w]
    return keys, np.repeat(np.arange(len(padded)), [len(ids) - 2 for ids in padded])


def interpolate(
    level: Level, keys: Integers, document: Integers, own: NDArray[np.bool_], lower: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Probabilities of the last ids of the keys, from those with an id less before them, each [tokens]."""
    distinct, gram = np.unique(keys, return_inverse=True)
    before, context = np.unique(distinct >> ID_BITS, return_inverse=True)
    context = context[gram]
    counts = look_up(distinct, *level.grams)[0][gram]
    totals, kinds = (each[context] for each in look_up(before, level.contexts, level.totals, level.kinds))
    if own.any():
        mine = np.flatnonzero(own)
        less = own_counts(document[mine], gram[mine], context[mine], counts[mine])
        counts[mine], totals[mine], kinds[mine] = counts[mine] - less[0], totals[mine] - less[1], kinds[mine] - less[2]
    seen = np.maximum(counts - DISCOUNT, 0) + DISCOUNT * kinds * lower
    return np.where(totals > 0, seen / np.maximum(totals, 1), lower)


def own_counts(
    document: Integers, gram: Integers, context: Integers, counts: Integers
) -> tuple[Integers, Integers, Integers]:
    """What a document adds to the count of each of its n-grams, and to the total and kinds of its context, [tokens]."""
    first, grams, gram_sizes = groups(document << 32 | gram)
    _, contexts, context_sizes = groups(document << 32 | context)
    only_here = counts[first] == gram_sizes  # [distinct n-grams of a document]
    kinds = np.zeros(len(context_sizes), np.int64)
    np.add.at(kinds, contexts[first], only_here)
    return gram_sizes[grams], context_sizes[contexts], kinds[contexts]


def groups(keys: Integers) -> tuple[Integers, Integers, Integers]:
    """Equal keys are a group: the place of its first, [groups]; the group of every key, [keys]; its size, [groups]."""
    return np.unique(keys, return_index=True, return_inverse=True, return_counts=True)[1:]


def nats(p: NDArray[np.float64]) -> Integers:
    """-ln of probabilities in units of 1/UNIT, off by less than two units, [tokens]."""
    mantissa, exponent = np.frexp(p)  # mantissa in [1/2, 1)
    fine = LOGARITHMS[((mantissa - 0.5) * 2**17).astype(np.int64)] - exponent.astype(np.int64) * LN2
    return (fine + (1 << FINE - 1)) >> FINE
