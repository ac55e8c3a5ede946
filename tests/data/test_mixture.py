import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.waiting import PATIENCE
from thriftlab.data import loader
from thriftlab.data.errors import DataError
from thriftlab.data.loader import gather, prefetch
from thriftlab.data.mixture import Cycle, Plan, Source, named_seed, plan
from thriftlab.data.order import permute, stream
from thriftlab.data.quotas import largest_remainder
from thriftlab.data.shards import open_dataset, write_manifest, write_shards, write_tokenizer
from thriftlab.data.tokens import load_tokenizer

LENGTH = 4
SIZES = {"web": 3000, "books": 700, "code": 40}  # windows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three sources of distinct tokens in several shards."""
    folder = tmp_path_factory.mktemp("data")
    sources, first = {}, 0
    for name, size in SIZES.items():
        tokens = np.arange(first, first + size * LENGTH + 2)  # each shard of n windows has n * LENGTH + 1 tokens
        first += len(tokens)
        documents = [(part, 1) for part in np.split(tokens, [LENGTH * (size // 2) + 1])]
        sources[name] = {
            "train": write_shards(folder, name, "train", documents, "uint32", shard_tokens=1),
            "validation": write_shards(folder, name, "validation", documents[:1], "uint32"),
        }
    entry = write_tokenizer(folder, load_tokenizer("bytes"))
    write_manifest(folder, {"tokenizer": entry, "dtype": "uint32", "sources": sources})
    return open_dataset(folder)


def bare(counts, windows, seed=0, batch=8):
    """A plan without data."""
    names = [f"s{p}" for p in range(len(counts))]
    cycle = Cycle(tuple(counts), tuple(windows), tuple(named_seed(seed, name) for name in names), seed)
    return Plan([Source(name) for name in names], [], LENGTH, batch, cycle, "")


def reference(p: Plan, rows: int):
    """The first rows of the run: blocks dealt one position at a time, sources drawn one by one."""
    c, out, index = p.cycle, [], 0
    positions = [source for source, count in enumerate(c.counts) for _ in range(count)]
    blocks = math.ceil(len(positions) / 1024)
    streams = [zip(*stream(0, rows + 1024, n, seed), strict=True) for n, seed in zip(c.windows, c.seeds, strict=True)]
    while len(out) < rows:
        dealt = positions[index % blocks :: blocks]
        for slot in permute(np.arange(len(dealt)), len(dealt), c.seed, index):
            epoch, window = next(streams[dealt[slot]])
            out.append((dealt[slot], int(window), int(epoch)))
        index += 1
    return out[:rows]


@given(
    st.lists(st.tuples(st.integers(1, 900), st.integers(1, 500)), min_size=1, max_size=4),
    st.integers(0, 3000),
    st.integers(1, 50),
)
@settings(deadline=None, max_examples=15)
def test_rows_equal_the_slow_walk(sources, start, count):
    p = bare(*zip(*sources, strict=True))
    found = list(zip(*(column.tolist() for column in p.at(start, count)), strict=True))
    assert found == reference(p, start + count)[start:]


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=40)
def test_every_block_holds_the_exact_share(counts, data):
    cycle = bare(counts, [1] * len(counts)).cycle
    block = data.draw(st.integers(0, cycle.blocks - 1))
    quota = np.diff(cycle.before(cycle.bounds, block + 1)) - np.diff(cycle.before(cycle.bounds, block))
    exact = np.array(counts) / cycle.blocks
    assert (quota >= np.floor(exact)).all() and (quota <= np.ceil(exact)).all() and quota.sum() <= 1024
    assert np.array_equal(np.diff(cycle.before(cycle.bounds, cycle.blocks)), counts)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=6), st.integers(0, 10**15))
def test_locate_inverts_the_blocks(counts, row):
    cycle = bare(counts, [1] * len(counts)).cycle
    block, slot = cycle.locate(row)
    turn, within = divmod(block, cycle.blocks)
    start = int(cycle.before(cycle.rows, within))
    assert turn * cycle.rows + start + slot == row
    assert 0 <= slot < int(cycle.before(cycle.rows, within + 1)) - start


def test_one_source_is_the_plain_stream():
    p = bare([92441], [92441], batch=16)
    for step in (0, 1, 5776, 5777, 20000):
        epoch, row = stream(step * 16, 16, 92441, named_seed(0, "s0"))
        source, window, epochs = p.rows(step)
        assert window.tolist() == row.tolist() and epochs.tolist() == epoch.tolist() and not source.any()
    assert set(p.rows(5777)[2]) == {0, 1}  # 92441 = 16 * 5777 + 9: the batch straddles two epochs


def test_every_window_once_an_epoch(dataset):
    """All sources together by default, each source on its own in any mixture."""
    total = sum(SIZES.values())
    p = plan(dataset, LENGTH, 10, seed=3)
    for epoch in (0, 1, 7):
        source, window, epochs = p.at(epoch * total, total)
        assert np.array_equal(np.sort(p.offsets[source] + window), np.arange(total)) and (epochs == epoch).all()
    mixed = plan(dataset, LENGTH, 10, 3, [Source("web", weight=1), Source("code", weight=1)])
    source, window, epochs = mixed.at(0, 4096)
    for epoch in range(50):
        assert np.array_equal(np.sort(window[(source == 1) & (epochs == epoch)]), np.arange(40))


def test_weights_are_largest_remainder_quotas(dataset):
    sources = [Source("web", weight=0.5), Source("books", weight=0.3), Source("code", weight=0.2)]
    p = plan(dataset, LENGTH, 8, 0, sources)
    for block in (0, 1, 999):
        assert np.bincount(p.at(block * 1024, 1024)[0]).tolist() == [512, 307, 205]


@given(st.integers(0, 10**6), st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_largest_remainder(total, weights):
    counts = largest_remainder(total, list(map(Fraction, weights)))
    assert sum(counts) == total
    left = [Fraction(total * w, sum(weights)) - count for count, w in zip(counts, weights, strict=True)]
    assert max(left) - min(left) <= 1 and all(-1 < x < 1 for x in left)


def test_epochs_are_exact_over_the_run(dataset):
    sources = [Source("code", epochs=7), Source("books", epochs=0.5), Source("web", weight=1)]
    p = plan(dataset, LENGTH, 16, 0, sources, steps=100)
    source, window, epochs = p.at(0, 1600)
    assert np.bincount(source).tolist() == [280, 350, 970] == p.drawn(1600).tolist()
    assert np.bincount(window[source == 0]).tolist() == [7] * 40
    assert np.bincount(window[source == 1], minlength=700).max() == 1
    halfway = np.bincount(source[:800])  # spread evenly, not one source after the other
    assert np.abs(halfway - [140, 175, 485]).max() <= 3 * np.sqrt(1600)

    only = plan(dataset, LENGTH, 16, 0, [Source("code", epochs=4)], steps=10)
    assert np.bincount(only.at(0, 160)[1]).tolist() == [4] * 40
    assert plan(dataset, LENGTH, 33, 0, [Source("code", epochs=4)], steps=5).cycle.rows == 160  # a batch more at most


def test_same_stream_for_any_batch_size_and_entry(dataset):
    small, large = plan(dataset, LENGTH, 8, 1), plan(dataset, LENGTH, 24, 1)
    assert small.fingerprint == large.fingerprint
    for step in (0, 500, 10_000):
        pieces = [small.rows(3 * step + k) for k in range(3)]
        assert np.array_equal(np.concatenate(pieces, axis=1), np.array(large.rows(step)))


def test_source_keeps_its_order_in_any_mixture(dataset):
    alone = plan(dataset, LENGTH, 8, 1, [Source("books", weight=1)]).at(0, 300)[1]
    source, window, _ = plan(dataset, LENGTH, 8, 1).at(0, 3000)
    assert np.array_equal(window[source == 1][:300], alone)


def test_sources_of_one_size_have_orders_of_their_own():
    source, window, _ = bare([500, 500], [500, 500]).at(0, 1000)
    assert (window[source == 0] == window[source == 1]).mean() < 0.02
    assert named_seed(0, "web") == 14916079199633350296 != named_seed(1, "web")


def test_fingerprint_is_the_stream(dataset):
    halves = [Source("web", weight=1), Source("books", weight=1)]
    variants = [
        plan(dataset, LENGTH, 8, 0),
        plan(dataset, LENGTH, 8, 1),
        plan(dataset, 2 * LENGTH, 8, 0),
        plan(dataset, LENGTH, 8, 0, halves),
    ]
    assert len({p.fingerprint for p in variants}) == 4


def test_global_batch_is_the_same_for_any_world(dataset):
    p = plan(dataset, LENGTH, 24, 0)
    for step in (0, 3, 10**6):
        whole = gather(p, step)
        assert whole.tokens.shape == (24, LENGTH + 1) and whole.tokens.dtype == torch.int64
        for world in (1, 2, 4, 8):
            together = [torch.empty_like(column) for column in whole]
            for rank in range(world):
                for target, part in zip(together, gather(p, step, rank, world), strict=True):
                    target[rank::world] = part
            assert all(torch.equal(a, b) for a, b in zip(together, whole, strict=True))


def test_gathered_tokens_are_the_windows(dataset):
    p = plan(dataset, LENGTH, 64, 0)
    batch = gather(p, 5)
    source, window, _ = p.rows(5)
    assert {0, 1} <= set(source) and batch.source.tolist() == source.tolist()
    for tokens, s, w, sample in zip(batch.tokens.numpy(), source, window, batch.sample.tolist(), strict=True):
        assert np.array_equal(tokens, dataset.windows(list(SIZES)[s], "train", LENGTH)[np.array([w])][0])
        assert sample == w + [0, 3000, 3700][s]


def test_prefetch_is_gather_in_any_order(dataset):
    p = plan(dataset, LENGTH, 8, 0)
    batch = prefetch(p, 1, 2)
    for step in (0, 1, 2, 7, 8, 3, 3):
        assert torch.equal(batch(step).tokens, gather(p, step, 1, 2).tokens)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_gathered_for_any_device(dataset, device):
    p = plan(dataset, LENGTH, 8, 0)
    batch = loader.batches(p, 1, 2, torch.device(device))
    for step in (0, 1, 7):
        assert all(map(torch.equal, batch(step), gather(p, step, 1, 2)))


def test_prefetch_raises_where_the_step_is_asked_for(dataset, monkeypatch):
    def gather_but_one(plan, step, rank, world):
        if step == 3:
            raise OSError("disk is gone")
        return gather(plan, step, rank, world)

    monkeypatch.setattr(loader, "gather", gather_but_one)
    p = plan(dataset, LENGTH, 8, 0)
    batch = prefetch(p)
    assert torch.equal(batch(2).tokens, gather(p, 2).tokens)
    with pytest.raises(OSError, match="disk is gone"):
        batch(3)
    assert torch.equal(batch(4).tokens, gather(p, 4).tokens)


@pytest.mark.slow
def test_prefetch_ends_with_the_interpreter(dataset):
    script = (
        "from thriftlab.data import open_dataset, plan\nfrom thriftlab.data.loader import prefetch\n"
        f"batch = prefetch(plan(open_dataset({str(dataset.path)!r}), {LENGTH}, 8, 0)); batch(0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)


def test_table(dataset):
    sources = [Source("web", weight=3), Source("code", weight=1)]
    text = plan(dataset, LENGTH, 16, 0, sources).table(steps=64)
    assert [line.split() for line in text.splitlines()] == [
        ["source", "share", "windows", "tokens", "rows", "drawn", "epochs"],
        ["web", "75.00%", "3,000", "12,000", "768", "0.26"],
        ["code", "25.00%", "40", "160", "256", "6.40"],
    ]
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "epochs" not in plan(dataset, LENGTH, 16, 0).table()


@pytest.mark.parametrize(
    ("sources", "steps", "message"),
    [
        ([Source("wbe", weight=1)], None, "no source 'wbe'; it has web, books, code"),
        ([Source("web", weight=1), Source("web", weight=1)], None, "'web' is listed twice"),
        ([Source("web", weight=1), Source("code")], None, "to each source or to none"),
        ([Source("web", weight=1), Source("code", weight=1e-5)], None, "'code' would never be drawn"),
        ([Source("web", weight=1), Source("code", epochs=3)], None, "known length"),
        ([Source("web", weight=1), Source("code", epochs=3)], 15, "120 rows .* the run has 15 steps of 8"),
        ([Source("code", epochs=3)], 17, "120 rows, 15.0 steps of 8, and the run has 17"),
        ([Source("code", epochs=1e-3)], None, "'code' would never be drawn"),
    ],
)
def test_errors_say_what_to_do(dataset, sources, steps, message):
    with pytest.raises(DataError, match=message):
        plan(dataset, LENGTH, 8, 0, sources, steps)


def test_impossible_sources(dataset):
    with pytest.raises(DataError, match="weight or epochs, not both"):
        Source("web", weight=1, epochs=1)
    for value in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="positive"):
            Source("web", weight=value)
    with pytest.raises(DataError, match="'code' has 162 training tokens, and a window takes 201"):
        plan(dataset, 200, 8, 0)
