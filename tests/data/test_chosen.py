"""Documents chosen by their scores: windows against slices of what was chosen, and plans and runs that read them."""

import dataclasses
import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.finished import document, finish
from tests.tools.runs import LONG, assert_same, stop_at, traces
from tests.tools.stand_ins import where_of
from tests.tools.tiny import tiny_config
from thriftlab.data import chosen as chosen_module
from thriftlab.data.chosen import choose
from thriftlab.data.errors import ConfigError, DataError
from thriftlab.data.loader import gather
from thriftlab.data.mixture import named_seed, plan
from thriftlab.data.order import permute
from thriftlab.data.quotas import Source
from thriftlab.data.shards import Windows, open_dataset
from thriftlab.train.build import make_plan
from thriftlab.train.config.data import SourceConfig
from thriftlab.train.config.schema import RunConfig, counted
from thriftlab.train.loop import run

LENGTH = 16


@pytest.fixture(autouse=True)
def parser(monkeypatch):
    where_of(monkeypatch)


def rows(documents=120, held_out=4):
    """Documents of two sources with scores of 0 to 1, the third of them without."""
    chance = random.Random(0)
    found = []
    for source in ("web", "books"):
        for k in range(documents):
            text = f"{source} {k} " + "".join(chance.choice("abcdefgh ") for _ in range(chance.randint(1, 90)))
            scores = {"score": chance.randrange(65537) / 65536, "trigram": chance.random() * 9, "pool": k % 4}
            split = "validation" if k < held_out else "train"
            found.append(document(source, f"{source}.jsonl:{k}", text, split=split, **scores))
    return found


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("where") / "data"
    return folder, finish(folder, rows(), shard_tokens=900)


def shards_of(folder, source):
    """The documents of each training shard as token ids, read from the files by numpy alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for shard in manifest["sources"][source]["train"]["shards"]:
        tokens = np.fromfile(folder / shard["file"], "<u2")
        yield np.split(tokens, np.load(folder / shard["ends_file"])[:-1])


def expected(folder, found, source, fits, length):
    """Windows of the documents that fit, shard by shard: (windows, documents)."""
    mine = iter([row for row in found if row["source"] == source and row["split"] == "train"])
    windows, documents = [], []
    for shard in shards_of(folder, source):
        kept = [tokens for tokens, row in zip(shard, mine, strict=False) if fits(row)]
        joined = np.concatenate([*kept, np.empty(0, np.uint16)])
        windows += [joined[s : s + length + 1] for s in range(0, len(joined) - length, length)]
        documents += kept
    return windows, documents


CHOICES = {
    "score>0.5": lambda row: row["score"] > 0.5,
    "score<0.03": lambda row: row["score"] < 0.03,
    "score>-1": lambda row: True,
    "pool<1": lambda row: row["pool"] == 0,
    "trigram>4.5": lambda row: round(row["trigram"] * 65536) > 4.5 * 65536,
}


@pytest.mark.parametrize("where", CHOICES)
@pytest.mark.parametrize("length", [1, 16, 200, 700])
def test_windows_are_those_of_the_chosen_documents(prepared, where, length):
    folder, found = prepared
    dataset = open_dataset(folder)
    for source in dataset.sources:
        windows = dataset.windows(source, "train", length, where)
        wanted, documents = expected(folder, found, source, CHOICES[where], length)
        assert len(windows) == len(wanted)
        assert windows.documents == len(documents) and windows.tokens == sum(map(len, documents))
        assert windows.bytes == sum(len(tokens) - 1 for tokens in documents)  # a byte a token, and the delimiter
        order = np.random.default_rng(0).permutation(len(wanted))
        if wanted:
            assert np.array_equal(windows[order], np.array(wanted)[order])
        out = np.full((len(order) + 2, length + 1), -1, np.int64)
        windows.gather(order, out, np.arange(len(order)) + 1)
        assert np.array_equal(out[1:-1], np.array([wanted[k] for k in order]).reshape(-1, length + 1))
        assert (out[[0, -1]] == -1).all()


def test_all_documents_are_the_windows_without_a_choice(prepared):
    dataset = open_dataset(prepared[0])
    plain, chosen = (dataset.windows("web", "train", LENGTH, where) for where in (None, "score>-1"))
    everything = np.arange(len(plain))
    assert all(isinstance(shard, np.ndarray) for shard in plain.shards)
    assert np.array_equal(plain[everything], chosen[everything]) and plain[everything].dtype == chosen[everything].dtype
    for key in ("tokens", "documents", "bytes"):
        assert getattr(plain, key) == getattr(chosen, key)


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=30), st.integers(1, 40), st.data())
@settings(deadline=None)
def test_rows_of_any_runs(documents, length, data):
    """Documents of any lengths, chosen at will."""
    sizes, kept = (np.array(column) for column in zip(*documents, strict=True))
    tokens = np.arange(sizes.sum(), dtype=np.uint16)
    joined = np.concatenate(
        [part for part, keep in zip(np.split(tokens, np.cumsum(sizes)[:-1]), kept, strict=True) if keep] + [tokens[:0]]
    )
    shard = choose(tokens, np.cumsum(sizes), kept.astype(bool))
    assert len(shard) == len(joined) and np.array_equal(np.concatenate([*shard.pieces(), tokens[:0]]), joined)
    if not len(joined):
        return
    windows = Windows([shard], length, len(shard), 1, 1)
    wanted = [joined[s : s + length + 1] for s in range(0, len(joined) - length, length)]
    assert len(windows) == len(wanted)
    if wanted:
        asked = data.draw(st.lists(st.integers(0, len(wanted) - 1), max_size=8))
        found = windows[np.array(asked, np.int64)]
        assert np.array_equal(found, np.array([wanted[k] for k in asked]).reshape(-1, length + 1))


def test_bytes_are_counted_in_pieces(prepared, monkeypatch):
    monkeypatch.setattr(chosen_module, "CHUNK", 7)
    windows = open_dataset(prepared[0]).windows("web", "train", LENGTH, "score>0.5")
    assert windows.bytes == windows.tokens - windows.documents


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_without_a_choice_keeps_its_fingerprint(prepared):
    dataset = open_dataset(prepared[0])
    for sources in (None, [Source("web", weight=1), Source("books", weight=2)]):
        found = plan(dataset, LENGTH, 8, 3, sources)
        identity = [dataset.fingerprint, LENGTH, 3, [each.name for each in found.sources], [*found.cycle.counts]]
        assert found.fingerprint == hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def test_a_choice_counts_in_the_fingerprint(prepared):
    dataset = open_dataset(prepared[0])
    weights = [Source("web", weight=1), Source("books", weight=1)]
    plain = plan(dataset, LENGTH, 8, 3, weights)
    prints = {plain.fingerprint}
    for where in ("score>0.5", "score>0.500001", "pool<1"):
        for k in range(2):
            sources = [dataclasses.replace(each, where=where) if i == k else each for i, each in enumerate(weights)]
            prints.add(plan(dataset, LENGTH, 8, 3, sources).fingerprint)
    assert len(prints) == 7


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_are_the_chosen_windows_in_every_world(prepared, world):
    folder, found = prepared
    dataset = open_dataset(folder)
    asked = [Source("web", weight=1, where="score>0.5"), Source("books", weight=1)]
    chosen = plan(dataset, LENGTH, 8, 3, asked)
    wanted = [
        expected(folder, found, "web", CHOICES["score>0.5"], LENGTH)[0],
        expected(folder, found, "books", CHOICES["score>-1"], LENGTH)[0],
    ]
    assert chosen.cycle.windows == tuple(map(len, wanted)) and chosen.cycle.seeds[0] == named_seed(3, "web")
    for step in (0, 1, 57, 1000):
        source, window, _ = chosen.rows(step)
        for rank in range(world):
            batch = gather(chosen, step, rank, world)
            rows = [wanted[s][w] for s, w in zip(source[rank::world], window[rank::world], strict=True)]
            assert np.array_equal(batch.tokens.numpy(), np.array(rows))


# --- what cannot be --------------------------------------------------------------------------------------------------


def test_refusals_are_one_line(prepared, tmp_path):
    folder, _ = prepared
    dataset = open_dataset(folder)
    finish(tmp_path / "bare", rows(20), units={})
    bare = open_dataset(tmp_path / "bare")
    cases = [
        (dataset, "train", "scoer>0.5", "no score 'scoer'"),
        (dataset, "train", "score>2", "where=score>2 chooses none of the 116 training documents of source 'web'"),
        (dataset, "train", "nonsense", "where='nonsense'"),
        (dataset, "validation", "score>0.5", "chooses training documents; held-out ones all count"),
        (bare, "train", "score>0.5", "source 'web' has no scores, .*leave where out"),
    ]
    for opened, split, where, message in cases:
        with pytest.raises(DataError, match=message) as error:
            opened.windows("web", split, LENGTH, where)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"has \d+ training tokens where score<0.03, and a window takes 5001"):
        plan(dataset, 5000, 8, 0, [Source("web", where="score<0.03")])


def test_scores_are_checked_as_all_files_are(tmp_path):
    folder = tmp_path / "data"
    finish(folder, rows(20), shard_tokens=400)
    path = folder / "web/train-00001.scores.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(DataError, match="train-00001.scores.npy: changed since it was prepared"):
        open_dataset(folder)
    path.unlink()
    with pytest.raises(DataError, match="train-00001.scores.npy: missing"):
        open_dataset(folder, verify=False)
    path.write_bytes(good)
    open_dataset(folder)


@pytest.mark.parametrize("damage", ["scores_file", "scores_sha256", "columns"])
def test_a_manifest_names_all_scores_or_none(tmp_path, damage):
    from thriftlab.data.manifest import write_manifest

    folder = tmp_path / "data"
    finish(folder, rows(20))
    manifest = json.loads((folder / "manifest.json").read_text())
    place = manifest["sources"]["web"] if damage == "columns" else manifest["sources"]["web"]["validation"]["shards"][0]
    del place[damage]
    write_manifest(folder, manifest)
    with pytest.raises(DataError, match=r"sources\.web.*columns"):
        open_dataset(folder)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_configurations_without_a_choice_are_as_they_were():
    assert SourceConfig(weight=1).model_dump(mode="json") == {"weight": 1.0, "epochs": None}
    config = RunConfig(data={"sources": {"web": {"weight": 1}, "books": {"epochs": 2, "where": "score>0.5"}}})
    assert counted(config)["data"]["sources"] == {
        "web": {"weight": 1.0, "epochs": None},
        "books": {"weight": None, "epochs": 2.0, "where": "score>0.5"},
    }
    assert RunConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValueError, match="where='nonsense'"):
        SourceConfig(where="nonsense")
    with pytest.raises(ValueError, match="exactly one of weight and epochs"):
        SourceConfig(weight=1, epochs=1, where="score>0.5")


def test_a_choice_alone_leaves_the_other_sources_in(prepared):
    folder, found = prepared
    dataset = open_dataset(folder)
    config = tiny_config(folder, folder, data={"sources": {"books": {"where": "score>0.5"}}})
    made = make_plan(config, dataset, None)
    assert [(each.name, each.where) for each in made.sources] == [("web", None), ("books", "score>0.5")]
    assert made.cycle.counts == made.cycle.windows
    config = tiny_config(folder, folder, data={"sources": {"bokos": {"where": "score>0.5"}}})
    with pytest.raises(DataError, match="no source 'bokos'"):
        make_plan(config, dataset, None)


def test_a_proxy_keeps_a_part_of_what_is_chosen(prepared):
    """The source is what is chosen: a quarter of its windows, each four times, as the target passes over all."""
    folder, found = prepared
    wanted, _ = expected(folder, found, "web", CHOICES["score>0.5"], LENGTH)
    steps = -(-len(wanted) // 8)
    sources = {"web": {"weight": 1, "where": "score>0.5"}}
    data = {"sequence_length": LENGTH, "proxy_of": 4 * steps * 8 * LENGTH, "sources": sources}
    made = make_plan(tiny_config(folder, folder, data=data), open_dataset(folder), steps)
    kept = round(len(wanted) / 4)
    assert made.cycle.windows == (len(wanted),) and made.cycle.read == (kept,)
    source, window, epoch = made.at(0, 4 * kept)
    first = permute(np.arange(kept), len(wanted), named_seed(0, "web"), 0)
    assert sorted(window.tolist()) == sorted(4 * first.tolist())
    assert np.array_equal(made.read(source, window, epoch), np.array(wanted)[window])
    everything = {"sequence_length": LENGTH, "sources": sources}
    whole = make_plan(tiny_config(folder, folder, data=everything), open_dataset(folder), 4 * steps)
    assert whole.cycle.read == (len(wanted),) and whole.fingerprint != made.fingerprint


@pytest.mark.slow
def test_a_stopped_run_on_chosen_documents_is_unbroken(prepared, tmp_path):
    sections = {**LONG, "data": {"sources": {"web": {"weight": 2, "where": "score>0.5"}, "books": {"weight": 1}}}}
    whole = run(tiny_config(prepared[0], tmp_path / "whole", **sections))
    config = tiny_config(prepared[0], tmp_path / "broken", **sections)
    for step in (1, 8, 17):
        stop_at(config, step)
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    other = {**sections, "data": {"sources": {"web": {"weight": 2}, "books": {"weight": 1}}}}
    plain = run(tiny_config(prepared[0], tmp_path / "plain", **other))
    assert plain["fingerprint"] != whole["fingerprint"] and plain["results"]["loss"] != whole["results"]["loss"]
    assert plain["results"]["tokens"] == whole["results"]["tokens"]  # all that is held out


def test_reference_losses_are_not_those_of_chosen_windows(prepared, monkeypatch, tmp_path):
    from thriftlab.train.signals import reference

    dataset = open_dataset(prepared[0])
    about = {"data": dataset.fingerprint, "sequence_length": LENGTH, "files": {}}
    monkeypatch.setattr(reference, "read_reference", lambda folder: about)
    chosen = plan(dataset, LENGTH, 8, 0, [Source("web", where="score>0.1")])
    with pytest.raises(reference.ReferenceLossError, match="all windows, and data.sources.web.where makes others"):
        reference.open_reference(tmp_path, dataset, chosen)


def test_the_key_has_its_line_of_help_and_of_error():
    from thriftlab.train.config.parse import load

    with pytest.raises(ConfigError, match="command line: data.sources.web.where"):
        load(RunConfig, ["data.sources.web.where=nonsense"])
    assert load(RunConfig, ["data.sources.web.where=score>0.7"]).data.sources["web"].where == "score>0.7"
