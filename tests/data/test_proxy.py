"""Proxies: a small run repeats each source as often as its target, from a part of it that grows with the budget."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.runs import LONG, assert_same, stop_at, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import ConfigError, DataError
from thriftlab.data.loader import gather
from thriftlab.data.mixture import named_seed, plan
from thriftlab.data.order import permute
from thriftlab.data.quotas import Source
from thriftlab.data.shards import open_dataset
from thriftlab.launch.studies import compare, written
from thriftlab.train.build import make_plan
from thriftlab.train.config import RunConfig, load
from thriftlab.train.config.parse import read
from thriftlab.train.config.schema import fingerprint
from thriftlab.train.loop import run

BATCH = 64
STEPS = 16  # 1024 rows: a mixture by weight is exact after so many


class Sizes:
    """A data set of which only the numbers of windows are known."""

    path, fingerprint = "somewhere", "data"

    def __init__(self, **sizes):
        self.sources = sizes

    def windows(self, name, split, length, where):
        return range(self.sources[name])


def mixed(dataset, steps, target=None, seed=0, sources=None):
    return plan(dataset, 8, BATCH, seed, sources, steps, target and Fraction(steps, target))


def seen(p, steps):
    """How often each window of each source is drawn: one Counter for each source."""
    source, window, _ = p.at(0, steps * BATCH)
    return [Counter(window[source == number].tolist()) for number in range(len(p.sources))]


SIZED = st.lists(st.tuples(st.integers(20, 3000), st.integers(1, 9)), min_size=1, max_size=4)


@given(SIZED, st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_every_source_is_repeated_as_in_the_target(sources, blocks, times, seed):
    dataset = Sizes(**{f"s{number}": n for number, (n, _) in enumerate(sources)})
    weighted = [Source(f"s{number}", weight=weight) for number, (_, weight) in enumerate(sources)]
    steps, target = blocks * STEPS, blocks * STEPS * times
    small, large = mixed(dataset, steps, target, seed, weighted), mixed(dataset, target, None, seed, weighted)
    rows, theirs = small.drawn(steps * BATCH).tolist(), large.drawn(target * BATCH).tolist()
    for kept, found, k, (n, _), whole in zip(small.cycle.read, seen(small, steps), rows, sources, theirs, strict=True):
        assert k * times == whole and abs(kept - Fraction(n, times)) <= Fraction(1, 2)
        if n % times == 0:
            assert Fraction(k, kept) == Fraction(whole, n)  # epochs, exactly
        assert found.total() == k and len(found) == min(k, kept)
        assert set(found.values()) <= {k // kept, -(-k // kept)}  # every window as often as the others


@given(SIZED, st.integers(1, 19), st.integers(1, 19), st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_what_is_kept_is_the_first_of_the_first_pass_and_grows(sources, a, b, seed):
    names = [f"s{number}" for number in range(len(sources))]
    dataset = Sizes(**{name: n for name, (n, _) in zip(names, sources, strict=True)})
    weights = [Source(name, weight=weight) for name, (_, weight) in zip(names, sources, strict=True)]
    steps = 200  # of which the mixture does not matter: what is kept does not depend on it
    found = []
    for share, chosen in ((Fraction(min(a, b), 20), None), (Fraction(max(a, b), 20), weights)):
        p = plan(dataset, 8, BATCH, seed, chosen, steps, share)
        found.append([p.cycle.draws(number, 0, kept)[1].tolist() for number, kept in enumerate(p.cycle.read)])
        for name, n, windows in zip(names, p.cycle.windows, found[-1], strict=True):
            first = permute(np.arange(round(n * share)), n, named_seed(seed, name), 0)
            assert sorted(windows) == sorted(first.tolist())
    assert all(set(small) <= set(large) for small, large in zip(*found, strict=True))


def test_passes_differ_in_order_and_seeds_in_what_is_kept():
    cycle = mixed(Sizes(a=100), STEPS, 4 * STEPS).cycle
    first, second = (cycle.draws(0, start, 25)[1].tolist() for start in (0, 25))
    assert sorted(first) == sorted(second) and first != second
    assert cycle.draws(0, 20, 10)[0].tolist() == [0] * 5 + [1] * 5
    other = mixed(Sizes(a=100), STEPS, 4 * STEPS, seed=1).cycle
    assert sorted(other.draws(0, 0, 25)[1].tolist()) != sorted(first)


def test_epochs_are_those_of_the_target():
    """Sources by epochs: as many passes over what is kept."""
    sources = [Source("a", epochs=4), Source("b", epochs=0.5)]
    p = mixed(Sizes(a=256, b=2048), STEPS, 2 * STEPS, sources=sources)
    assert p.cycle.counts == (4 * 128, 512) and p.cycle.read == (128, 1024)
    assert [set(found.values()) for found in seen(p, STEPS)] == [{4}, {1}]


def test_a_target_of_the_same_length_keeps_everything():
    assert mixed(Sizes(a=30, b=7), 3, 3).cycle.read == (30, 7)


def test_a_proxy_has_a_fingerprint_of_its_own():
    dataset = Sizes(a=64, b=80)
    prints = [mixed(dataset, 4, target).fingerprint for target in (None, 4, 8, 16)]
    assert len({*prints}) == 4
    assert prints[0] == plan(dataset, 8, BATCH, 0).fingerprint


def test_the_table_says_how_much_is_kept_and_how_often_it_is_repeated():
    sources = [Source("a", weight=1), Source("b", weight=3)]
    p = mixed(Sizes(a=40, b=4000), STEPS, 4 * STEPS, sources=sources)
    assert [line.split() for line in p.table(STEPS).splitlines()[1:]] == [
        ["a", "25.00%", "10", "of", "40", "80", "256", "25.60"],
        ["b", "75.00%", "1,000", "of", "4,000", "8,000", "768", "0.77"],
    ]


def test_less_than_one_window_is_refused():
    with pytest.raises(DataError, match="'b' has 3 windows, and a proxy of 0.25 of its target keeps less than one"):
        mixed(Sizes(a=100, b=3), 4, 16)


# ------------------------------------------------------------------------------------------------------ in a run


def test_the_short_form():
    for words in (["--proxy-of", "tokens=1e11"], ["--proxy-of=tokens=1e11"], ["data.proxy_of.tokens=1e11"]):
        assert load(RunConfig, words).data.proxy_of == 10**11
    config = RunConfig(data={"proxy_of": {"tokens": 1e11}})
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    assert fingerprint(config, "data") != fingerprint(RunConfig(), "data")
    asked = compare.make_request(read(["adamw", "signsgd", "--proxy-of", "tokens=1e9"]))
    assert asked.base["data"]["proxy_of"] == 10**9
    asked = written.make_request(read(["lost", "--proxy-of", "tokens=1e9"]))
    assert asked.base["data"] == {**asked.base["data"], "proxy_of": "tokens=1e9"}


@pytest.mark.parametrize("given", ["flops=1e20", "seconds=9", "seconds"])
def test_targets_of_another_kind_are_refused_in_one_line(given):
    with pytest.raises(ConfigError, match="tokens=AMOUNT|integer") as refused:
        load(RunConfig, ["--proxy-of", given])
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    "steps, target, message",
    [
        (None, 10**6, "budget of seconds has no known number"),
        (9, 2047, "2,047 tokens is less than the 2,304 of this"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(tiny_data, tmp_path, steps, target, message):
    config = tiny_config(tiny_data, tmp_path, data={"proxy_of": target})
    with pytest.raises(ConfigError, match=message):
        make_plan(config, open_dataset(tiny_data), steps)


REPETITION = ["data.repetition.fraction=0.1", "data.repetition.repeats=3"]


@pytest.mark.parametrize("other, words", [
    ("data.repetition", REPETITION),
    ("data.reshuffle=documents", ["data.reshuffle=documents"]),
])  # fmt: skip
def test_what_has_no_meaning_with_a_proxy_is_refused_in_one_line(other, words):
    with pytest.raises(ConfigError) as refused:
        load(RunConfig, ["--proxy-of", "tokens=1e9", *words])
    said = str(refused.value)
    assert "data.proxy_of" in said and other in said and "omit one" in said and len(said.splitlines()) == 1


def test_records_name_the_tokens_that_are_kept():
    p = mixed(Sizes(a=64, b=80), 4, 16)
    assert p.uses(2) == {"a": {"unique": 16 * 8, "tokens": 8 * p.drawn(128)[0]},
                         "b": {"unique": 20 * 8, "tokens": 8 * p.drawn(128)[1]}}  # fmt: skip


def test_ranks_read_the_rows_of_one_and_windows_keep_their_numbers(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path, data={"proxy_of": 8 * 8 * 32 * 5})
    p = make_plan(config, open_dataset(tiny_data), 8)
    assert all(abs(n - 5 * kept) <= 2.5 for n, kept in zip(p.cycle.windows, p.cycle.read, strict=True))
    for step in (0, 7, 100):
        whole, parts = gather(p, step), [gather(p, step, rank, 2) for rank in range(2)]
        assert all(torch.equal(whole.tokens[rank::2], part.tokens) for rank, part in enumerate(parts))
        for number, row in zip(whole.sample.tolist(), whole.tokens, strict=True):
            source = int(np.searchsorted(p.offsets, number, "right")) - 1
            assert p.windows[source][np.array([number - p.offsets[source]])][0].tolist() == row.tolist()


@pytest.mark.slow
def test_a_run_says_so_and_resumes(tiny_data, tmp_path, capfd):
    proxy = {"data": {"proxy_of": 200 * 8 * 32}, "log": {"progress": True}}
    run(tiny_config(tiny_data, tmp_path / "whole", **LONG, **proxy))
    said = capfd.readouterr().err
    assert "a proxy of a run of 51,200 tokens" in said and "windows" in said
    config = tiny_config(tiny_data, tmp_path / "broken", **LONG, **proxy)
    stop_at(config, 8)
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
