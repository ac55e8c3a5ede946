"""Signatures against plain integers, banding against its probabilities, forests against a plain union-find."""

import hashlib
import itertools
import re
import tracemalloc
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data.errors import DataError
from thriftlab.data.order import permute
from thriftlab.data.prepare import minhash, near
from thriftlab.data.prepare.minhash import Banding, buckets_of, shingles, signatures, word_hashes

FINEWEB = Banding(14, 8)

# ------------------------------------------------------------------------------- plain references, from the definitions

FULL, G = 2**64, 0x9E3779B97F4A7C15


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % FULL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % FULL
    return x ^ (x >> 31)


def plain_words(text):
    """Lower case, numbers as 0, NFD without marks, all but letters and digits separates."""
    text = unicodedata.normalize("NFD", re.sub(r"\d+", "0", text).lower())
    return re.findall(r"[^\W_]+", "".join(c for c in text if unicodedata.category(c)[0] != "M"))


def plain_shingles(text, width=5):
    words = plain_words(text)
    return {tuple(words[i : i + width]) for i in range(len(words) - width + 1)}


def plain_word_hash(word):
    return mix(sum(ord(c) * G**i for i, c in enumerate(word)) % FULL)


def plain_signature(text, size, width=5):
    values = [
        sum(plain_word_hash(w) * G ** (width - 1 - j) for j, w in enumerate(s)) for s in plain_shingles(text, width)
    ]
    constants = [mix(k * G % FULL) for k in range(1, 2 * size + 1)]
    pairs = zip(constants[::2], constants[1::2], strict=True)
    return [min(((a | 1) * x + b) % FULL >> 32 for x in values) for a, b in pairs]


def plain_buckets(text, banding):
    signature = plain_signature(text, banding.bands * banding.rows, banding.words)
    buckets = []
    for band in range(banding.bands):
        bucket = mix(band + 1)
        for value in signature[band * banding.rows : (band + 1) * banding.rows]:
            bucket = mix((bucket * G + value) % FULL)
        buckets.append(bucket)
    return buckets


def plain_forest(edges):
    """Union-find that keeps the smaller root: {document: root} of all that are not roots."""
    root = {}

    def find(x):
        while x in root:
            x = root[x]
        return x

    for a, b in edges:
        a, b = sorted((find(a), find(b)))
        if a != b:
            root[b] = a
    return {x: find(x) for x in root}


def as_map(forest):
    assert forest.dtype == np.int64 and forest.shape == (len(forest), 2)
    assert forest.tolist() == sorted(forest.tolist())
    return {other: root for root, other in forest.tolist()}


# -------------------------------------------------------------------------------------------------- synthetic documents


def word(number):
    """The number as letters: of other numbers other words."""
    letters = ""
    while number or not letters:
        number, letter = divmod(number, 26)
        letters += chr(97 + letter)
    return letters


def words_of(document, count):
    """`count` words that no other document has."""
    return [word(n) for n in permute(np.arange(count) + document * 1000, 10**9, 0, 0)]


def edited(words, document, share):
    """A copy with about this share of the words replaced, by new ones."""
    draw = permute(np.arange(len(words)), 10**6, document, 1) / 10**6
    fresh = words_of(document + 10**5, len(words))
    return [new if d < share else old for old, new, d in zip(words, fresh, draw, strict=True)]


def jaccard(a, b):
    a, b = plain_shingles(a), plain_shingles(b)
    return len(a & b) / len(a | b)


def pair_at(similarity, document):
    """Two texts of distinct words with a beginning in common: k of m shingles each, so that J = k / (2 m - k)."""
    m, k = {0.7: (85, 70), 0.8: (90, 80), 0.9: (95, 90)}[similarity]
    common, one, other = (words_of(3 * document + i, n) for i, n in enumerate((k + 4, m - k, m - k)))
    return " ".join(common + one), " ".join(common + other)


def removed(texts, banding=FINEWEB, parts=1):
    return set(as_map(near.edges(near.pairs(texts, range(len(texts)), parts, banding))))


# ----------------------------------------------------------------------------------------------------------- signatures

FOX = "The quick brown fox jumps over the lazy dog"
TEXTS = {
    FOX: "97dbd20e61fd63e2",
    "one two three four five": "e64e163bf1dfc8bd",
    " ".join(["the"] * 50): "04bdf931734cfd42",
    "Été à la plage: 1,234 cafés, naïve façade — déjà vu, 5 fois!": "0808f255e43f3a19",
    "Das große Maß der Straße heißt für alle Übermut und Äther": "5a7db5ec0873807a",
    "В чащах юга жил бы цитрус? Да, но фальшивый экземпляр!": "65e3c62bb1155131",
    "def f(x_1, y_2):\n    return x_1 ** 2 + y_2 ** 2 if x_1 else None\n": "b4889392b8da9cb2",
    "हिन्दी में एक छोटा सा वाक्य है जो पाँच से अधिक शब्द रखता है": "73b10c371081d861",
    "다람쥐 헌 쳇바퀴에 타고파 하는 작은 동물 이야기": "647fc2b22576f69c",
    f"{FOX}. " * 2000: "5da8b0399003483e",
}


def of_text(text, size=112):
    return signatures(*shingles([text], 5), size)[0]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_committed_signatures(text):
    assert hashlib.sha256(of_text(text).astype("<u4").tobytes()).hexdigest()[:16] == TEXTS[text]


@pytest.mark.parametrize("text", list(TEXTS)[:8], ids=range(8))
@pytest.mark.parametrize("banding", [FINEWEB, Banding(3, 2, words=2)], ids=str)
def test_signatures_are_those_of_plain_integers(text, banding):
    size = banding.bands * banding.rows
    hashes, counts = shingles([text], banding.words)
    assert signatures(hashes, counts, size)[0].tolist() == plain_signature(text, size, banding.words)
    assert buckets_of([text], banding)[0][0].tolist() == plain_buckets(text, banding)


def test_fewer_hashes_are_the_first_of_more():
    np.testing.assert_array_equal(of_text(FOX, 9000)[:112], of_text(FOX, 112))


LETTERS = st.text(st.one_of(st.characters(), st.sampled_from("aA0 1\n_é\u0301ßİ２")), max_size=60)


def compared(text):
    """Without what Python lowers by its neighbours (sigma) and what NFD takes to several letters (Hangul)."""
    return "".join(c for c in text if c not in "Σς" and not "가" <= c <= "힣")


@settings(max_examples=60, deadline=None)
@given(st.lists(LETTERS.map(compared), max_size=5))
def test_words_of_any_text_are_those_of_plain_strings(texts):
    hashes, counts = word_hashes(texts)
    expected = [plain_words(text) for text in texts]
    assert counts.tolist() == [len(words) for words in expected]
    assert hashes.tolist() == [plain_word_hash(w) for words in expected for w in words]


def test_what_makes_no_difference_and_what_does():
    def same(a, b):
        return np.array_equal(of_text(a), of_text(b))

    text = "In 1914 the Café of Rue_Noire sold 20 teas, naïvely."
    assert same(text, "in 7 THE cafe\u0301 of rue noire; sold 123456 teas -- naively")
    assert same(text, unicodedata.normalize("NFD", text))
    assert same("하나 둘 셋 넷 다섯 여섯", "하나, 둘! 셋? 넷. 다섯: 여섯;")
    assert not same("하나 둘 셋 넷 다섯 여섯", "하나 둘 셋 넷 다섯 여성")
    assert not same(text, text.replace("the Café", "Café the"))
    assert len(word_hashes(["\ud800 a\udfff"])[0]) == 1


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batches_make_no_difference(size):
    texts = [" ".join(words_of(i, i % 130)) for i in range(600)] + [
        "",
        "\n",
        " ".join(words_of(9, 60_000)),
        "a b c d e",
    ]
    assert sum(map(len, texts)) > 3 * minhash.CHARACTERS
    together, enough = buckets_of(texts, FINEWEB)
    batches = [buckets_of(texts[i : i + size], FINEWEB) for i in range(0, len(texts), size)]
    np.testing.assert_array_equal(np.concatenate([buckets for buckets, _ in batches]), together)
    assert np.concatenate([each for _, each in batches]).tolist() == enough.tolist()
    assert enough.tolist() == [len(plain_words(text)) >= 5 for text in texts]


def test_texts_of_fewer_than_five_words_meet_nothing():
    texts = ["", "a", "a", "four words are few", "four words are few", "...", "five words are just enough"]
    table = near.pairs(texts, range(7), 4, FINEWEB)
    assert table.schema == near.PAIRS and table["number"].to_pylist() == [6] * 14
    assert len(near.edges(table)) == 0


# -------------------------------------------------------------------------------------------------------- probabilities


def test_estimates_deviate_from_jaccard_as_a_binomial_does():
    """The mean square of J^ - J is the mean of J (1 - J) / 112, to four standard deviations: 1/sqrt(2 n) each."""
    n, size = 400, 112
    sources = [words_of(i, 120) for i in range(n)]
    copies = [edited(words, i, 0.3 * (i + 0.5) / n) for i, words in enumerate(sources)]
    a, b = ([" ".join(words) for words in side] for side in (sources, copies))
    true = np.array([jaccard(x, y) for x, y in zip(a, b, strict=True)])
    assert np.histogram(true, 5, (0, 1))[0].min() > n / 20
    estimate = (signatures(*shingles(a, 5), size) == signatures(*shingles(b, 5), size)).mean(1)
    variance = true * (1 - true) / size
    assert abs(np.sqrt(np.mean((estimate - true) ** 2) / variance.mean()) - 1) < 4 / np.sqrt(2 * n)
    assert abs(np.mean(estimate - true)) < 4 * np.sqrt(variance.mean() / n)


@pytest.mark.parametrize("similarity", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("bands", ["14x8", "9x12", "20x5", "9x13"])
def test_pairs_meet_as_often_as_banding_says(similarity, bands):
    n, banding = 600, near.banding(bands)
    texts = [pair_at(similarity, i) for i in range(n)]
    assert jaccard(*texts[0]) == similarity
    one, other = (buckets_of(side, banding)[0] for side in zip(*texts, strict=True))
    met = (one == other).any(1).sum()
    p = 1 - (1 - similarity**banding.rows) ** banding.bands
    assert abs(met - n * p) <= 4 * np.sqrt(n * p * (1 - p)) + 1


def test_unrelated_texts_do_not_meet():
    texts = [" ".join(words_of(i, 40)) for i in range(1000)]
    for bands in ("14x8", "37x3"):
        assert removed(texts, near.banding(bands)) == set()


# ---------------------------------------------------------------------------------------------------------- bands asked


def test_bands_as_written():
    assert near.banding() == near.banding("14x8") == Banding(14, 8, 5)
    assert near.banding("450x20") == Banding(450, 20)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99])
def test_a_threshold_is_where_half_of_the_pairs_meet(threshold):
    def chance(bands, rows):
        return 1 - (1 - threshold**rows) ** bands

    bands, rows, _ = near.banding(threshold=threshold)
    assert bands * rows <= 112
    assert abs(chance(bands, rows) - 0.5) < 0.025
    assert abs(chance(bands, rows) - 0.5) == min(abs(chance(b, rows) - 0.5) for b in range(1, 112 // rows + 1))
    assert all(chance(112 // more, more) < 0.5 for more in range(rows + 1, 113))


def test_the_table_in_the_docs():
    rows = re.findall(r"^ +(\d+) x (\d+) ((?: +[\d.]+){5})", near.__doc__, re.M)
    assert len(rows) == 8
    for bands, count, values in rows:
        banding = near.banding(f"{bands}x{count}")
        for similarity, value in zip((0.5, 0.6, 0.7, 0.8, 0.9), values.split(), strict=True):
            assert abs(near.chance(similarity, banding) - float(value)) <= 0.000501
    named = re.findall(r"^ +(\d+) x (\d+) .* threshold (0.\d)$", near.__doc__, re.M)
    assert [near.banding(threshold=float(t))[:2] for _, _, t in named] == [(int(b), int(r)) for b, r, _ in named]


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"bands": "14"}, "near.bands=14: write BANDSxROWS, as 14x8"),
        ({"bands": "0x8"}, "near.bands=0x8: "),
        ({"bands": "14x8 "}, "near.bands=14x8 : "),
        ({"bands": "14x-8"}, "near.bands=14x-8: "),
        ({"threshold": 0.0}, "near.threshold=0.0: give a similarity from 0.1 to 0.99, as 0.8"),
        ({"threshold": 1.0}, "near.threshold=1.0: "),
        ({"threshold": float("nan")}, "near.threshold=nan: "),
        ({"bands": "14x8", "threshold": 0.8}, "near.bands and near.threshold"),
    ],
    ids=str,
)
def test_bands_that_cannot_be(asked, message):
    with pytest.raises(DataError, match=re.escape(message)) as error:
        near.banding(**asked)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------- edges and forests

NODES = st.integers(0, 30) | st.sampled_from([2**40, 2**62, 2**63 - 1])
EDGES = st.lists(st.tuples(NODES, NODES), max_size=40)


def array(edges):
    return np.array(edges, np.int64).reshape(-1, 2)


@settings(max_examples=60, deadline=None)
@given(EDGES)
def test_a_forest_is_that_of_a_plain_union_find(edges):
    assert as_map(near.forest(array(edges))) == plain_forest(edges)


@settings(max_examples=60, deadline=None)
@given(EDGES, st.lists(st.integers(0, 3), min_size=40, max_size=40), st.permutations(range(4)))
def test_forests_merge_in_any_order_and_grouping(edges, part, order):
    whole = near.forest(array(edges))
    parts = [near.forest(array([e for e, p in zip(edges, part, strict=False) if p == q])) for q in order]
    left = right = array([])
    for i in range(4):
        left = near.forest(np.concatenate([left, parts[i]]))
        right = near.forest(np.concatenate([parts[3 - i], right]))
    halves = [near.forest(np.concatenate(parts[i : i + 2])) for i in (0, 2)]
    for merged in (left, right, near.forest(np.concatenate(halves)), near.forest(np.concatenate(parts))):
        np.testing.assert_array_equal(merged, whole)
    np.testing.assert_array_equal(near.forest(whole), whole)


BUCKETS = st.lists(st.tuples(st.integers(0, 8).map(lambda x: x * (2**64 - 1) // 8), NODES), max_size=40)


def table(rows):
    return pa.table([[0] * len(rows), [b for b, _ in rows], [n for _, n in rows]], schema=near.PAIRS)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.randoms(use_true_random=False))
def test_edges_connect_what_all_pairs_of_a_bucket_do(rows, random):
    pairs = [(n, m) for (a, n), (b, m) in itertools.combinations(rows, 2) if a == b]
    found = near.edges(table(rows))
    assert as_map(found) == plain_forest(pairs)
    random.shuffle(rows)
    np.testing.assert_array_equal(near.edges(table(rows)), found)
    split = pa.concat_tables([table(rows[:7]), table(rows[7:])])
    np.testing.assert_array_equal(near.edges(split), found)


@pytest.mark.parametrize("parts", [1, 4, 7, 64])
def test_parts_are_ranges_of_buckets_and_make_no_difference(parts):
    sources = [words_of(i, 60) for i in range(60)]
    texts = [" ".join(w) for w in sources + [edited(w, i, 0.03) for i, w in enumerate(sources)]]
    pairs = near.pairs(texts, range(len(texts)), parts, FINEWEB)
    part, bucket = pairs["part"].to_numpy(), pairs["bucket"].to_numpy()
    assert part.tolist() == [(b >> 32) * parts >> 32 for b in bucket.tolist()] and set(part) == set(range(parts))
    assert (np.diff(part[np.argsort(bucket)]) >= 0).all()
    found = [near.edges(pairs.filter(pa.array(part == p))) for p in range(parts)]
    whole = near.edges(near.pairs(texts, range(len(texts)), 1, FINEWEB))
    assert 20 < len(whole) <= 60
    np.testing.assert_array_equal(near.forest(np.concatenate(found)), whole)


def test_the_smallest_number_stays_and_is_named_for_the_others():
    texts = [FOX + " for ever", FOX.upper() + ", for ever!", " ".join(words_of(1, 30)), "  " + FOX + "\nfor ever"]
    forest = near.edges(near.pairs(texts, [40, 7, 5, 2**62], 2, FINEWEB))
    assert forest.tolist() == [[7, 40], [7, 2**62]]
    assert near.stays(forest, [5, 7, 40, 41, 2**62, 2**62 + 1, 0]).tolist() == [5, 7, 7, 41, 7, 2**62 + 1, 0]
    assert near.stays(array([]), [3, 1]).tolist() == [3, 1]


@settings(max_examples=60, deadline=None)
@given(EDGES, st.lists(NODES))
def test_what_stays_is_the_root(edges, numbers):
    roots = plain_forest(edges)
    assert near.stays(near.forest(array(edges)), numbers).tolist() == [roots.get(n, n) for n in numbers]


def test_a_flood_of_one_signature_is_linear():
    def flood(n):
        return pa.table([np.zeros(n, np.int32), np.full(n, 5, np.uint64), np.arange(n)[::-1]], schema=near.PAIRS)

    def peak(n):
        rows = flood(n)
        tracemalloc.start()
        found = near.edges(rows)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found, np.stack([np.zeros(n - 1, np.int64), np.arange(1, n)], axis=1))
        return most

    assert peak(200_000) < 2.2 * peak(100_000)


# --------------------------------------------------------------------------------------------------------------- oracle


def test_the_removed_are_those_of_all_pairs_but_for_chance():
    """100 documents, each with a copy edited by 0 to 12 %, and 100 alone.

    The oracle removes a document that has P(match) >= 1/2 with an earlier one, by its true Jaccard similarity. Only a
    copy and its original have shingles in common, so the two differ where one coin each falls on its unlikely side:
    with q = min(P, 1 - P) a sum of independent coins, of mean sum q and variance sum q (1 - q). All 300^2 / 2 pairs
    together may be wrong about an "impossible" or "certain" one, of q < 1e-9, once in 2e4 runs: never here.
    """
    sources = [words_of(i, 100) for i in range(100)]
    texts = [" ".join(w) for w in sources]
    texts += [" ".join(edited(w, i, 0.12 * i / 99)) for i, w in enumerate(sources)]
    texts += [" ".join(words_of(i, 100)) for i in range(200, 300)]
    sets = [plain_shingles(text) for text in texts]
    similar = {
        (a, b): len(sets[a] & sets[b]) / len(sets[a] | sets[b]) for a, b in itertools.combinations(range(300), 2)
    }
    chances = {pair: 1 - (1 - s**8) ** 14 for pair, s in similar.items() if s}
    found = removed(texts)
    assert set(chances) <= {(i, i + 100) for i in range(100)}
    oracle = {b for (_, b), p in chances.items() if p >= 0.5}
    assert 30 < len(oracle) < 90
    q = np.array([min(p, 1 - p) for p in chances.values()])
    assert len(found ^ oracle) <= q.sum() + 4 * np.sqrt((q * (1 - q)).sum())
    unlikely = {b for (_, b), p in chances.items() if min(p, 1 - p) < 1e-9}
    assert (found ^ oracle) & unlikely == set() and found <= set(range(100, 200))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=60))
def test_every_exact_copy_goes(which):
    sources = [" ".join(words_of(i, 5 + 7 * i)) for i in range(16)]
    texts = [sources[i] for i in which]
    assert removed(texts) == {n for n, i in enumerate(which) if i in which[:n]}


@settings(deadline=None)
@given(st.lists(st.text(" \n\tab\u0301é12中", max_size=60), max_size=4), st.integers(1, 20))
def test_long_texts_are_cut_between_words(texts, long):
    whole = minhash.word_hashes(texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "LONG", long)
        cut = minhash.words_of(texts)
    assert np.array_equal(cut[0], whole[0]) and np.array_equal(cut[1], whole[1])
    for text in texts:
        assert "".join(minhash._cut(text)) == text


def test_a_long_text_needs_little_more_than_its_words():
    text = "some words that come again and again " * 250_000  # 9 MB
    tracemalloc.start()
    minhash.buckets_of([text], minhash.Banding(14, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * len(text), f"{peak / len(text):.0f} bytes for each character"
