"""Probability that a document is of the positive kind: logistic regression on a bag of words and pairs of words.

The features are those of fastText (Joulin et al., 1607.01759): the mean over a document's words and neighbouring pairs,
hashed into buckets. It is linear without a hidden layer, one weight a bucket, and trained one document at a time with
AdaGrad (Duchi et al. 2011), because rare words need larger steps than "the".

Everything is in integers: weights and logits are fixed point, the sigmoid is a table. Sums of integers have no order,
so a score is the same on every machine, in every batch. Documents that it was trained on are scored too well.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.order import GOLDEN, mix64, stream
from thriftlab.data.prepare.scores.words import hash_words

BUCKET_BITS = 18
UNIT = 1 << 16  # of a probability, a logit and a finished weight
FINE = 4  # bits that a weight has more while it is trained
GRADIENT = 6  # bits that a gradient has more than a probability
RATE, EPOCHS = 4, 3
LARGEST = 2**24  # n-grams of one kind to train on: about 40 MB of text, 130 MB of memory

# The sigmoid, rounded to nearest: the probability is k/UNIT from the k-th of these logits on.
STEPS = np.array([math.ceil(UNIT * math.log((k - 0.5) / (UNIT - k + 0.5))) for k in range(1, UNIT + 1)])  # [UNIT]


class Bag(NamedTuple):
    """A document: its buckets, how often each occurs, and the sum of that."""

    buckets: NDArray[np.int32]  # [distinct]
    counts: NDArray[np.int32]  # [distinct]
    size: int


class Classifier(NamedTuple):
    weights: NDArray[np.int32]  # [buckets]
    documents: tuple[int, int]  # it was trained on: negative, positive

    def score(self, texts: Iterable[str]) -> NDArray[np.int32]:
        """Probabilities of texts in units of 1/UNIT, [documents]; one half for a text without words."""
        logits = [mean(self.weights[buckets], len(buckets)) for buckets in map(ngrams, texts)]
        return probability(np.array(logits, np.int64))


def train(positive: Iterable[str], negative: Iterable[str], seed: int = 0) -> Classifier:
    """Learns to tell two kinds apart, as many steps on each, from the first LARGEST n-grams of each."""
    pools = [bags(negative, "quality.negative"), bags(positive, "quality.positive")]
    passes = EPOCHS * max(map(len, pools))
    orders = [stream(0, passes, len(pool), 2 * seed + label)[1] for label, pool in enumerate(pools)]
    weights, squares = np.zeros((2, 1 << BUCKET_BITS), np.int64)
    for rows in zip(*orders, strict=True):
        for label, row in enumerate(rows):
            learn(weights, squares, pools[label][row], label)
    rounded = (weights + (1 << FINE - 1)) >> FINE
    return Classifier(rounded.astype(np.int32), (len(pools[0]), len(pools[1])))


def learn(weights: NDArray[np.int64], squares: NDArray[np.int64], bag: Bag, label: int) -> None:
    """One step of AdaGrad on one document; `squares` are the sums of squared gradients."""
    buckets, counts, size = bag.buckets, bag.counts.astype(np.int64), bag.size
    logit = mean(weights[buckets] * counts, size) >> FINE
    error = label * UNIT - int(probability(logit))
    gradient = (error << GRADIENT) * counts // size
    squares[buckets] += gradient * gradient
    root = np.sqrt(squares[buckets]).astype(np.int64)  # exact: IEEE 754 rounds roots correctly
    weights[buckets] += gradient * (RATE * UNIT << FINE) // np.maximum(root, 1)


def probability(logit: int | NDArray[np.int64]) -> NDArray[np.int32]:
    return np.searchsorted(STEPS, logit, side="right").astype(np.int32)


def mean(parts: NDArray[np.integer], count: int) -> int:
    """Their sum by a count, rounded down; 0 of nothing."""
    return int(parts.sum(dtype=np.int64)) // max(count, 1)


def ngrams(text: str) -> NDArray[np.int64]:
    """Buckets of the words, then of the neighbouring pairs, [2 * words - 1]."""
    words = hash_words(text)
    pairs = words[:-1] * GOLDEN + words[1:]
    return (mix64(np.concatenate([words, pairs])) >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def bags(texts: Iterable[str], name: str) -> list[Bag]:
    found, total = [], 0
    for text in texts:
        buckets, counts = np.unique(ngrams(text), return_counts=True)
        size = int(counts.sum())
        if size:
            found.append(Bag(buckets.astype(np.int32), counts.astype(np.int32), size))
        total += size
        if total >= LARGEST:
            break
    if not found:
        raise DataError(f"{name}: its sources hold no text to train a classifier on; name sources that do")
    return found
