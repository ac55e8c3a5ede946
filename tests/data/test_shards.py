import json
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data import manifest as manifests
from thriftlab.data.errors import DataError
from thriftlab.data.manifest import VERIFIED
from thriftlab.data.shards import Windows, open_dataset, token_dtype, write_manifest, write_shards, write_tokenizer
from thriftlab.data.tokens import encode_document, load_tokenizer, train_bpe

TEXTS = [f"Document {i} says: " + "la " * (i % 7 * 3) + "end." for i in range(60)]


def prepared(folder, tokenizer=None, made="today"):
    """Two sources in several shards, and the documents that went in."""
    tokenizer = tokenizer or train_bpe(TEXTS, 300)
    folder.mkdir()
    documents = [encode_document(tokenizer, text) for text in TEXTS]
    dtype = token_dtype(tokenizer.vocab_size)
    sources = {
        name: {
            "train": write_shards(folder, name, "train", documents[part], dtype, shard_tokens=300),
            "validation": write_shards(folder, name, "validation", documents[:5], dtype, shard_tokens=30),
            "licence": "none",
            "provenance": "the test",
        }
        for name, part in (("web", slice(5, 60)), ("wiki", slice(5, 20)))
    }
    entry = write_tokenizer(folder, tokenizer)
    fingerprint = write_manifest(
        folder, {"tokenizer": entry, "dtype": dtype, "sources": sources, "drops": {}, "made": {"when": made}}
    )
    return fingerprint, documents


@pytest.fixture
def folder(tmp_path):
    prepared(tmp_path / "data")
    return tmp_path / "data"


def test_what_was_written_is_what_is_read(tmp_path):
    fingerprint, documents = prepared(tmp_path / "data")
    dataset = open_dataset(str(tmp_path / "data"))
    assert dataset.fingerprint == fingerprint and dataset.sources == ["web", "wiki"]
    split = dataset.manifest["sources"]["web"]["train"]
    assert len(split["shards"]) > 3 and split["documents"] == 55
    assert split["bytes"] == sum(len(text.encode()) for text in TEXTS[5:])
    found = []
    for shard in split["shards"]:
        ids = np.fromfile(dataset.path / shard["file"], "<u2")
        assert len(ids) == shard["tokens"] <= 300 and ids[0] == dataset.tokenizer.delimiter
        found += np.split(ids, np.load(dataset.path / shard["ends_file"])[:-1])
    assert all(np.array_equal(a, b) for a, (b, _) in zip(found, documents[5:], strict=True))
    assert [dataset.tokenizer.decode(ids) for ids in found] == TEXTS[5:]
    assert len(dataset.manifest["sources"]["web"]["validation"]["shards"]) == 1


def test_fingerprint_is_the_content(tmp_path):
    first, _ = prepared(tmp_path / "a", made="today")
    assert prepared(tmp_path / "b", made="tomorrow")[0] == first
    assert prepared(tmp_path / "c", load_tokenizer("bytes"))[0] != first


def test_a_document_longer_than_a_shard_is_not_cut(tmp_path):
    documents = [(np.full(n, 7), n) for n in (3, 50, 4, 5)]
    entry = write_shards(tmp_path, "s", "train", iter(documents), "uint32", shard_tokens=10)
    assert [shard["tokens"] for shard in entry["shards"]] == [3, 50, 9]
    assert (tmp_path / "s/train-00001.bin").stat().st_size == 200


def test_ids_that_do_not_fit_are_refused(tmp_path):
    assert (token_dtype(2**16), token_dtype(2**16 + 1)) == ("uint16", "uint32")
    with pytest.raises(DataError, match="65536 does not fit uint16"):
        write_shards(tmp_path, "s", "train", [(np.array([1, 65536]), 1)], "uint16")
    with pytest.raises(DataError, match="names a folder"):
        write_shards(tmp_path, "../s", "train", [], "uint16")


def test_every_flipped_byte_is_found(folder):
    """In every file, in several places: the error names the file, and the data set opens again once it is restored."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".bin", ".npy", ".json", ".sha256"}
    for path in files:
        good = path.read_bytes()
        for place in {0, len(good) // 3, len(good) - 1}:
            bad = bytearray(good)
            bad[place] ^= 1
            path.write_bytes(bad)
            with pytest.raises(DataError, match=r"thriftlab prepare") as error:
                open_dataset(folder)
            assert path.name in str(error.value)
        path.write_bytes(good)
    open_dataset(folder)


def test_truncated_missing_and_swapped(folder):
    shard, other = folder / "web/train-00000.bin", folder / "web/train-00001.bin"
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    with pytest.raises(DataError, match="train-00000.bin: .* bytes, the manifest says"):
        open_dataset(folder, verify=False)
    shard.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="train-00000.bin"):
        open_dataset(folder)
    shard.unlink()
    with pytest.raises(DataError, match="train-00000.bin: missing"):
        open_dataset(folder, verify=False)
    with pytest.raises(DataError, match="no prepared data set; `thriftlab prepare` makes prepared.embedded, and"):
        open_dataset(folder / "nowhere")


def test_an_older_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifests, "FORMAT", 2)
    with pytest.raises(DataError, match="format 1, and this version reads 2"):
        open_dataset(folder)


def rested(folder, monkeypatch):
    """Open once in a time when the files have rested, and count what is hashed from then on."""
    now = time.time()
    monkeypatch.setattr(manifests.time, "time", lambda: now + 60)
    open_dataset(folder)
    hashed = []
    original = manifests.file_sha256
    monkeypatch.setattr(manifests, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    return hashed


def test_rested_files_are_hashed_once(folder, monkeypatch):
    hashed = rested(folder, monkeypatch)
    open_dataset(folder)
    assert set(hashed) == {"manifest.json"}
    path = folder / "web/train-00000.bin"
    stat, good = path.stat(), path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    times = (stat.st_atime_ns, stat.st_mtime_ns)
    os.utime(path, ns=times)  # the time stamp put back does not hide it
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # where times are coarse
        os.utime(path, ns=times)
    with pytest.raises(DataError, match="train-00000.bin: changed"):
        open_dataset(folder)


def test_memory_of_hashes_is_not_trusted_blindly(folder, monkeypatch):
    hashed = rested(folder, monkeypatch)
    cache = json.loads((folder / VERIFIED).read_text())
    for damaged in ("", "[]", '{"manifest": 1}', json.dumps(cache | {"manifest": "another"})):
        (folder / VERIFIED).write_text(damaged)
        hashed.clear()
        open_dataset(folder)
        assert "train-00000.bin" in hashed
        assert json.loads((folder / VERIFIED).read_text()) == cache


def test_fresh_files_are_hashed_every_time(folder, monkeypatch):
    written = (folder / "manifest.json").stat().st_mtime
    monkeypatch.setattr(manifests.time, "time", lambda: written + 1)
    open_dataset(folder)
    assert json.loads((folder / VERIFIED).read_text())["files"] == {}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_windows(sizes, length, data):
    """Against slices: full windows overlap by one token and shards never mix."""
    shards = [np.arange(1000 * k, 1000 * k + size, dtype=np.uint16) for k, size in enumerate(sizes)]
    windows = Windows(shards, length, sum(sizes), 1, 1)
    expected = [
        shard[s * length : s * length + length + 1] for shard in shards for s in range((len(shard) - 1) // length)
    ]
    assert len(windows) == len(expected)
    if expected:
        rows = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=6))
        assert np.array_equal(
            windows[np.array(rows, np.int64)], np.array([expected[r] for r in rows]).reshape(-1, length + 1)
        )


@given(st.integers(0, 40), st.integers(1, 12))
def test_windows_and_tail_predict_every_token_once(size, length):
    windows = Windows([np.arange(size, dtype=np.uint16)] if size else [], length, size, 1, 1)
    predicted = windows[np.arange(len(windows))][:, 1:].ravel().tolist()
    tail = windows.tail()
    assert predicted + ([] if tail is None else tail[1:].tolist()) == list(range(1, size))


def test_no_tail_of_many_shards_and_unknown_source(folder):
    dataset = open_dataset(folder)
    with pytest.raises(DataError, match="tail"):
        dataset.windows("web", "train", 8).tail()
    with pytest.raises(DataError, match="no source 'wbe'; it has web, wiki"):
        dataset.windows("wbe", "train", 8)


def test_dataset_brings_its_tokenizer(tmp_path):
    prepared(tmp_path / "bytes", load_tokenizer("bytes"))
    assert open_dataset(tmp_path / "bytes").tokenizer.name == "bytes"
    assert not (tmp_path / "bytes/tokenizer.json").exists()
    bpe = train_bpe(TEXTS, 300)
    prepared(tmp_path / "bpe", bpe)
    dataset = open_dataset(tmp_path / "bpe")
    assert dataset.tokenizer.sha256 == bpe.sha256 == dataset.manifest["tokenizer"]["sha256"]
