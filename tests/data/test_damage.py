"""Whatever bytes a file holds, under whatever name: it is read, or a DataError of one line names it."""

import gzip
import io
import json
import time

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thriftlab.data.corpora import streams
from thriftlab.data.corpora.readers import read
from thriftlab.data.errors import DataError

ROWS = [{"text": text, "more": [1.5, None, {"deep": "x"}]} for text in ("one é☃", 'two\\"\n', "", "x" * 300)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
SUFFIXES = [f".{kind}{packed}" for kind in ("txt", "jsonl", "json") for packed in ("", ".gz", ".zst")] + [".parquet"]


def parquet(**options):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one é", "two", ""] * 9, "n": range(27)}), file, **options)
    return file.getvalue()


PLAIN = [LINES, json.dumps(ROWS, indent=1).encode(), b"text\r\nof lines", b""]
PACKED = [pack(data) for data in PLAIN for pack in (gzip.compress, zstandard.compress)]
TABLES = [parquet(), parquet(compression="zstd", row_group_size=5), parquet(use_dictionary=False, compression="gzip")]
PIECES = [b"\xff" * 4, b'{"', b"[[", b"]", b'"\\ud', b"NaN"]


@st.composite
def files(draw):
    """The suffix and the bytes of a file of its kind or of another, with a few changes."""
    suffix = draw(st.sampled_from(SUFFIXES))
    usual = TABLES if suffix == ".parquet" else PLAIN + PACKED
    data = bytearray(draw(st.one_of(st.sampled_from(usual), st.sampled_from(PLAIN + PACKED + TABLES), st.binary())))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        new = draw(st.one_of(st.binary(max_size=9), st.sampled_from(PIECES)))
        data[at : at + draw(st.integers(0, 9))] = new
    return suffix, bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


def test_what_a_library_says_over_several_lines_becomes_one(tmp_path):
    data = bytearray(TABLES[0])
    data[-30:-8] = b"\xff" * 22  # of the footer, at which thrift ends its message with a new line
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match="a.parquet: not a readable parquet file .*thrift.*fetch it again$") as caught:
        list(read(tmp_path))
    assert "\n" not in str(caught.value)


@settings(max_examples=250, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(files(), st.sampled_from([None, None, "text", "jsonl", "json", "parquet"]), st.sampled_from([3, 1 << 16]))
def test_any_bytes_are_read_or_refused_in_one_line(folder, file, given_format, chunk):
    suffix, data = file
    path = folder / f"a{suffix}"
    path.write_bytes(data)
    started = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", chunk)
        try:
            for document in read(path, format=given_format):
                assert isinstance(document.text, str) and document.text.encode() is not None
        except DataError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert time.process_time() - started < 5
