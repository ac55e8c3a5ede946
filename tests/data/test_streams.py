"""Bytes of any length: linear cost, bounded memory, and limits that say so."""

import gzip
import json
import struct
import time
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from thriftlab.data.corpora import streams
from thriftlab.data.corpora.readers import read
from thriftlab.data.errors import DataError

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(path, **options):
    return [document.text for document in read(path, **options)]


def with_window(data, log):
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(data) + compressor.flush()


# --- zstandard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [10, 27, 28, 31])
def test_a_large_window_is_read(tmp_path, log):
    (tmp_path / "a.jsonl.zst").write_bytes(with_window(LINES, log))
    assert texts(tmp_path) == ["one", "two"]


def test_a_window_beyond_the_limit_says_window_and_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.zst"
    path.write_bytes(bytes.fromhex("28b52ffd00b1") + bytes(99))  # 4 GiB and an eighth, which no zstandard unpacks
    with pytest.raises(DataError, match="a.txt.zst: needs a window of 4608 MiB .*limit is 2048 MiB.*--long=27"):
        texts(path)
    monkeypatch.setattr(streams, "WINDOW", 1 << 23)
    path.write_bytes(with_window(LINES, 23))
    assert texts(path, format="jsonl") == ["one", "two"]
    path.write_bytes(zstandard.compress(LINES[:16]) + with_window(LINES, 24))  # of the second frame
    with pytest.raises(DataError, match="window of 16 MiB .*limit is 8 MiB"):
        texts(path, format="jsonl")


def test_a_file_that_needs_a_dictionary_is_not_called_damaged(tmp_path):
    trained = zstandard.train_dictionary(1024, [b"%d %s" % (i, LINES * 9) for i in range(99)])
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor(dict_data=trained).compress(LINES * 9))
    with pytest.raises(DataError, match="a.jsonl.zst: compressed with a dictionary.*unpack it: zstd -d -D"):
        texts(tmp_path)


def test_a_file_that_begins_with_a_table_is_unpacked_whatever_its_name(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(struct.pack("<II", 0x184D2A50, 4) + bytes(4) + zstandard.compress(LINES))
    assert texts(tmp_path) == ["one", "two"]


def test_skippable_frames_are_skipped_and_truncation_is_seen_at_every_byte(tmp_path):
    skipped = struct.pack("<II", 0x184D2A5E, 5) + b"table"
    whole = zstandard.compress(LINES[:16]) + skipped + zstandard.compress(LINES[16:])
    (tmp_path / "a.jsonl.zst").write_bytes(whole + skipped)
    assert texts(tmp_path) == ["one", "two"]
    first = len(zstandard.compress(LINES[:16]))
    for end in set(range(len(whole))) - {first, first + len(skipped)}:  # there a frame ends
        (tmp_path / "a.jsonl.zst").write_bytes(whole[:end])
        with pytest.raises(DataError, match="damaged or truncated .*(not complete|is empty)"):
            texts(tmp_path)


# --- length ----------------------------------------------------------------------------------------------------------


def test_lines_are_cut_as_python_cuts_them(tmp_path, monkeypatch):
    for data in (b"", b"a", b"\n", b"a\n\nb", b"a\r\nbc\n", b"\n\n"):
        (tmp_path / "a").write_bytes(data)
        for chunk in (1, 2, 3, 1 << 16):
            monkeypatch.setattr(streams, "CHUNK", chunk)
            expected = data.split(b"\n")
            assert list(streams.lines(tmp_path / "a")) == (expected if expected[-1] else expected[:-1])


def long_line(size):
    return json.dumps({"text": "word " * (size // 5)}).encode() + b"\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_the_cost_of_a_long_line_is_linear(tmp_path, monkeypatch, name):
    monkeypatch.setattr(streams, "CHUNK", 256)  # so that copying what is held at every chunk would take minutes
    seconds = []
    for size in (1 << 19, 1 << 22):
        (tmp_path / name).write_bytes(long_line(size).lstrip(b"{" if name == "a.txt" else b""))
        started = time.process_time()
        (text,) = texts(tmp_path)
        seconds.append(time.process_time() - started)
        assert len(text) >= size - 5
    assert seconds[1] < 24 * seconds[0] + 0.3, "eight times the bytes; the square would be 64 times the seconds"


@pytest.mark.parametrize("name, pack", [
    ("a.jsonl", bytes), ("a.json", bytes), ("a.txt", bytes), ("a.txt.gz", gzip.compress),
    ("a.jsonl.zst", zstandard.compress), ("a.json.zst", zstandard.compress),
])  # fmt: skip
def test_a_document_beyond_the_limit_is_refused_and_not_held(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr(streams, "LARGEST", 1 << 20)
    data = long_line(1 << 23)
    (tmp_path / name).write_bytes(pack(data[1:] if ".txt" in name else data))
    tracemalloc.start()
    with pytest.raises(DataError, match=f"{name}.*: larger than 1 MiB, the most.*cut it into documents"):
        texts(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (7 << 20 if pack is not zstandard.compress else 15 << 20)
    (tmp_path / name).write_bytes(pack(b'{"text": "fine"}\n' if ".txt" not in name else b"fine"))
    assert texts(tmp_path) == ["fine"]


def test_a_row_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "LARGEST", 1 << 20)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["small", "x" * (1 << 20) + "é"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet, row 2: larger than 1 MiB"):
        texts(tmp_path)


def test_little_bytes_that_unpack_to_many_are_not_held(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "fine"}\n' + b" " * (1 << 27) + b"\n"))
    tracemalloc.start()
    iterator = read(tmp_path / "a.jsonl.zst")
    assert next(iterator).text == "fine"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 36 << 20


def test_parquet_holds_a_few_rows_of_a_large_row_group(tmp_path):
    rows = [f"{number} " + "some text " * 2000 for number in range(1000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "a.parquet", compression="none",
                                use_dictionary=False, write_batch_size=10)  # fmt: skip
    before, peak = pyarrow.total_allocated_bytes(), 0
    for document, row in zip(read(tmp_path), rows, strict=True):
        assert document.text == row
        peak = max(peak, pyarrow.total_allocated_bytes() - before)
    assert peak < 7_000_000 < 20_000_000 < sum(map(len, rows))
