"""Controlled repetition against lists and dictionaries: counts, order, pools, controls, spacing, documents, audit."""

import hashlib
import json
import math
from collections import Counter, defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from thriftlab.data.errors import DataError
from thriftlab.data.order import permute, unpermute
from thriftlab.data.ranks import CHUNK, Ranks
from thriftlab.data.repetition import ControlledRepetition, content_hash
from thriftlab.data.spread import spread

SPACINGS = ["random", "even", "clustered"]


def shuffled(n, seed, epoch=0):
    return permute(np.arange(n), n, seed, epoch).tolist()


def counts(fraction, slots, repeats):
    """Rule 2 in decimals, as a person would do it on paper."""
    asked = math.floor(Fraction(str(fraction)) * slots + Fraction(1, 2))
    return asked, asked // repeats


def reference(items, slots, fraction, repeats, seed, pool_seed, spacing, control=None):
    """[(id, exposure, is repeat)] of the whole run, in order."""
    asked, size = counts(fraction, slots, repeats)
    place, order = shuffled(items, pool_seed), shuffled(slots, seed)
    rows, seen, turn = [], Counter(), 0
    for slot in order:
        if control == "unique_only" and slot < asked:
            continue
        if control is None and slot < size * repeats:
            number = {"random": slot % size, "even": turn % size, "clustered": turn // repeats}[spacing]
            turn += 1
            rows.append((place[number], seen[number], True))
            seen[number] += 1
        else:
            rows.append((place[items - slots + slot], 0, False))
    return rows


def rows_of(made):
    """[(id, exposure, is repeat)], the exposures counted here and compared at some units."""
    rows, seen = [], Counter()
    for item, again in zip(*(column.tolist() for column in made.at(np.arange(len(made)))), strict=True):
        rows.append((item, seen[item], again))
        seen[item] += again
    assert all(tuple(made.occurrence(g)) == rows[g] for g in range(0, len(rows), 1 + len(rows) // 9))
    return rows


def made(items=400, slots=300, fraction=0.4, repeats=7, seed=3, **more):
    return ControlledRepetition(range(items), slots, fraction, repeats, seed=seed, **more)


# ------------------------------------------------------------------------------------------------------ the numbers


@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 9), st.data())
@settings(deadline=None, max_examples=40)
def test_unpermute_inverts(n, seed, epoch, data):
    index = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    assert unpermute(permute(index, n, seed, epoch), n, seed, epoch).tolist() == index.tolist()
    assert permute(unpermute(index, n, seed, epoch), n, seed, epoch).tolist() == index.tolist()


@pytest.mark.parametrize("fraction, slots, repeats, asked, size", [
    (0.1, 1000, 10, 100, 10),
    (0.1, 5, 1, 1, 1),  # 0.5 rounds up
    (0.3, 15, 2, 5, 2),  # 4.5 rounds up, one slot is left over
    (0.145, 100, 5, 15, 3),  # 14.5 on paper, 14.499999999999998 in floating point
    (0.285, 100, 10, 29, 2),  # likewise
    (0.144, 100, 5, 14, 2),
    (0.5, 585 * 16, 300, 4680, 15),
    (0.5, 585 * 16, 1000, 4680, 4),
    (0.1, 585 * 16, 937, 936, None),
    (0.9, 585 * 16, 1000, 8424, 8),
    (1 / 3, 10, 3, 3, 1),
])  # fmt: skip
def test_counts(fraction, slots, repeats, asked, size):
    if size is None:
        with pytest.raises(DataError, match="the pool of repeated data is empty: 0.1 of 9360 units are 936"):
            made(slots, slots, fraction, repeats)
        return
    told = made(slots, slots, fraction, repeats).plan()
    assert (told["pool_size"], told["repeat_slots"], told["left_over"]) == (
        size,
        size * repeats,
        asked - size * repeats,
    )
    assert told["unique_items"] == slots - size * repeats and told["distinct_items"] == slots - size * repeats + size
    assert told["realised_fraction"] == size * repeats / slots and told["rows"] == slots


def test_the_pool_by_its_size_or_its_tokens():
    told = made(400, 300, 0.4, None, pool_size=50).plan()  # 120 slots: 2 exposures each, 20 left over
    assert (told["repeats"], told["pool_size"], told["repeat_slots"], told["left_over"]) == (2, 50, 100, 20)
    windows = np.arange(4000).reshape(400, 10)
    by_tokens = ControlledRepetition(windows, total_tokens=3005, fraction=0.4, pool_tokens=509)
    assert by_tokens.plan()["pool_size"] == 50 and len(by_tokens) == 300
    with pytest.raises(DataError, match="for 500 items seen 1 times each"):
        made(9000, 300, 0.4, None, pool_size=500)


@given(
    st.integers(1, 300), st.integers(1, 1000), st.integers(1, 40), st.integers(0, 50),
    st.sampled_from(SPACINGS), st.sampled_from([None, "fresh", "unique_only"]), st.integers(0, 2**62),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_the_run_is_the_reference(slots, thousandths, repeats, spare, spacing, control, seed):
    fraction = thousandths / 1000
    asked, size = counts(fraction, slots, repeats)
    assume(size > 0 and not (fraction == 1 and spacing == "random" and control is None))
    need = {None: slots - size * repeats + size, "fresh": slots, "unique_only": slots - asked}[control]
    given = {"seed": seed, "pool_seed": seed + 1, "spacing": spacing, "control": control}
    found = made(need + spare, slots, fraction, repeats, **given)
    wanted = reference(need + spare, slots, fraction, repeats, **given)
    ids, again = found.at(np.arange(len(found)))
    assert [*zip(ids.tolist(), again.tolist(), strict=True)] == [(item, repeat) for item, _, repeat in wanted]
    assert all(tuple(found.occurrence(g)) == wanted[g] for g in range(0, len(wanted), 1 + len(wanted) // 7))
    exposures = Counter(Counter(item for item, _, _ in wanted).values())
    assert found.audit()["multiplicity"] == exposures
    if control is None and repeats > 1:
        assert exposures == Counter({repeats: size}) + Counter({1: slots - size * repeats})
    if need > 1:
        with pytest.raises(DataError, match=f"sees {need:,} different items, and the source has {need - 1:,}"):
            made(need - 1, slots, fraction, repeats, **given)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_units_are_read_at_any_point_and_in_any_world(spacing):
    run = made(spacing=spacing)
    ids = [run[g] for g in range(300)]
    for batch_size in (8, 12, 300):
        for world in (1, 2, 4, 8):
            together = [None] * 300
            for rank in range(world):
                for step in range(-(-300 // batch_size)):
                    mine = np.arange(step * batch_size + rank, min(300, (step + 1) * batch_size), world)
                    for g, item in zip(mine, run.at(mine)[0].tolist(), strict=True):
                        together[g] = item
            assert together == ids
    assert run.at(np.arange(300))[0].tolist() == ids
    with pytest.raises(IndexError):
        run[300]
    with pytest.raises(IndexError):
        run[-1]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_resume_is_one_integer(spacing):
    whole = list(made(spacing=spacing))
    assert whole == [item for item, _, _ in rows_of(made(spacing=spacing))] and len(whole) == 300
    for stop in (0, 1, 117, 299, 300):
        first, second = made(spacing=spacing), made(spacing=spacing)
        begun = [item for _, item in zip(range(stop), first, strict=False)]
        state = json.loads(json.dumps(first.state_dict()))
        assert state.keys() == {"next_global_index", "config_hash", "source_fingerprint"}
        second.load_state_dict(state)
        assert begun + list(second) == whole
    assert list(made(spacing=spacing, start_index=250)) == whole[250:]


def test_a_state_of_something_else_is_refused():
    state = made().state_dict()
    others = [{"fraction": 0.5}, {"repeats": 8}, {"seed": 4}, {"pool_seed": 4}, {"spacing": "even"},
              {"control": "fresh"}, {"slots": 301},
              {"max_same_per_step": 2, "batch_size": 8}, {"holdout_ids": {7}}]  # fmt: skip
    for other in others:
        with pytest.raises(DataError, match="another config hash"):
            made(**other).load_state_dict(state)
    with pytest.raises(DataError, match="another source fingerprint"):
        ControlledRepetition(range(1, 401), 300, 0.4, 7, seed=3).load_state_dict(state)
    made(start_index=9).load_state_dict(state)


def test_seeds_change_the_order_and_not_the_counts():
    runs = [made(seed=1), made(seed=2), made(seed=1, pool_seed=2)]
    first, other, pool = ([run[g] for g in range(300)] for run in runs)
    assert first != other != pool != first
    assert len({json.dumps(run.audit()["multiplicity"]) for run in runs}) == 1
    assert made(seed=2, pool_seed=1).audit() != runs[0].audit()
    assert {i for i, n in Counter(first).items() if n > 1} == {  # the pool hangs on its own seed
        item for g in range(300) for item, _, again in [made(seed=2, pool_seed=1).occurrence(g)] if again
    }


def test_pools_are_nested_and_controls_are_paired():
    """What is at a slot changes only where it is the pool's."""
    runs = {r: rows_of(made(400, 300, 0.4, r, seed=3, pool_seed=9)) for r in (1, 2, 7, 50, 120)}
    pools = {r: {item for item, _, again in rows if again} for r, rows in runs.items()}
    assert pools[120] < pools[50] < pools[7] < pools[2] < pools[1] and [len(pools[r]) for r in runs] == [
        120,
        60,
        17,
        2,
        1,
    ]
    fresh = rows_of(made(400, 300, 0.4, 7, seed=3, pool_seed=9, control="fresh"))
    assert fresh == rows_of(made(400, 300, 0.4, 50, seed=3, pool_seed=9, control="fresh"))
    assert len({item for item, _, _ in fresh}) == 300 and not any(again for _, _, again in fresh)
    slots = {g for g, (_, _, again) in enumerate(runs[1]) if again}  # all that are to be repeats: 120
    for r, rows in runs.items():
        assert all(mine[0] == other[0] for mine, other in zip(rows, fresh, strict=True) if not mine[2])
        repeats = {g for g, (_, _, again) in enumerate(rows) if again}
        assert repeats <= slots and len(slots - repeats) == 120 % r
        spread_out = [rows_of(made(400, 300, 0.4, r, seed=3, pool_seed=9, spacing=s)) for s in ("even", "clustered")]
        for other in spread_out:
            assert [(i, a) if not a else a for i, _, a in other] == [(i, a) if not a else a for i, _, a in rows]
    alone = rows_of(made(400, 300, 0.4, 7, seed=3, pool_seed=9, control="unique_only"))
    assert [item for item, _, _ in alone] == [item for g, (item, _, _) in enumerate(fresh) if g not in slots]


def test_spacings():
    """Of the repeats in their order: even ones come P apart, clustered ones follow each other."""
    for spacing in ("even", "clustered"):
        turns = defaultdict(list)
        again = [item for item, _, again in rows_of(made(spacing=spacing)) if again]
        for turn, item in enumerate(again):
            turns[item].append(turn)
        gaps = {gap for each in turns.values() for gap in np.diff(each).tolist()}
        assert gaps == {17 if spacing == "even" else 1} and len(turns) == 17


def test_whole_epochs():
    """All of the source again and again, each epoch in its own order; the last one may be a part."""
    run = ControlledRepetition(range(50), 170, 1.0, pool_size=50, seed=5)
    ids = [run[g] for g in range(170)]
    for epoch in range(3):
        part = ids[epoch * 50 : epoch * 50 + 50]
        assert [permute(i, 50, 5, 0) for i in shuffled(50, 5, epoch)] == part and len(set(part)) == 50
    assert len(set(ids[150:])) == 20 and ids[:50] != ids[50:100]
    assert [run.occurrence(g)[1:] for g in (0, 49, 50, 149, 150, 169)] == [
        (0, True), (0, True), (1, True), (2, True), (3, True), (3, True)]  # fmt: skip
    told = run.plan()
    assert (told["repeats"], told["pool_size"], told["left_over"], told["unique_items"]) == (3, 50, 20, 0)
    assert told["realised_fraction"] == 1 and run.epochs_seen(120) == {"source": 2.4, "pool": 2.4}
    assert run.audit()["multiplicity"] == {3: 30, 4: 20}
    more = ControlledRepetition(range(70), 170, 1.0, pool_size=50, seed=5)  # there is text left: it is seen once
    assert (
        more.epochs_seen(160)["pool"] == 3
        and more.audit()["multiplicity"] == {1: 20, 3: 50}
        and more.plan()["realised_fraction"] == 150 / 170
    )
    assert ControlledRepetition(range(50), 150, 1.0, 3, seed=5).audit()["multiplicity"] == {3: 50}


@pytest.mark.parametrize("spacing", SPACINGS)
def test_epochs_seen(spacing):
    run = made(spacing=spacing)
    rows = rows_of(run)
    for g in (0, 1, 150, 300):
        assert run.epochs_seen(g) == {"source": g / 400, "pool": sum(again for _, _, again in rows[:g]) / 17}


@pytest.mark.parametrize("spacing", ["random", "even"])
@pytest.mark.parametrize("most", [1, 2])
def test_no_item_twice_in_a_step(spacing, most):
    plain = rows_of(made(900, 800, 0.5, 20, spacing=spacing))
    run = made(900, 800, 0.5, 20, spacing=spacing, max_same_per_step=most, batch_size=20)
    rows = rows_of(run)
    together = Counter((g // 20, item) for g, (item, _, _) in enumerate(rows))
    before = Counter((g // 20, item) for g, (item, _, _) in enumerate(plain))
    assert max(together.values()) <= most
    assert [(r[0], r[2]) for r in rows if not r[2]] == [(r[0], r[2]) for r in plain if not r[2]]
    assert run.audit()["multiplicity"] == made(900, 800, 0.5, 20, spacing=spacing).audit()["multiplicity"]
    changed = sum(a[0] != b[0] for a, b in zip(rows, plain, strict=True))
    assert changed <= 2 * sum(max(0, n - most) for n in before.values())  # two places for each that is too many
    if spacing == "random":
        assert max(before.values()) > most and changed > 0


def test_too_few_items_for_a_step_are_refused():
    with pytest.raises(DataError, match="max_same_per_step = 1: no order"):
        made(400, 300, 0.4, 60, max_same_per_step=1, batch_size=20)[0] and made(
            400, 300, 0.4, 60, max_same_per_step=1, batch_size=20
        ).audit()
    with pytest.raises(DataError, match="max_same_per_step needs batch_size"):
        made(max_same_per_step=1)
    same = np.array([0, 1, 2, 0, 1, 2])
    assert spread(same, np.array([0, 0, 0, 1, 1, 1]), 1, 0).tolist() == same.tolist()  # nothing is too many


@pytest.mark.parametrize("given, message", [
    ({"fraction": 0.0}, r"fraction = 0.0: the part that is repeated lies in \(0, 1\]"),
    ({"fraction": 1.1}, "fraction = 1.1"),
    ({"repeats": None}, "give one of repeats, pool_size, pool_tokens; there is none"),
    ({"pool_size": 3}, "give one of repeats, pool_size, pool_tokens; there is repeats and pool_size"),
    ({"slots": None}, "give one of total_units, total_tokens; there is none"),
    ({"repeats": 121}, "the pool of repeated data is empty: 0.4 of 300 units are 120, for 1 items seen 121 times"),
    ({"repeats": 0}, "the pool of repeated data is empty"),
    ({"unit": "document"}, "give total_tokens, not total_units"),
])  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(given, message):
    with pytest.raises(DataError, match=message) as error:
        made(**given)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ held out, audit


def test_what_is_held_out_is_not_drawn_by_id_or_content():
    windows = [np.array([i, i + 1, i + 2], np.uint16) for i in range(60)]
    windows[20] = windows[5].astype(np.int64)  # the same content under another id
    other = np.array([31, 32, 33])
    plain = ControlledRepetition(windows, 40, 0.5, 4, seed=1)
    run = ControlledRepetition(
        windows, 40, 0.5, 4, seed=1, holdout_ids={5, 7}, holdout_hashes={content_hash(other)}
    )  # fmt: skip
    assert run.held_out.tolist() == [5, 7, 20, 31] and run.items == 56
    place = [i for i in range(60) if i not in (5, 7, 20, 31)]
    kept = reference(56, 40, 0.5, 4, 1, 1, "random")
    assert [r[0] for r in rows_of(run)] == [place[i] for i, _, _ in kept]
    report = run.audit()
    assert report["holdout_overlap"] == 0 and report["rows"] == 40
    assert np.array_equal(run[3], windows[run.occurrence(3).item_id])
    ids = np.array([run.occurrence(g).item_id for g in range(40)], "<i8")
    assert report["sha256"] == hashlib.sha256(ids.tobytes()).hexdigest() != plain.audit()["sha256"]
    everything = ControlledRepetition(windows, 58, 0.5, 29, seed=1, holdout_ids=())
    everything.held_hashes = {content_hash(windows[everything.occurrence(9).item_id])}
    with pytest.raises(DataError, match="is held out and would be trained on"):
        everything.audit()
    everything.held_hashes, everything.held_out = set(), np.array([everything.occurrence(9).item_id])
    everything.ids = lambda number: permute(number, everything.items, 1, 0)
    with pytest.raises(DataError, match="is held out and would be trained on"):
        everything.audit()


@given(st.integers(1, 3 * CHUNK), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=15)
def test_rank_and_select(n, seed, data):
    border = data.draw(st.integers(0, n))
    found = Ranks(n, lambda g: permute(g, n, seed, 0) < border)
    member = permute(np.arange(n), n, seed, 0) < border
    asked = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)))
    below = np.concatenate([[0], np.cumsum(member)])
    assert found.rank(asked).tolist() == below[asked].tolist() and found.before(n) == border
    turns = np.arange(border)[:: max(1, border // 50)]
    assert found.select(turns).tolist() == np.flatnonzero(member)[turns].tolist()


# ----------------------------------------------------------------------------------------------------- documents


def documents(n=400, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 99, size) for size in rng.integers(3, 60, n)]


@pytest.mark.parametrize("repeats", [1, 3, 20])
def test_fractions_of_documents_are_in_tokens(repeats):
    texts = documents()
    sizes = [len(texts[i]) for i in shuffled(400, 8)]
    run = ControlledRepetition(texts, total_tokens=6000, fraction=0.3, repeats=repeats, unit="document", pool_seed=8)
    pool, tokens = 0, 0
    while tokens * repeats < 0.3 * 6000:  # the first document that crosses it is in
        tokens, pool = tokens + sizes[pool], pool + 1
    once, rest = 0, 6000 - tokens * repeats
    while rest > 0:
        once += 1
        rest -= sizes[-once]
    told = run.plan()
    assert (told["pool_size"], told["unique_items"], told["repeat_slots"]) == (pool, once, pool * repeats)
    assert (told["pool_tokens"], told["repeat_tokens"], told["tokens"]) == (tokens, tokens * repeats, 6000 - rest)
    assert told["realised_fraction"] == tokens * repeats / (6000 - rest) and told["rows"] == len(run)
    rows = rows_of(run)
    assert sum(len(run[g]) for g in range(len(run))) == told["tokens"]
    order, place = shuffled(len(run), 0), shuffled(400, 8)
    assert [r[0] for r in rows] == [place[s % pool] if s < pool * repeats else place[400 - len(run) + s] for s in order]
    assert Counter(Counter(r[0] for r in rows if r[2]).values()) == {repeats: pool}
    controls = {
        control: ControlledRepetition(texts, total_tokens=6000, fraction=0.3, repeats=repeats, unit="document",
                                      pool_seed=8, control=control) for control in ("fresh", "unique_only")
    }  # fmt: skip
    unique = [r[0] for r in rows if not r[2]]
    assert [r[0] for r in rows_of(controls["unique_only"])] == unique
    assert controls["unique_only"].plan()["tokens"] == told["tokens"] - told["repeat_tokens"]
    fresh = controls["fresh"]
    assert set(unique) <= {r[0] for r in rows_of(fresh)} and fresh.audit()["multiplicity"] == {1: len(fresh)}
    assert fresh.plan()["tokens"] >= 6000 > fresh.plan()["tokens"] - 60 and fresh.plan()["realised_fraction"] == 0


def test_the_pool_takes_the_document_that_crosses_and_not_the_next():
    texts = [np.arange(10)] * 100
    for total, pool in ((400, 2), (401, 3), (410, 3)):  # 40, 40.1 and 41 tokens of repeats, twice each
        run = ControlledRepetition(texts, total_tokens=total, fraction=0.1, repeats=2, unit="document")
        assert run.plan()["pool_size"] == pool
        assert run.plan()["unique_items"] == -(-(total - 20 * pool) // 10)


def test_a_pool_of_documents_by_size_or_tokens():
    texts, given = documents(), {"total_tokens": 6000, "fraction": 0.5, "unit": "document", "pool_seed": 8}
    sizes = np.cumsum([len(texts[i]) for i in shuffled(400, 8)])
    run = ControlledRepetition(texts, pool_size=4, **given).plan()
    assert run["repeats"] == 3000 // sizes[3] and run["pool_tokens"] == sizes[3]
    by_tokens = ControlledRepetition(texts, pool_tokens=int(sizes[5]) - 1, **given).plan()
    assert by_tokens["pool_size"] == 6 and by_tokens["repeats"] == 3000 // sizes[5]
    with pytest.raises(DataError, match="the source has 400"):
        ControlledRepetition(texts, total_tokens=60_000, fraction=0.1, repeats=2, unit="document")
    with pytest.raises(DataError, match="whole documents"):
        ControlledRepetition(texts, total_tokens=500, fraction=0.9, repeats=100, unit="document")
    with pytest.raises(DataError, match="is empty"):
        ControlledRepetition(texts, pool_tokens=4000, **given)
