"""Readers, generators and the containment of shingles."""

import gzip
import hashlib
import json
import time
import tracemalloc
import unicodedata
from itertools import islice

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data.corpora import embedded
from thriftlab.data.corpora.folders import files
from thriftlab.data.corpora.readers import normalise, read
from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.errors import DataError
from thriftlab.data.prepare.dedup import SHINGLE, HeldOut, shingles

PINNED = "9e39be27c3388b6d2af6ca4b8e867000bb12b6cbf0aa4e4633e7ba92b80b0a12"
TEXTS = ["A first document.\nOf two lines.", "Ünïcode — ☃ 你好", "a third\u2028one\r\n", " "]


def texts(path, **options):
    return [document.text for document in read(path, **options)]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_text_and_lines_round_trip_compressed_or_not(tmp_path, kind, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    if kind == "jsonl":
        (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(jsonl({"text": text, "url": "u"} for text in TEXTS)))
    else:
        for number, text in enumerate(TEXTS):
            (tmp_path / f"{number}.txt{suffix}").write_bytes(pack(text.encode()))
    documents = list(read(tmp_path, source="mine"))
    assert [document.text for document in documents] == TEXTS
    assert {document.source for document in documents} == {"mine"}
    assert len({document.id for document in documents}) == len(TEXTS)
    if kind == "jsonl":
        assert documents[1].id == f"a.jsonl{suffix}:2" and documents[1].metadata == {"url": "u"}


def test_zstandard_frames_are_read_one_after_the_other(tmp_path):
    parts = [zstandard.compress(jsonl([{"text": text}])) for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(parts))
    assert texts(tmp_path / "a.jsonl.zst") == TEXTS


def test_parquet_round_trip_over_row_groups(tmp_path):
    many = [f"{text} {number}" for number in range(700) for text in TEXTS]
    table = pyarrow.table({"body": many, "other": list(range(len(many)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=999)
    documents = list(read(tmp_path / "a.parquet", text_key="body"))
    assert [document.text for document in documents] == many
    assert [document.id for document in documents] == [f"a.parquet:{number}" for number in range(1, len(many) + 1)]


def test_hugging_face_saved_local_and_streaming(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "split")
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "train.jsonl").write_bytes(jsonl({"text": text} for text in TEXTS))
    assert texts(tmp_path / "saved") == TEXTS
    assert texts(f"hf:{tmp_path}/split") == TEXTS
    assert texts(f"hf:{tmp_path}/split::test") == TEXTS[1:2]
    assert texts(f"hf:{tmp_path}/local") == TEXTS
    assert texts(f"hf:{tmp_path}/local", streaming=False) == TEXTS
    with pytest.raises(DataError, match="hf:.*nowhere.*cannot read it"):
        texts(f"hf:{tmp_path}/nowhere")
    with pytest.raises(DataError, match="cannot read it"):
        texts(f"hf:{tmp_path}/split::validation")


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path):
    for name in ("b/z.txt", "a.md", "b/a.txt", ".hidden/x.txt", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.md", "b/a.txt", "b/z.txt"]
    assert [file.relative_to(tmp_path).as_posix() for file in files(tmp_path)] == texts(tmp_path)


def _damage(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


LONG = jsonl({"text": "".join(generate(1, seed=seed))} for seed in range(50))
BROKEN = {  # file name: (bytes, what the message says besides the file's name)
    "broken.jsonl": (b'{"text": "fine"}\n{"text": "bro\n', "line 2: not a JSON object.*repair"),
    "list.jsonl": (b"[1]\n", "line 1: holds list"),
    "deep.jsonl": (b"[" * 100_000, "line 1: not a JSON object"),
    "key.jsonl": (b'{"text": "fine"}\n\n{"content": "x"}\n', "line 3: no text under 'text'.*content.*text_key"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: 'text' holds int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: half a surrogate"),
    "latin.jsonl": ('{"text": "é"}\n'.encode("latin1"), "line 1: not a JSON object in UTF-8"),
    "latin.txt": ("caf\u00e9".encode("latin1"), "byte 3.*iconv"),
    "empty.txt": (b"", "empty"),
    "blank.jsonl": (b"\n\n", "empty"),
    "empty.jsonl.gz": (b"", "empty"),
    "short.jsonl.gz": (gzip.compress(LONG, mtime=0)[:-20], "truncated"),
    "flipped.jsonl.gz": (_damage(gzip.compress(LONG, mtime=0)), "damaged"),
    "not.txt.gz": (b"plain text, whatever the name says", "damaged"),
    "short.jsonl.zst": (zstandard.compress(LONG)[:-20], "truncated"),
    "flipped.jsonl.zst": (_damage(zstandard.ZstdCompressor(write_checksum=True).compress(LONG)), "damaged"),
    "not.txt.zst": (b"plain text, whatever the name says", "damaged"),
    "not.parquet": (b"plain text, whatever the name says", "not a readable parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_names_the_file_the_place_and_the_remedy(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"(?s){tmp_path / name}.*{message}"):
        texts(tmp_path)


def test_bad_names_and_keys_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no text under 'text'; there is body"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 2: 'body' holds NoneType"):
        texts(tmp_path / "a.parquet", text_key="body")
    with pytest.raises(DataError, match="no such file"):
        texts(tmp_path / "nothing.txt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no files"):
        texts(tmp_path / "folder")
    for name in ("embedded:nonsense", "synthetic:nonsense=1", "synthetic:words=many", "synthetic:vocabulary=2"):
        with pytest.raises(DataError, match=name.split("=")[0].split(":")[0]):
            texts(name)


def test_lines_are_streamed_not_held(tmp_path):
    line = jsonl([{"text": "x" * 10_000}])
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(2000):
            file.write(line)
    tracemalloc.start()
    assert sum(len(document.text) for document in read(tmp_path / "a.jsonl.gz")) == 20_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.slow
def test_embedded_corpus_is_real_prose_in_a_fixed_order():
    for part in ("topics", "news"):
        documents = list(read(f"embedded:{part}"))
        assert documents == list(read(f"embedded:{part}"))
        assert len({document.id for document in documents}) == len(documents)
    topics = list(read("embedded:topics"))
    assert len(topics) > 100 and sum(len(document.text) for document in topics) > 300_000
    some = list(islice(read("embedded:docstrings"), 40))
    assert [document.id for document in some] == sorted(document.id for document in some)
    assert all(document.metadata == {"part": "docstrings"} for document in some)


def test_a_stripped_part_of_the_embedded_corpus_is_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    source = '"""What it is."""\nclass A:\n    def f(self):\n        """How it is.\n\n        So."""'
    (tmp_path / "module.py").write_text(source)
    (tmp_path / "broken.py").write_text("print 'two'")
    assert texts("embedded:news") == []
    assert texts("embedded:docstrings") == ["module\n\nWhat it is.\n\nA.f\n\nHow it is.\n\nSo."]


def test_synthetic_text_is_the_same_everywhere():
    text = "\n".join(texts("synthetic:documents=20,words=50,noise=0.02,repetition=0.2,domain=1,seed=7"))
    assert hashlib.sha256(text.encode()).hexdigest() == PINNED


def test_the_knobs_of_synthetic_text_do_what_they_say():
    def words(**options):
        return " ".join(generate(documents=30, **options)).lower().replace(".", "").split()

    def sentences(**options):
        return [sentence for text in generate(documents=30, **options) for sentence in text.split(". ")]

    assert len(set(words(vocabulary=30))) <= 30 + 11 < len(set(words(vocabulary=3000)))
    assert len(words(words=500)) >= 30 * 500 > len(words(words=100))
    closed = {"the", "a", "this", "every", "no", "in", "on", "of", "with", "under", "before"}
    shared = set(words(domain=0)) & set(words(domain=1)) - closed
    assert len(shared) < 0.1 * len(set(words(domain=0))) and set(words(seed=1)) & set(words(seed=2)) > closed
    repeated = [1 - len(set(group)) / len(group) for group in (sentences(), sentences(repetition=0.5))]
    assert repeated[0] < 0.1 and 0.35 < repeated[1] < 0.65
    known = set(words()) | closed
    unknown = [word for word in words(noise=0.1) if word not in known]
    assert 0.05 < len(unknown) / len(words(noise=0.1)) < 0.12
    assert next(generate(documents=1)) == next(generate(documents=5)), "documents do not depend on how many there are"


def test_normalise():
    assert normalise("e\u0301\r\na\0b\rc") == "é\nab\rc"


def test_the_cost_of_a_row_of_marks_is_its_length():
    for count in (1100, 3000):
        text = "xe" + "\u0301\u0323\u0345" * count + "y\u0301\u0323"
        assert normalise(text) == unicodedata.normalize("NFC", text)
    started = time.process_time()
    assert len(normalise("e" + "\u0301\u0323" * 60_000)) == 120_000  # the square takes a minute
    assert time.process_time() - started < 20


def slow_overlap(text, held_out):
    """The two shares by sets of word tuples."""

    def grams(text):
        words = text.lower().split()
        return {tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))} if words else set()

    own, sets = grams(text), [grams(each) for each in held_out]
    union = set().union(*sets)
    shares = [len(own & each) / len(each) for each in sets if each] + ([len(own & union) / len(own)] if own else [])
    return max(shares, default=0.0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), max_size=40).map(" ".join), min_size=1, max_size=6))
def test_overlap_is_the_containment_of_shingles(documents):
    text, *held_out = documents
    assert HeldOut.of(held_out).overlap(text) == pytest.approx(slow_overlap(text, held_out), abs=1e-12)


def test_shingles_ignore_case_numbers_and_punctuation():
    one = shingles("In 1999, the quick (brown) fox jumped over dogs: twice!")
    assert np.array_equal(one, shingles("in 7 THE quick brown fox jumped over dogs twice"))
    assert len(one) == 10 - SHINGLE + 1 and one.dtype == np.uint64
    assert len(shingles("")) == 0 and len(shingles("too short")) == 1
