"""Scores of documents against plain references: a classifier in float64, a trigram in fractions, sorted quantiles."""

import hashlib
import math
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.errors import DataError
from thriftlab.data.order import permute
from thriftlab.data.prepare.scores import classifier, pools, trigram
from thriftlab.data.prepare.scores.tally import add, tally
from thriftlab.data.prepare.scores.words import IDS, hash_words, word_ids

# -------------------------------------------------------------------------------------------------------------- words


def plain_hash(word):
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def plain_mix(x):
    """The finaliser of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def plain_buckets(words):
    hashes = [plain_hash(word) for word in words]
    pairs = [(a * 0x9E3779B97F4A7C15 + b) % 2**64 for a, b in zip(hashes, hashes[1:], strict=False)]
    return [plain_mix(h) >> 46 for h in hashes + pairs]


def test_words_and_their_hashes():
    text, words = "Don't PANIC -- it's\n42%!\tÀ", ["don", "'", "t", "panic", "--", "it", "'", "s", "42", "%!", "à"]
    assert hash_words(text).tolist() == [plain_hash(word) for word in words]
    assert word_ids(text).tolist() == [plain_hash(word) * IDS >> 64 for word in words]
    assert classifier.ngrams(text).tolist() == plain_buckets(words)
    assert len(hash_words(" \n")) == len(classifier.ngrams("")) == len(word_ids("")) == 0


def test_a_full_cache_of_words_is_emptied(monkeypatch):
    texts = list(generate(documents=3, noise=0.5))
    before = [hash_words(text).tolist() for text in texts]
    monkeypatch.setattr("thriftlab.data.prepare.scores.words.LARGEST_CACHE", 50)
    assert [hash_words(text).tolist() for text in texts] == before


# --------------------------------------------------------------------------------------------------------- classifier


def mixed(kind, documents, seed):
    """Every fifth sentence of a document is of its own kind, the others of a kind that both share."""
    own = generate(documents=documents, words=30, domain=kind, seed=seed)
    shared = generate(documents=documents, words=120, domain=2, seed=seed + kind)
    return [f"{a}{b}" for a, b in zip(own, shared, strict=True)]


POSITIVE, NEGATIVE = mixed(1, 40, 0), mixed(0, 25, 0)
TEXTS = [*mixed(1, 20, 7), *mixed(0, 20, 7)]


@pytest.fixture(scope="module")
def trained():
    return classifier.train(POSITIVE, NEGATIVE, seed=3)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def plain_words(text):
    """The made-up text has words of letters and full stops only."""
    return text.lower().replace(".", " . ").split()


def plain_bag(text):
    buckets = plain_buckets(plain_words(text))
    return {bucket: count / len(buckets) for bucket, count in Counter(buckets).items()}


def adagrad(positive, negative, seed):
    """Logistic regression in float64 dictionaries: classes take turns, each in the keyed order of its epoch."""
    bags = [list(map(plain_bag, negative)), list(map(plain_bag, positive))]
    weights, squares = Counter(), Counter()
    for step in range(classifier.EPOCHS * max(map(len, bags))):
        for label, pool in enumerate(bags):
            epoch, place = divmod(step, len(pool))
            bag = pool[int(permute(place, len(pool), 2 * seed + label, epoch))]
            error = label - sigmoid(sum(weights[b] * x for b, x in bag.items()))
            for b, x in bag.items():
                squares[b] += (error * x) ** 2
                weights[b] += classifier.RATE * error * x / (math.sqrt(squares[b]) or 1)
    return weights


def auc(positive, negative):
    """How often a positive is above a negative; equal counts half."""
    difference = np.subtract.outer(np.asarray(positive, float), np.asarray(negative, float))
    return (np.sign(difference).mean() + 1) / 2


def test_classifier_is_logistic_regression(trained):
    weights = adagrad(POSITIVE, NEGATIVE, seed=3)
    wanted = [sigmoid(sum(weights[b] * x for b, x in plain_bag(text).items())) for text in TEXTS]
    found = trained.score(TEXTS) / classifier.UNIT
    assert np.abs(found - wanted).max() < 2e-3
    assert 0.02 < np.min(wanted) < 0.4 < 0.6 < np.max(wanted) < 0.98  # so that the comparison says something


def test_a_document_may_be_one_word_many_times():
    positive, negative = ["again . " * 4000, "so it is ."], ["other . " * 9, "it is so ."]
    weights, found = adagrad(positive, negative, seed=0), classifier.train(positive, negative)
    for text in positive + negative:
        wanted = sigmoid(sum(weights[b] * x for b, x in plain_bag(text).items()))
        assert abs(found.score([text])[0] / classifier.UNIT - wanted) < 2e-3


def test_classifier_ranks_like_a_fit_to_the_end(trained):
    """Of full gradient descent in float64, on words and pairs that are not hashed."""

    def grams(text):
        words = plain_words(text)
        counts = Counter([*words, *zip(words, words[1:], strict=False)])
        return {gram: count / (2 * len(words) - 1) for gram, count in counts.items()}

    bags, labels = [grams(text) for text in NEGATIVE + POSITIVE], np.repeat([0, 1], [len(NEGATIVE), len(POSITIVE)])
    column = {gram: i for i, gram in enumerate({gram: None for bag in bags for gram in bag})}

    def matrix(bags):
        x = np.zeros((len(bags), len(column)))
        for row, bag in enumerate(bags):
            for gram, value in bag.items():
                if gram in column:
                    x[row, column[gram]] = value
        return x

    x, balance, w = matrix(bags), np.where(labels, 1 / len(POSITIVE), 1 / len(NEGATIVE)), np.zeros(len(column))
    for _ in range(500):
        w += 200 * x.T @ (balance * (labels - 1 / (1 + np.exp(-x @ w))))
    reference, found = matrix([grams(text) for text in TEXTS]) @ w, trained.score(TEXTS)
    assert auc(found[:20], found[20:]) > auc(reference[:20], reference[20:]) - 0.02 > 0.9
    assert ((found > classifier.UNIT // 2) == np.repeat([True, False], 20)).mean() >= 0.9


def test_probabilities_are_the_rounded_sigmoid():
    logits = np.random.default_rng(0).integers(-(2**20), 2**20, 5000)
    wanted = [round(classifier.UNIT * sigmoid(z / classifier.UNIT)) for z in logits.tolist()]
    assert classifier.probability(logits).tolist() == wanted
    assert [*map(int, map(classifier.probability, (-(2**40), 0, 2**40)))] == [0, 2**15, 2**16]


def test_scores_do_not_depend_on_the_batch(trained):
    whole = trained.score(TEXTS)
    assert whole.dtype == np.int32 and trained.weights.dtype == np.int32
    for size in (1, 7, 19):
        parts = [trained.score(TEXTS[i : i + size]) for i in range(0, len(TEXTS), size)]
        assert np.concatenate(parts).tolist() == whole.tolist()
    assert pickle.loads(pickle.dumps(trained)).score(reversed(TEXTS)).tolist() == whole[::-1].tolist()
    assert trained.score(["", " "]).tolist() == [2**15, 2**15] and trained.score([]).tolist() == []


def test_classes_are_balanced():
    """One document against many: what is of neither kind is in the middle, and either kind is known."""
    text = "up down left right"
    one = classifier.train(["left right"], ["up down"] * 30)
    other = classifier.train(["left right"] * 30, ["up down"])
    assert one.score([text, "x y"]).tolist() == other.score([text, "x y"]).tolist() and one.documents == (30, 1)
    assert one.score(["up down"]) < 2000 and one.score(["left right"]) > 63536 and one.score(["x y"]) == 2**15


def test_training_ends_at_its_largest_number_of_ngrams(monkeypatch):
    monkeypatch.setattr(classifier, "LARGEST", 800)
    taken = next(n for n in range(40) if sum(len(classifier.ngrams(text)) for text in POSITIVE[:n]) >= 800)
    found = classifier.train(iter(POSITIVE), NEGATIVE)
    assert found.documents[1] == taken < 5
    assert found.weights.tolist() == classifier.train(POSITIVE[:taken], NEGATIVE).weights.tolist()


def test_a_class_without_text_is_refused():
    with pytest.raises(DataError, match="quality.negative.*no text"):
        classifier.train(["good"], ["", " "])
    with pytest.raises(DataError, match="quality.positive.*no text"):
        classifier.train([], ["bad"])


# ------------------------------------------------------------------------------------------------------------ trigram

VOCABULARY = 50
DOCUMENTS = [word_ids(text) % VOCABULARY for text in generate(documents=30, words=40, vocabulary=60)]
OTHERS = [*(word_ids(text) % VOCABULARY for text in generate(documents=8, words=30, vocabulary=60, seed=5)), [49] * 9]


def plain_nats(documents, vocabulary, scored):
    """Chen & Goodman 1998, section 2.7, in fractions, with dictionaries; nats of the mean token of `scored`."""
    counts = [Counter() for _ in range(3)]
    for ids in documents:
        padded = ["<s>", "<s>", *map(int, ids)]
        for i in range(2, len(padded)):
            for n in range(3):
                counts[n][tuple(padded[i - n : i + 1])] += 1
    followers = [{} for _ in range(3)]
    for n, table in enumerate(counts):
        for gram, count in table.items():
            followers[n].setdefault(gram[:-1], []).append(count)

    def p(gram):
        if not gram:
            return Fraction(1, vocabulary)
        lower, after = p(gram[1:]), followers[len(gram) - 1].get(gram[:-1])
        if not after:
            return lower
        kept = max(counts[len(gram) - 1][gram] - Fraction(3, 4), 0)
        return (kept + Fraction(3, 4) * len(after) * lower) / sum(after)

    padded = ["<s>", "<s>", *map(int, scored)]
    return -sum(math.log(p(tuple(padded[i - 2 : i + 1]))) for i in range(2, len(padded))) / len(scored)


def test_trigram_is_absolute_discounting():
    found = trigram.train(DOCUMENTS, VOCABULARY).score(OTHERS) / trigram.UNIT
    wanted = [plain_nats(DOCUMENTS, VOCABULARY, ids) for ids in OTHERS]
    assert np.abs(found - wanted).max() < 2 / trigram.UNIT
    assert max(wanted) - min(wanted) > 1


def test_a_document_that_was_counted_is_scored_without_itself():
    model = trigram.train(DOCUMENTS, VOCABULARY)
    found = model.score(DOCUMENTS, own=True)
    for i in range(len(DOCUMENTS)):
        without = trigram.train(DOCUMENTS[:i] + DOCUMENTS[i + 1 :], VOCABULARY)
        assert found[i] == without.score([DOCUMENTS[i]])[0]
    assert found.mean() > model.score(DOCUMENTS).mean() + trigram.UNIT / 10
    alone = trigram.train([DOCUMENTS[0]], VOCABULARY)
    assert abs(alone.score([DOCUMENTS[0]], own=True)[0] / trigram.UNIT - math.log(VOCABULARY)) < 1e-4


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_own_counts_of_any_documents(data):
    ids = st.lists(st.integers(0, 2), max_size=8)
    documents = data.draw(st.lists(ids, min_size=1, max_size=5))
    own = data.draw(st.lists(st.booleans(), min_size=len(documents), max_size=len(documents)))
    model = trigram.train(documents, 3)
    wanted = [
        (trigram.train(documents[:i] + documents[i + 1 :], 3) if flag else model).score([documents[i]])[0]
        for i, flag in enumerate(own)
    ]
    assert model.score(documents, own).tolist() == wanted


def test_trigrams_are_counted_part_by_part():
    whole = trigram.train(DOCUMENTS, VOCABULARY)
    parts = [trigram.count(DOCUMENTS[i : i + 7]) for i in range(0, len(DOCUMENTS), 7)]
    for order in (parts, parts[::-1], [add(parts[:2]), add(parts[2:])]):
        assert trigram.model(add(order), VOCABULARY, 30).score(OTHERS).tolist() == whole.score(OTHERS).tolist()


def test_nats_do_not_depend_on_the_batch():
    model = trigram.train(DOCUMENTS, VOCABULARY)
    whole = model.score(OTHERS)
    assert whole.dtype == np.int32
    assert [model.score([ids])[0] for ids in OTHERS] == whole.tolist()
    assert pickle.loads(pickle.dumps(model)).score(OTHERS[::-1]).tolist() == whole[::-1].tolist()
    assert model.score([[], [1], []], own=[True, False, False])[[0, 2]].tolist() == [0, 0]
    assert model.score([]).tolist() == []


def test_training_ends_at_its_largest_number_of_tokens(monkeypatch):
    monkeypatch.setattr(trigram, "LARGEST", 200)
    taken = next(n for n in range(30) if sum(map(len, DOCUMENTS[:n])) >= 200)
    found = trigram.train(iter(DOCUMENTS), VOCABULARY)
    assert found.documents == taken
    assert found.levels[2].grams.counts.sum() == sum(map(len, DOCUMENTS[:taken]))


def test_logarithms():
    p = np.concatenate([np.random.default_rng(0).random(5000), [1, 0.5, 2.0**-40, np.nextafter(1, 0)]])
    assert np.abs(trigram.nats(p) + trigram.UNIT * np.log(p)).max() < 1.1
    assert abs((trigram.nats(p) + trigram.UNIT * np.log(p)).mean()) < 0.02


def test_the_largest_vocabulary():
    top = 2**21 - 2
    ids = [top, 0, top, top]
    model = trigram.train([ids], top + 1)
    assert abs(model.score([ids])[0] / trigram.UNIT - plain_nats([ids], top + 1, ids)) < 2 / trigram.UNIT
    with pytest.raises(DataError, match="at most 2097151 tokens"):
        trigram.train([ids], top + 2)


# ------------------------------------------------------------------------------------------------- tallies and pools

INTEGERS = st.lists(st.integers(-5, 30), max_size=60)


@given(st.lists(INTEGERS, max_size=5), st.randoms(use_true_random=False))
def test_tallies_add_up(parts, random):
    whole = Counter(value for part in parts for value in part)
    tallies = [tally(part) for part in parts]
    random.shuffle(tallies)
    for found in (add(tallies), add([add(tallies[:2]), add(tallies[2:])])):
        assert found.values.tolist() == sorted(whole) and found.counts.tolist() == [whole[v] for v in sorted(whole)]


@given(INTEGERS.filter(len), st.integers(1, 12))
def test_pools_are_cut_at_quantiles(scores, count):
    ends = pools.cuts(tally(scores), count)
    ordered = sorted(scores)
    assert ends.tolist() == [ordered[-(-k * len(scores) // count) - 1] for k in range(1, count)]
    if count in (2, 4, 8):
        shares = np.arange(1, count) / count
        assert ends.tolist() == np.quantile(scores, shares, method="inverted_cdf").tolist()
    found = pools.pool_of(np.array(scores, np.int32), ends)
    assert found.tolist() == [sum(end < score for end in ends) for score in scores]
    for k, end in enumerate(ends):
        assert ((found <= k) == (np.array(scores) <= end)).all()


def test_pools_of_distinct_scores_are_of_one_size():
    scores = np.random.default_rng(0).permutation(1000).astype(np.int32)
    found = pools.pool_of(scores, pools.cuts(tally(scores), 4))
    assert np.bincount(found).tolist() == [250] * 4 and (np.sort(found) == found[np.argsort(scores)]).all()
    parts = add(tally(part) for part in np.array_split(scores, 7))
    assert pools.cuts(parts, 4).tolist() == [249, 499, 749]


def test_pools_of_nothing_are_refused():
    with pytest.raises(DataError, match="no document has a score"):
        pools.cuts(tally([]), 4)


# ---------------------------------------------------------------------------------------------------------- the bytes


BYTES = {
    "sigmoid": "7d3ffa2d418d779a6fe22701dd66306fbbb360cb2c5303bd666a7a51dd6cdbb2",
    "logarithms": "cb3fd3ed8f536c4c3c875f541ce914b830a661db23cef4517c95c2aeb120fa76",
    "weights": "6bca9c4658a8a4864664191bfeb2f7dd6b63f537deab479e066282ccdcf172d7",
    "classifier": "45e18a02006ac827ffd2f313f7269528688414e8d7e1bd7b8323ff9ee55e7603",
    "trigrams": "3babf396c1e9c19fcba3e49d9473e9ec2f9ebe0781c943c55d93aaeaf79d85f3",
    "nats": "e045a48ed73ac2d4933c07e1ad063c8f5e0bbd295973b0f1aaf39ecb00fd59e0",
    "own": "9be0807fe759d460183e394a5a81cd02a9140e5285c7d061d59e48f7e70da484",
}


def sha256(array, dtype):
    return hashlib.sha256(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).tobytes()).hexdigest()


def test_the_same_bytes_on_every_machine(trained):
    """Another platform, numpy or C library must not change them; a change of the method does, by design."""
    model = trigram.train(map(word_ids, POSITIVE), IDS)
    found = {
        "sigmoid": sha256(classifier.STEPS, "i8"),
        "logarithms": sha256(trigram.LOGARITHMS, "i8"),
        "weights": sha256(trained.weights, "i4"),
        "classifier": sha256(trained.score(TEXTS), "i4"),
        "trigrams": sha256(np.concatenate(model.levels[2].grams), "i8"),
        "nats": sha256(model.score(list(map(word_ids, TEXTS))), "i4"),
        "own": sha256(model.score(list(map(word_ids, POSITIVE)), own=True), "i4"),
    }
    assert found == BYTES
