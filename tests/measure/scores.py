"""What the scores of `prepare` cost and how well they tell documents apart.

    OMP_NUM_THREADS=1 python -m tests.measure.scores                     # docstrings beside topics of the embedded text
    OMP_NUM_THREADS=1 python -m tests.measure.scores medium:email medium:spam

Two kinds of text, of the recipe `medium` where they are named so (its packages are downloaded first). Equal documents
are counted once, and a fifth, by a hash, is held out. The classifier is held against logistic regression in float64 on
the same features, scaled to length 1, fitted by L-BFGS with the L2 penalty of four that ranks the held-out documents
best. The trigram is trained on what is not held out of the first kind. Speeds are of CPU time of one process, with
words in the cache where it scores.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
import zlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

from thriftlab.data.corpora import embedded, recipes
from thriftlab.data.corpora.packages import DOWNLOADS
from thriftlab.data.prepare.scores import classifier, trigram
from thriftlab.data.prepare.scores.words import IDS, word_ids

T = TypeVar("T")
BATCH = 500  # documents


def read(place: str) -> list[str]:
    recipe, _, domain = place.partition(":")
    if recipe == "embedded":
        found = embedded.documents(domain)
    else:
        recipes.gather({place: place}, DOWNLOADS)
        found = recipes.documents(place, DOWNLOADS)
    return list(dict.fromkeys(text for _, text, _ in found))


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """To train on, held out."""
    parts: tuple[list[str], list[str]] = [], []
    for text in texts:
        parts[zlib.crc32(text.encode()) % 5 == 0].append(text)
    return parts


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    positives = labels.sum()
    ranks = rankdata(scores)[labels].sum() - positives * (positives + 1) / 2
    return float(ranks / positives / (len(labels) - positives))


def features(texts: list[str]) -> csr_matrix:
    buckets = [classifier.ngrams(text) for text in texts]
    ends = np.cumsum([0, *map(len, buckets)])
    x = csr_matrix((np.ones(ends[-1]), np.concatenate(buckets), ends), (len(texts), 1 << classifier.BUCKET_BITS))
    x.sum_duplicates()
    return x.multiply(1 / np.sqrt(x.multiply(x).sum(1))).tocsr()


def logistic_regression(x: csr_matrix, labels: np.ndarray, penalty: float) -> np.ndarray:
    balance = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ w
        error = balance * (1 / (1 + np.exp(-z)) - labels)
        return balance @ np.logaddexp(0, np.where(labels, -z, z)) + penalty / 2 * w @ w, x.T @ error + penalty * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x


def timed(what: str, texts: list[str], work: Callable[[], T]) -> T:
    start = time.process_time()
    result = work()
    seconds, size = time.process_time() - start, sum(len(text.encode()) for text in texts)
    print(f"| {what} | {len(texts)} | {size / 1e6:.1f} | {len(texts) / seconds:,.0f} | {size / 1e6 / seconds:.1f} |")
    return result


def in_batches(score: Callable[[list[str]], np.ndarray], texts: list[str]) -> np.ndarray:
    return np.concatenate([score(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("positive", nargs="?", default="embedded:docstrings")
    parser.add_argument("negative", nargs="?", default="embedded:topics")
    asked = parser.parse_args()
    pairs = [split(read(place)) for place in (asked.positive, asked.negative)]
    (positive, more), (negative, others) = pairs
    known, held_out = positive + negative, more + others
    known_labels, labels = np.arange(len(known)) < len(positive), np.arange(len(held_out)) < len(more)

    print(f"{asked.positive} beside {asked.negative}\n")
    print("| step | documents | MB | documents/s | MB/s |\n|---|---|---|---|---|")
    judge = timed("classifier, training", known, lambda: classifier.train(positive, negative))
    judge.score(held_out)  # fills the cache of words
    found = timed("classifier, scores", held_out, lambda: in_batches(judge.score, held_out))
    model = timed("trigram, training", positive, lambda: trigram.train(map(word_ids, positive), IDS))
    own = timed(
        "trigram, scores of its own documents", positive,
        lambda: in_batches(lambda texts: model.score(list(map(word_ids, texts)), own=True), positive),
    )  # fmt: skip
    nats = timed(
        "trigram, scores", held_out,
        lambda: in_batches(lambda texts: model.score(list(map(word_ids, texts))), held_out),
    )  # fmt: skip
    flattered = model.score(list(map(word_ids, positive)))

    print("\n| held-out documents | accuracy | AUC |\n|---|---|---|")
    right = (found > classifier.UNIT // 2) == labels
    print(f"| classifier, integers | {right.mean():.4f} | {auc(found, labels):.5f} |")
    x, y = features(known), features(held_out)
    fits = [y @ logistic_regression(x, known_labels, penalty) for penalty in (1e-6, 1e-5, 1e-4, 1e-3)]
    best = max(fits, key=lambda z: auc(z, labels))
    print(f"| logistic regression, float64 | {((best > 0) == labels).mean():.4f} | {auc(best, labels):.5f} |")
    print(f"| trigram of {asked.positive} | | {auc(-nats, labels):.5f} |")

    print("\n| nats per word, median | |\n|---|---|")
    rows = {
        "trained on, counted": flattered,
        "trained on, without itself": own,
        f"held out, {asked.positive}": nats[labels],
        f"held out, {asked.negative}": nats[~labels],
    }
    for name, values in rows.items():
        print(f"| {name} | {np.median(values) / trigram.UNIT:.3f} |")


if __name__ == "__main__":
    main()
