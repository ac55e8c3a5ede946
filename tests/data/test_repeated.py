"""The rows of runs that repeat windows or documents, and of those that reshuffle documents, against lists of tokens."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from thriftlab.data.errors import DataError
from thriftlab.data.loader import gather
from thriftlab.data.mixture import named_seed, plan
from thriftlab.data.order import permute, stream
from thriftlab.data.quotas import Source
from thriftlab.data.repeated import repeated_plan
from thriftlab.data.repetition import ControlledRepetition, content_hash
from thriftlab.data.shards import open_dataset, write_manifest, write_shards, write_tokenizer
from thriftlab.data.tokens import load_tokenizer

LENGTH = 8
DOCUMENTS = {"web": 90, "books": 30}


@pytest.fixture(scope="module")
def texts():
    rng, first, made = np.random.default_rng(4), 0, {}
    for name, count in DOCUMENTS.items():
        made[name] = []
        for size in rng.integers(2, 50, count):
            made[name].append(np.arange(first, first + size))  # every token of the data is another one
            first += size
    return made


@pytest.fixture(scope="module")
def dataset(texts, tmp_path_factory):
    """Two sources in several shards."""
    folder, sources = tmp_path_factory.mktemp("data"), {}
    for name, each in texts.items():
        documents = [(text, len(text)) for text in each]
        sources[name] = {
            "train": write_shards(folder, name, "train", documents, "uint32", shard_tokens=500),
            "validation": write_shards(folder, name, "validation", documents[:1], "uint32"),
        }
        assert len(sources[name]["train"]["shards"]) > 1
    entry = write_tokenizer(folder, load_tokenizer("bytes"))
    write_manifest(folder, {"tokenizer": entry, "dtype": "uint32", "sources": sources})
    return open_dataset(folder)


def repeated(dataset, steps=20, sources=None, **options):
    given = {"fraction": 0.5, "repeats": 6, "unit": "sequence", "control": None, "pool_seed": 5, **options}
    return repeated_plan(dataset, LENGTH, 8, 3, sources, steps, **given)


def all_windows(dataset):
    return [(name, row) for name in DOCUMENTS for row in np.array(windows(dataset, name))]


def windows(dataset, name):
    found = dataset.windows(name, "train", LENGTH)
    return found[np.arange(len(found))].astype(np.int64)


@pytest.mark.parametrize("control", [None, "fresh", "unique_only"])
def test_rows_are_the_windows_of_the_repetition(dataset, control):
    made, corpus = repeated(dataset, control=control), all_windows(dataset)
    run = ControlledRepetition([row for _, row in corpus], 160, 0.5, 6, seed=3, pool_seed=5, control=control)
    names = [source.name for source in made.sources]
    assert names == [*DOCUMENTS, "repeated"][: 2 if control else 3]
    steps = made.fitting(20)
    assert steps == (10 if control == "unique_only" else 20)
    for step in range(steps):
        batch = gather(made, step)
        for j in range(8):
            item, _, again = run.occurrence(8 * step + j)
            assert batch.sample[j] == item and np.array_equal(batch.tokens[j], run[8 * step + j])
            assert names[batch.source[j]] == ("repeated" if again else corpus[item][0])
    kinds = Counter(names[int(s)] for step in range(steps) for s in gather(made, step).source)
    assert made.drawn(8 * steps).tolist() == [kinds[name] for name in names]
    assert made.located(np.arange(len(corpus)))[0].tolist() == [list(DOCUMENTS).index(name) for name, _ in corpus]


@pytest.mark.parametrize("options", [{}, {"unit": "document", "repeats": 3}, {"max_same_per_step": 1, "repeats": 4}])
def test_the_global_batch_is_the_same_for_any_world(dataset, options):
    made = repeated(dataset, **options)
    for step in (0, 7, 19):
        whole = gather(made, step)
        assert len(whole.tokens) == 8
        for world in (1, 2, 4, 8):
            together = [torch.empty_like(column) for column in whole]
            for rank in range(world):
                for target, part in zip(together, gather(made, step, rank, world), strict=True):
                    target[rank::world] = part
            assert all(torch.equal(a, b) for a, b in zip(together, whole, strict=True))
    assert len(gather(made, 500).tokens) == 0  # what is read ahead at the end


def test_one_source_or_all(dataset):
    only = repeated(dataset, 8, [Source("web", weight=2)], repeats=4)
    assert [source.name for source in only.sources] == ["web", "repeated"]
    with pytest.raises(DataError, match="takes no weights or epochs of several sources"):
        repeated(dataset, 8, [Source("web", weight=2), Source("books", weight=1)])
    with pytest.raises(DataError, match="needs a run of known length"):
        repeated(dataset, None)
    with pytest.raises(DataError, match="without the repeats 2 windows are left"):
        repeated(dataset, 3, fraction=0.9, control="unique_only").fitting(3)


def test_the_pool_to_be_measured(dataset):
    made = repeated(dataset, repeats=4)
    rows = defaultdict(int)
    for step in range(20):
        batch = gather(made, step)
        for tokens, source in zip(batch.tokens, batch.source, strict=True):
            rows[content_hash(tokens)] += int(source) == 2
    assert {content_hash(row) for row in made.pool[np.arange(len(made.pool))]} == {k for k, n in rows.items() if n}
    assert len(made.pool) == 20 and made.pool.tail() is None and repeated(dataset, control="fresh").pool is None
    assert len(repeated(dataset, repeats=1).pool) == 64


def test_plans_have_fingerprints_of_their_own(dataset):
    variants = [{}, {"repeats": 5}, {"fraction": 0.4}, {"control": "fresh"}, {"spacing": "even"}, {"pool_seed": 6},
                {"unit": "document", "repeats": 3}, {"max_same_per_step": 1}]  # fmt: skip
    prints = [repeated(dataset, **options).fingerprint for options in variants]
    assert len({*prints, plan(dataset, LENGTH, 8, 3).fingerprint}) == len(variants) + 1
    assert prints[0] == repeated(dataset).fingerprint


def test_table(dataset):
    text = repeated(dataset, repeats=7).announcement()
    assert [line.split() for line in text.splitlines()[:3]] == [
        ["repetition", "windows", "share", "items", "exposures", "tokens"],
        ["repeated", "77", "48.12%", "11", "7", "616"],
        ["once", "83", "51.88%", "83", "1", "664"],
    ]
    assert text.splitlines()[3:] == [
        "fraction 0.5 asked, 0.48125 realised",
        "control none, spacing random, pool seed 5",
        "80 windows are no multiple of 7: 3 are seen once instead",
    ]
    fresh = repeated(dataset, repeats=7, control="fresh").announcement().splitlines()
    assert fresh[1].split() == ["once", "160", "100.00%", "160", "1", "1,280"]
    documents = repeated(dataset, unit="document", repeats=3)
    told = documents.repetition.plan()
    line = documents.table().splitlines()[1].split()
    assert line[1] == str(told["repeat_slots"]) and line[-1] == str(told["repeat_tokens"])
    assert documents.uses(20)["repeated"]["unique"] * 3 == told["repeat_tokens"]
    assert repeated(dataset, repeats=7).uses(20)["repeated"] == {"unique": 11 * LENGTH, "tokens": 77 * LENGTH}
    assert repeated(dataset, repeats=7, control="fresh").uses(20).keys() == {*DOCUMENTS}


# ----------------------------------------------------------------------------------------------------- documents


def test_documents_are_copied_and_packed(dataset, texts):
    """Copies at other places, cut into windows; a row is of the pool if more than half of what it predicts is."""
    made = repeated(dataset, unit="document", repeats=3)
    each = [(name, text) for name in DOCUMENTS for text in texts[name]]
    run = ControlledRepetition(
        [text for _, text in each], total_tokens=160 * LENGTH + 1, fraction=0.5, repeats=3, unit="document",
        seed=3, pool_seed=5,
    )  # fmt: skip
    tokens, marks, names = [], [], []
    for g in range(len(run)):
        item, _, again = run.occurrence(g)
        tokens += each[item][1].tolist()
        marks += [again] * len(each[item][1])
        names += [each[item][0]] * len(each[item][1])
    assert len(tokens) == run.plan()["tokens"] > 160 * LENGTH
    sources = [source.name for source in made.sources]
    for step in range(20):
        batch = gather(made, step)
        for j in range(8):
            first = (8 * step + j) * LENGTH
            assert batch.tokens[j].tolist() == tokens[first : first + LENGTH + 1] and batch.sample[j] == 8 * step + j
            copied = 2 * sum(marks[first + 1 : first + LENGTH + 1]) > LENGTH
            assert sources[batch.source[j]] == ("repeated" if copied else names[first])
    assert not made.fixed and made.fitting(20) == 20
    pool = np.concatenate([each[i][1] for i in run.ids(np.arange(run.plan()["pool_size"]))])
    rows = made.pool[np.arange(len(made.pool))]
    assert len(rows) == min(64, (len(pool) - 1) // LENGTH)
    assert np.array_equal(rows[:, :-1].ravel(), pool[: len(rows) * LENGTH])
    assert repeated(dataset, unit="document", repeats=3, control="unique_only").fitting(20) < 20


# ------------------------------------------------------------------------------------------------------ reshuffled


@pytest.mark.parametrize("sources", [None, [Source("web", weight=3), Source("books", weight=1)]])
def test_reshuffled_documents_are_cut_anew(dataset, texts, sources):
    made = plan(dataset, LENGTH, 8, 3, sources, reshuffle=True)
    sizes = [(sum(map(len, each)) - 1) // LENGTH for each in texts.values()]
    assert made.cycle.windows == tuple(sizes) and not made.fixed

    def cut(name, epoch):
        n, key = DOCUMENTS[name], named_seed(3, f"{name}/documents")
        tokens = np.concatenate([texts[name][i] for i in permute(np.arange(n), n, key, epoch)])
        return [tokens[w * LENGTH : w * LENGTH + LENGTH + 1].tolist() for w in range((len(tokens) - 1) // LENGTH)]

    expected = {(p, e): cut(name, e) for p, name in enumerate(DOCUMENTS) for e in range(6)}
    drawn, seen = Counter(), Counter()
    for step in range(3 * sum(sizes) // 8):
        batch = gather(made, step)
        for tokens, p, sample in zip(batch.tokens.tolist(), batch.source.tolist(), batch.sample.tolist(), strict=True):
            epoch, window = stream(drawn[p], 1, sizes[p], named_seed(3, list(DOCUMENTS)[p]))
            assert tokens == expected[p, int(epoch[0])][int(window[0])]
            assert sample == [0, sizes[0]][p] + int(window[0]) + int(epoch[0]) * sum(sizes)
            drawn[p] += 1
            seen[sample] += 1
    assert set(seen.values()) == {1} and expected[0, 0] != expected[0, 1]
    everything = sorted(token for row in expected[0, 1] for token in row[1:])
    assert len(set(everything)) == len(everything) == sizes[0] * LENGTH  # each token once an epoch


def test_reshuffling_reads_at_any_point_for_any_world_and_batch(dataset):
    made, larger = (plan(dataset, LENGTH, size, 3, reshuffle=True) for size in (8, 24))
    for step in (0, 33, 400):
        whole, parts = gather(larger, step), [gather(made, 3 * step + k) for k in range(3)]
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))
        halves = [gather(made, step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.stack([h.tokens for h in halves], 1).flatten(0, 1), gather(made, step).tokens)
    assert made.fingerprint == larger.fingerprint != plan(dataset, LENGTH, 8, 3).fingerprint


def test_documents_of_a_data_set(dataset, texts):
    for name, each in texts.items():
        found = dataset.documents(name)
        assert len(found) == len(each) and all(np.array_equal(found[i], each[i]) for i in range(len(each)))
        assert found.lengths.tolist() == [len(text) for text in each]
