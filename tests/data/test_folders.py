"""Which files of a folder are read, as what, and that none is passed over in silence."""

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from thriftlab.data.corpora import folders
from thriftlab.data.corpora.readers import read
from thriftlab.data.errors import DataError
from thriftlab.data.prepare import Input, PrepareConfig, prepare
from thriftlab.data.prepare.request import request_of

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(path, **options):
    return [document.text for document in read(path, **options)]


def passed_over(path, **options):
    found = []
    list(read(path, pass_over=lambda *pair: found.append(pair), **options))
    return found


# --- links -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """A folder with one text, and beside it a folder with another."""
    for name in ("corpus/a.txt", "elsewhere/deep/b.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "corpus"


def test_linked_folders_and_files_are_read_and_seen_by_the_stamp(corpus):
    def stamp():
        return request_of(PrepareConfig(out="o", inputs={"web": Input(path=str(corpus))}))["content"]["web"]

    stamps = {stamp()}
    (corpus / "more").symlink_to(corpus.parent / "elsewhere")
    stamps.add(stamp())
    (corpus / "z.txt").symlink_to("a.txt")
    stamps.add(stamp())
    assert texts(corpus) == ["corpus/a.txt", "elsewhere/deep/b.txt", "corpus/a.txt"]
    assert [document.id for document in read(corpus)] == ["a.txt", "more/deep/b.txt", "z.txt"]
    (corpus.parent / "elsewhere" / "deep" / "b.txt").write_text("another text")
    stamps.add(stamp())
    assert len(stamps) == 4, "each change of what is read changes the stamp"


def test_a_folder_that_is_linked_twice_is_read_once_and_told(corpus):
    for name in ("m", "n"):
        (corpus / name).symlink_to(corpus.parent / "elsewhere")
    assert texts(corpus) == ["corpus/a.txt", "elsewhere/deep/b.txt"]
    assert passed_over(corpus) == [("n", f"the same folder as {corpus / 'm'}")]


@pytest.mark.parametrize("target, message", [
    ("nowhere.txt", "links to nowhere.txt, which is not there"),
    ("../gone", "links to ../gone, which is not there"),
    ("link", "Too many levels of symbolic links"),
    (".", "a loop"),
    ("..", "a loop"),
])  # fmt: skip
def test_links_that_lead_nowhere_or_in_circles_are_refused_by_name(corpus, target, message):
    (corpus / "sub").mkdir()
    link = corpus / "sub" / "link"
    link.symlink_to(target)
    for look in (texts, folders.files):
        with pytest.raises(DataError, match=f"{link}: .*{message}"):
            look(corpus)


def test_two_folders_that_link_to_each_other_are_a_loop(corpus):
    (corpus / "up").symlink_to(corpus.parent / "elsewhere")
    (corpus.parent / "elsewhere" / "back").symlink_to(corpus)
    with pytest.raises(DataError, match="up/back: links to .*corpus, which it lies in"):
        texts(corpus)


def test_what_is_neither_file_nor_folder_is_refused(corpus, monkeypatch):
    os.mkfifo(corpus / "pipe.txt")
    with pytest.raises(DataError, match="pipe.txt: a pipe"):
        texts(corpus)
    with pytest.raises(DataError, match="pipe.txt: a pipe"):
        texts(corpus / "pipe.txt")
    os.unlink(corpus / "pipe.txt")
    monkeypatch.chdir(corpus)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.txt")
        with pytest.raises(DataError, match="s.txt: a pipe, a socket"):
            texts(corpus)


def test_a_folder_that_may_not_be_read_is_refused(corpus, monkeypatch):
    (corpus / "closed").mkdir()
    listdir = os.listdir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match="closed: cannot be read .Permission denied"):
        texts(corpus)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, data", [
    ("SHARD.JSONL", LINES), ("a.NdJson", LINES), ("A.JSONL.GZ", gzip.compress(LINES, mtime=0)), ("a.Json", LINES),
    ("a.jsonl.zstd", zstandard.compress(LINES)), ("A.Jsonl.ZST", zstandard.compress(LINES)),
    ("unpacked-on-the-way.jsonl", gzip.compress(LINES, mtime=0)), ("v1.2.jsonl", LINES),
])  # fmt: skip
def test_suffixes_count_without_regard_to_case(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert texts(tmp_path) == texts(tmp_path / name) == ["one", "two"]


UNKNOWN = [
    "x.jsonl.1", "part-00000", "data.csv", "data.TSV", "all.tar", "all.tar.gz", "x.jsonl.bz2", "x.txt.xz", "x.gz",
    "a.zip", "a.pdf", "a.arrow", "a.txt~", "x.jsonl.gz.gz", "_notes",
]  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_no_reader_knows_is_refused_before_anything_is_read_and_format_overrides(tmp_path, name, monkeypatch):
    (tmp_path / name).write_bytes(LINES)
    (tmp_path / "a.txt").write_text("fine")
    with pytest.raises(DataError, match=rf"{name}: .*\.txt .*\.jsonl .*\.parquet.*\.zstd.*format=text, jsonl, json or"):
        texts(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(DataError, match=name):
        patch.setattr("thriftlab.data.prepare.pipeline.clean", lambda *given: pytest.fail("it was read"))
        prepare(PrepareConfig(out=tmp_path.parent / "out", inputs={"web": Input(path=str(tmp_path))}))
    (tmp_path / "a.txt").unlink()
    if not name.endswith(".gz"):
        assert texts(tmp_path, format="jsonl") == texts(tmp_path, format="json") == ["one", "two"]
        assert texts(tmp_path, format="text") == [LINES.decode()]


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_format_overrides_and_what_is_packed_is_unpacked_whatever_its_name(tmp_path, pack):
    (tmp_path / "x.jsonl.gz.1").write_bytes(pack(LINES))
    assert texts(tmp_path, format="jsonl") == ["one", "two"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "x.jsonl.gz.1")
    assert texts(tmp_path, format="parquet") == ["row"]


def a_tar(data):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.add(__file__, "a.txt")
    return file.getvalue()


def parquet(data):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("make, message", [
    (lambda data: data.decode().encode("utf-16"), "UTF-16; convert it: iconv -f utf-16"),
    (bz2.compress, "compressed by bzip2; unpack it"), (lzma.compress, "compressed by xz; unpack it"),
    (a_tar, "a tar archive; unpack it"), (parquet, "a parquet file; give it that suffix, or format=parquet"),
], ids=["utf-16", "bzip2", "xz", "tar", "parquet"])  # fmt: skip
def test_what_is_no_text_under_a_name_of_text_is_said_by_its_content(tmp_path, name, make, message):
    data = make(LINES)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        texts(tmp_path)


def test_binary_files_and_utf16_without_a_mark_are_no_plain_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("words".encode("utf-16-le"))
    with pytest.raises(DataError, match="a.txt: .*character 1 is NUL.*convert it, or say format=text"):
        texts(tmp_path)
    assert texts(tmp_path, format="text") == ["w\0o\0r\0d\0s\0"]


def test_a_compressed_parquet_file_is_explained(tmp_path):
    (tmp_path / "a.parquet.zst").write_bytes(b"")
    for given in (None, "parquet"):
        with pytest.raises(DataError, match="a.parquet.zst: parquet is compressed inside.*unpack it"):
            texts(tmp_path, format=given)


@pytest.mark.parametrize("data", [LINES, b"\xef\xbb\xbf\n " + LINES, b'{"text": "only one"}', b"{}\nmore"])
def test_text_that_starts_like_lines_of_json_is_asked_about(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match="a.txt: .*first line is a JSON object.*format=jsonl or format=text"):
        texts(tmp_path)
    assert texts(tmp_path, format="text") == [data.decode("utf-8-sig")]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("tree", [[{"text": "one"}, {"text": "two"}], {"text": "one"}])
def test_text_that_is_an_array_or_an_object_over_lines_is_asked_about(tmp_path, tree, indent):
    (tmp_path / "a.md").write_text(json.dumps(tree, indent=indent))
    one_line = indent is None and isinstance(tree, dict)
    with pytest.raises(DataError, match=f"a.md: .*JSON.*format={'jsonl' if one_line else 'json'} or format=text"):
        texts(tmp_path)
    assert texts(tmp_path, format="json")[0] == "one"


@pytest.mark.parametrize(
    "text",
    ["[]", '{"a": 1} and more', "{ set of } names", '{"text": 1', "[1, 2]\n", '"text"', "1", "{" * 99_999, "{\n}"],
)
def test_other_text_is_not(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert texts(tmp_path) == [text]


def test_format_is_for_files(tmp_path):
    for path in ("embedded:news", "hf:name", "synthetic", "recipe:medium:essays"):
        with pytest.raises(DataError, match=f"{path}: format=text is for files"):
            texts(path, format="text")
        with pytest.raises(DataError, match="is for files"):
            request_of(PrepareConfig(inputs={"web": Input(path=path, format="text")}))
    (tmp_path / "state.json").write_bytes(LINES)
    assert texts(tmp_path) == ["one", "two"], "one file of a data set that `datasets` saved makes none"


def test_a_format_that_is_not_given_is_not_recorded():
    assert not [key for key in request_of(PrepareConfig())["settings"] if "format" in key]
    named = PrepareConfig(inputs={"web": Input(path="synthetic")})
    assert "inputs.web.format" not in request_of(named)["settings"]


def test_names_that_are_not_utf8_are_read_stamped_recorded_and_shown(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.mkdir(folder)
    for name in (b"a\xff.txt", b"\xe9.txt", b".h\xe9", b"e\xe9.txt"):
        text = b"" if name.startswith(b"e") else b"text of " + name[:1].hex().encode() * 9
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(text)
    assert sorted(texts(folder)) == ["text of " + "61" * 9, "text of " + "e9" * 9]
    assert os.fsdecode(b"a\xff.txt") in [document.id for document in read(folder)]
    settings = PrepareConfig(out=folder + "-out", inputs={"web": Input(path=folder)}, near_duplicate=1)
    for note in ("prepared in", "already prepared"):
        shown = str(prepare(settings)).encode().decode()
        assert "1 hidden (.h\\udce9)" in shown and "1 empty (e\\udce9.txt)" in shown and note in shown


# --- what is passed over ---------------------------------------------------------------------------------------------


def test_markers_hidden_and_empty_files_are_passed_over_and_counted(tmp_path, capsys):
    spark = tmp_path / "spark"
    (spark / "_temporary" / "0").mkdir(parents=True)
    (spark / ".git" / "objects").mkdir(parents=True)
    for name in ("_SUCCESS", "_committed_123", "_started_123", "._SUCCESS.crc", ".a.crc", ".b.crc", "c.crc.jsonl",
                 "_temporary/0/part.jsonl", ".git/objects/x.txt"):  # fmt: skip
        (spark / name).write_bytes(b"")
    for number, rows in enumerate([["first", "second"], [], ["third"], []]):
        table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())} if rows else {"other": pyarrow.nulls(0)})
        pyarrow.parquet.write_table(table, spark / f"part-{number}.parquet")
    settings = PrepareConfig(out=tmp_path / "out", inputs={"web": Input(path=str(spark))}, near_duplicate=1)
    for _ in range(2):
        summary = prepare(settings)
        for line in ("4 hidden (._SUCCESS.crc, .a.crc, .b.crc, ...)", "4 marker file", "3 empty (c.crc.jsonl, part-1"):
            assert f"passed over: {line}" in str(summary)
    told = summary.manifest["made"]["passed_over"]["web"]
    assert told["hidden"]["count"] == 4 and len(told["hidden"]["first"]) == 3
    assert set(told["marker file"]["first"]) < {"_SUCCESS", "_committed_123", "_started_123", "_temporary"}
    assert told["empty"]["first"] == ["c.crc.jsonl", "part-1.parquet", "part-3.parquet"]
    assert texts(spark) == ["first", "second", "third"]
    assert "_SUCCESS: passed over, marker file" in capsys.readouterr().err, "`read` alone tells it, too"


def test_a_folder_with_nothing_to_read_is_refused(tmp_path):
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(DataError, match="holds no files, but hidden or marker files"):
        texts(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="a.jsonl: empty, and there is no document in"):
        texts(tmp_path)


# --- what is inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.string(), pyarrow.large_string(),
                                  pyarrow.dictionary(pyarrow.int8(), pyarrow.string())], ids=str)  # fmt: skip
def test_parquet_with_text_of_any_type_is_read(tmp_path, kind):
    rows = ["one", "zwöi ☃", ""] * 100
    binary = pyarrow.array([row.encode() for row in rows], pyarrow.large_binary())
    strings = pyarrow.array(rows)
    column = strings.dictionary_encode().cast(kind) if pyarrow.types.is_dictionary(kind) else binary.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert texts(tmp_path) == rows


def test_parquet_with_bytes_that_are_no_text_names_the_row(tmp_path):
    table = pyarrow.table({"text": pyarrow.array([b"fine", b"caf\xe9"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet, row 2: 'text' is not UTF-8 .byte 3"):
        texts(tmp_path)


@pytest.mark.parametrize("data, read_as", [
    (b'[{"text": "one"}, {"text": "two"}]', ["one", "two"]),
    (b'\xef\xbb\xbf [\n {\n  "text": "one"\n },\n {"text": "two"}\n]\n', ["one", "two"]),
    (b'{\n "text": "one"\n}\n{\n "text": "two"}', ["one", "two"]),
    (LINES, ["one", "two"]),
])  # fmt: skip
def test_json_is_objects_or_one_array_of_them(tmp_path, data, read_as):
    for name, packed in (("a.json", data), ("a.json.gz", gzip.compress(data, mtime=0))):
        (tmp_path / name).write_bytes(packed)
        assert texts(tmp_path / name) == read_as
        (tmp_path / name).unlink()
    (tmp_path / "a.jsonl").write_bytes(data)
    assert texts(tmp_path, format="json") == read_as
    if data != LINES:
        with pytest.raises(DataError, match="a.jsonl, line 1: .*format=json reads"):
            texts(tmp_path)


@pytest.mark.parametrize("data, message", [
    (b'[{"text": "one"} {"text": "two"}]', "line 1: not JSON .no comma"),
    (b'[{"text": "one"},\n]', "line 2: not JSON .Expecting value"),
    (b'[{"text": "one"},\n\n{"text": "two"', "line 3: not JSON"),
    (b'[{"text": "one"}]\n\n{}', "line 3: not JSON .more behind"),
    (b'[\n"one"]', "line 2: holds str"),
    (b'{"text": "one"}\n{"text": }\n' + LINES * 9999, "line 2: not JSON .Expecting value"),
    (b'{"text": "one"}\n' + b"[" * 99_999, "line 2: not JSON .maximum recursion"),
    (b'{"text": "caf\xe9"}', "not UTF-8"),
    (b'{"body": "one"}', "line 1: no text under 'text'; there is body"),
    (b"[]", "empty"),
])  # fmt: skip
def test_json_that_is_broken_names_the_line(tmp_path, data, message):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=f"a.json.*{message}"):
        texts(tmp_path)


def test_json_is_read_the_same_wherever_a_chunk_ends(tmp_path, monkeypatch):
    rows = [{"text": 'é☃\\"\n' * 5, "n": [1.5e10, True, None, {"deep": "x" * 50}]}, {"text": "", "m": -12}] * 3
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    for chunk in range(1, 9):
        monkeypatch.setattr("thriftlab.data.corpora.streams.CHUNK", chunk)
        for name in ("a.json", "b.json"):
            assert [document.metadata | {"text": document.text} for document in read(tmp_path / name)] == rows
