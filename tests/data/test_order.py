import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data.order import permute, stream

WORD = 2**64


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def reference(i: int, n: int, seed: int, epoch: int) -> int:
    """One position in Python integers, written from the specification."""
    bits = max(2, (n - 1).bit_length())
    half = (bits + bits % 2) // 2
    start = mix((seed * 0x9E3779B97F4A7C15 + epoch) % WORD)
    keys = [mix((start + (r + 1) * 0x9E3779B97F4A7C15) % WORD) for r in range(6)]
    while True:
        left, right = i >> half, i % 2**half
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) % 2**half)
        i = left << half | right
        if i < n:
            return i


def test_published_order():
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [7, 5, 1, 8, 6, 3, 4, 0, 9, 2]


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_bijection(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(st.data(), st.integers(1, 2**48), st.integers(0, 2**70), st.integers(0, 2**40))
@settings(deadline=None, max_examples=60)
def test_equals_big_integers(data, n, seed, epoch):
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    assert permute(index, n, seed, epoch).tolist() == [reference(i, n, seed, epoch) for i in index]


def test_scalars_and_shapes():
    assert permute(3, 10, 0, 0).shape == () and int(permute(3, 10, 0, 0)) == 8
    epochs = np.arange(4)[:, None]
    both = permute(np.arange(5), 5, 1, epochs)
    assert both.shape == (4, 5) and both.dtype == np.int64
    assert all(np.array_equal(both[e], permute(np.arange(5), 5, 1, e)) for e in range(4))


def test_epochs_and_seeds_differ():
    orders = {tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_looks_random():
    """Bins of the first tenth are uniform (chi-square, 99 degrees of freedom) and neighbours are uncorrelated."""
    rows = permute(np.arange(100_000), 100_000, seed=0, epoch=0)
    counts = np.bincount(rows[:10_000] // 1000, minlength=100)
    assert 50 < ((counts - 100) ** 2 / 100).sum() < 160
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 4 / np.sqrt(len(rows))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_stream_straddles_epochs(n):
    epoch, row = stream(5, 20, n, seed=3)
    assert [(int(e), int(r)) for e, r in zip(epoch, row, strict=True)] == [
        (g // n, reference(g % n, n, 3, g // n)) for g in range(5, 25)
    ]
