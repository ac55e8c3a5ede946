"""`thriftlab data export`: the documents that stayed, in a file that others read, and `prepare` reads again."""

import gzip
import json
import random
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.tools.finished import UNITS, document, finish
from thriftlab.data.corpora.readers import read
from thriftlab.data.errors import DataError
from thriftlab.data.files import WriteError
from thriftlab.data.prepare.report import documents as ledger
from thriftlab.data.prepare.report import export as module
from thriftlab.data.prepare.report.export import export
from thriftlab.data.tokens import train_bpe
from thriftlab.launch import cli

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
ODD = [
    "line\nbreaks\r and \u2028 \u0085 tabs\t",
    'quotes "" \\ \\n </script>',
    "caf\u00e9 \U0001f600 \u202e rtl",
    "x",
    "\ufeffbom",
]


def rows(count=60):
    chance = random.Random(0)
    found = [document("web", "gone:1", "no", "rules", "words"), document("web", "gone:2", " ", "empty", "empty")]
    for k in range(count):
        source = ("web", "books")[k % 2]
        text = f"{ODD[k % len(ODD)]} {k} " + " ".join(chance.choice(["some", "words", "and"]) for _ in range(k))
        scores = {"score": chance.randrange(65537) / 65536, "trigram": k / 8, "pool": k % 4}
        if k % 10 == 9:
            found.append(document(source, f"{source}:{k}", text, "near", "near duplicate", of="web:0"))
        else:
            found.append(document(source, f"{source}:{k}", text, split=("train", "validation")[k % 7 == 0], **scores))
    return found


def wanted(made, units=UNITS):
    keys = ("source", "id", "split", "text", *units)
    order = sorted((row for row in made if row["stage"] == "kept"), key=lambda row: row["part"])
    return [{key: row[key] for key in keys} for row in order]


def contents(path):
    """By other means than the package's."""
    if path.name.endswith(".parquet"):
        return pq.read_table(path).to_pylist()
    raw = path.read_bytes()
    if path.name.endswith(".gz"):
        raw = gzip.decompress(raw)
    if path.name.endswith(".zst"):
        raw = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
    return [json.loads(line) for line in raw.decode().split("\n")[:-1]]


@pytest.mark.parametrize("keep_text", [True, False])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_stayed_is_what_is_written(tmp_path, suffix, keep_text):
    made = finish(tmp_path / "data", rows(), keep_text=keep_text, shard_tokens=700)
    out = tmp_path / f"out{suffix}"
    assert export(tmp_path / "data", out) == len(wanted(made))
    assert contents(out) == wanted(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", out.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_it_is_read_again_as_the_same_documents(tmp_path, suffix):
    made = finish(tmp_path / "data", rows())
    out = tmp_path / f"out{suffix}"
    export(tmp_path / "data", out)
    assert [each.text for each in read(out)] == [row["text"] for row in wanted(made)]


def test_texts_that_were_not_kept_come_from_the_tokens_of_any_tokenizer(tmp_path):
    made = rows()
    tokenizer = train_bpe((row["text"] for row in made), 300)
    made = finish(tmp_path / "data", made, keep_text=False, tokenizer=tokenizer, shard_tokens=300, parts=5)
    export(tmp_path / "data", tmp_path / "out.parquet")
    assert contents(tmp_path / "out.parquet") == wanted(made)


def test_columns_and_types(tmp_path):
    finish(tmp_path / "data", rows())
    export(tmp_path / "data", tmp_path / "out.parquet")
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.names == ["source", "id", "split", "text", "score", "trigram", "pool"]
    assert schema.field("score").type == pa.float32() and schema.field("pool").type == pa.int16()
    finish(tmp_path / "bare", rows(), units={})
    export(tmp_path / "bare", tmp_path / "bare.jsonl")
    assert list(contents(tmp_path / "bare.jsonl")[0]) == ["source", "id", "split", "text"]


def test_nothing_is_overwritten_unless_asked(tmp_path):
    finish(tmp_path / "data", rows())
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(DataError, match="out.jsonl: is there already; choose another file, or .* force=true"):
        export(tmp_path / "data", out)
    assert out.read_text() == "mine"
    export(tmp_path / "data", out, force=True)
    assert len(contents(out)) > 40


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, suffix):
    finish(tmp_path / "data", rows())
    out = tmp_path / f"out{suffix}"
    out.write_text("mine")
    plain = module.kept

    def failing(documents):
        yield from plain(documents)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "kept", failing)
    with pytest.raises(WriteError, match=f"out{suffix} cannot be written .No space left"):
        export(tmp_path / "data", out, force=True)
    assert out.read_text() == "mine" and sorted(path.name for path in tmp_path.iterdir()) == ["data", out.name]


def test_refusals(tmp_path):
    finish(tmp_path / "data", rows())
    for out, message in [
        ("out.csv", "its suffix is none of .parquet, .jsonl, .jsonl.gz, .jsonl.zst"),
        ("nowhere/out.parquet", "nowhere: no such folder"),
    ]:
        with pytest.raises(DataError, match=message):
            export(tmp_path / "data", tmp_path / out)
    path = tmp_path / "data/documents/00001.parquet"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="00001.parquet: changed since it was prepared"):
        export(tmp_path / "data", tmp_path / "out.parquet")
    path.unlink()
    with pytest.raises(DataError, match="00001.parquet: missing"):
        export(tmp_path / "data", tmp_path / "out.parquet")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_grow_with_the_documents(tmp_path, monkeypatch, suffix):
    """Python's and Arrow's, for six times the documents."""
    monkeypatch.setattr(ledger, "ROWS", 64)
    plain, most = module.kept, 0

    def watched(documents):
        nonlocal most
        for rows in plain(documents):
            yield rows
            most = max(most, pa.total_allocated_bytes() - before)

    monkeypatch.setattr(module, "kept", watched)
    peaks = []
    for times in (1, 6):
        made = [document("web", f"a:{k}", f"{k} " + "word " * 800) for k in range(1000 * times)]
        finish(tmp_path / f"{times}", [*made, document("web", "b", "held", split="validation")], units={})
        before, most = pa.total_allocated_bytes(), 0
        tracemalloc.start()
        export(tmp_path / f"{times}", tmp_path / f"{times}{suffix}")
        peaks.append((tracemalloc.get_traced_memory()[1], most))
        tracemalloc.stop()
    (python, arrow), (python_of_more, arrow_of_more) = peaks
    assert python_of_more < 1.2 * python + 2**18 and arrow_of_more < 1.2 * arrow + 2**18


def test_the_command(tmp_path, capsys):
    made = finish(tmp_path / "data", rows())
    words = ["data", "export", str(tmp_path / "data"), str(tmp_path / "out.parquet")]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path}/out.parquet: {len(wanted(made))} documents\n"
    assert cli.main(words) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert cli.main([*words, "force=true"]) == 0
    assert cli.main(words[:-1]) == 2 and cli.main([*words, "document=1"]) == 2
    assert "data export takes no document" in capsys.readouterr().err
