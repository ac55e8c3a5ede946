"""Preparation in parts: the same bytes whatever does the work and however the input lies, and on from any kill."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pydantic import ValidationError

from thriftlab.data.corpora import streams
from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.errors import DataError
from thriftlab.data.prepare import Input, PrepareConfig, prepare
from thriftlab.data.prepare import pipeline as module
from thriftlab.data.prepare.pieces import documents, pieces, units
from thriftlab.data.prepare.scores import classifier, trigram
from thriftlab.data.prepare.scores.words import IDS, word_ids
from thriftlab.data.shards import open_dataset

PIECE = 30_000
SETTINGS = dict(
    holdout_bytes=0, tokenizer="bpe:400", rules=("gopher-words", "refinedweb"), near={"bands": "20x5"},
    rule={"gopher-words": {"least": 30}}, quality={"positive": "web", "negative": "junk"}, perplexity={"on": "web"},
    pools={"by": "score", "count": 3}, piece_bytes=PIECE, shard_tokens=9_000, engine="here",
)  # fmt: skip


def corpus():
    """Texts of two sources, with planted copies, near copies, empty and short ones, CRLF and combining marks."""
    web = list(generate(120, 60, vocabulary=2000))
    web += [
        web[0],
        web[1].replace(" ", "\r\n", 3),
        web[1].replace(" ", "\n", 3),
        "",
        " \n",
        "too short",
        "Cafe\u0301 " * 40,
    ]
    web += [f"{text} And some more words." for text in web[5:25]]
    junk = ["".join(reversed(text)) for text in generate(60, 60, vocabulary=400, noise=0.4, seed=3)]
    return {"web": web, "junk": [*junk, web[2], junk[0]]}


def write(folder, layout="lines", order=None):
    """The corpus as files; returns the inputs."""
    inputs = {}
    for name, texts in corpus().items():
        texts = random.Random(order).sample(texts, len(texts)) if order is not None else texts
        place = folder / name
        place.mkdir(parents=True)
        rows = [{"text": text, "rest": k} for k, text in enumerate(texts)]
        lines = ["".join(json.dumps(row) + "\n" for row in rows[k::4]) for k in range(4)]
        if layout == "lines":
            (place / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if layout == "four":
            for k, text in enumerate(lines):
                (place / f"{k}.jsonl").write_text(text)
        if layout == "packed":
            for k, text in enumerate(lines):
                (place / f"{k}.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
        if layout == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), place / "all.parquet", row_group_size=17)
        inputs[name] = Input(path=str(place), kind="web" if name == "web" else "text")
    return inputs


def shards(folder):
    """What training reads, byte by byte."""
    kinds = (".bin", ".npy")
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.suffix in kinds}
    assert len(files) > 10
    return files | {"fingerprint": open_dataset(folder).fingerprint}


def everything(folder):
    """All files but the manifest, which has a date."""
    files = [
        file for file in folder.rglob("*") if file.is_file() and "manifest" not in file.name and file.name[0] != "."
    ]
    return {file.relative_to(folder): file.read_bytes() for file in files} | {"": open_dataset(folder).fingerprint}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    prepare(PrepareConfig(out=folder / "out", inputs=write(folder / "in"), **SETTINGS))
    return folder


# --- the same bytes --------------------------------------------------------------------------------------------------


def test_every_stage_drops_what_was_planted(expected):
    drops = open_dataset(expected / "out").manifest["sources"]["web"]["drops"]
    assert drops["empty"] == 2 and drops["exact duplicate"] == 2 and drops["gopher-words"] == 1
    assert drops["near duplicate"] == 21
    assert (
        open_dataset(expected / "out").manifest["sources"]["junk"]["drops"]["exact duplicate"] == 1
    )  # rules edit the other copy of web[2]


@pytest.mark.parametrize("layout", ["four", "packed", "parquet"])
@pytest.mark.parametrize("order", [None, 7])
def test_files_and_their_order_do_not_count(tmp_path, expected, layout, order):
    prepare(PrepareConfig(out=tmp_path / "out", inputs=write(tmp_path / "in", layout, order), **SETTINGS))
    assert shards(tmp_path / "out") == shards(expected / "out")


@pytest.mark.parametrize("piece_bytes", [2**12, 2**20])
def test_the_number_of_parts_does_not_count(tmp_path, expected, piece_bytes):
    settings = SETTINGS | {"piece_bytes": piece_bytes}
    prepare(PrepareConfig(out=tmp_path / "out", inputs=write(tmp_path / "in"), **settings))
    assert shards(tmp_path / "out") == shards(expected / "out")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_processes_leave_the_bytes_of_one(tmp_path, expected, workers):
    settings = SETTINGS | {"engine": "processes", "workers": workers}
    prepare(PrepareConfig(out=tmp_path / "out", inputs=write(tmp_path / "in"), **settings))
    assert everything(tmp_path / "out") == everything(expected / "out")


@pytest.mark.slow
def test_ray_leaves_the_bytes_of_one(tmp_path, expected):
    pytest.importorskip("ray")
    settings = SETTINGS | {"engine": "ray", "workers": 2}
    prepare(PrepareConfig(out=tmp_path / "out", inputs=write(tmp_path / "in"), **settings))
    assert everything(tmp_path / "out") == everything(expected / "out")


def test_these_bytes_are_promised(expected):
    """Of this Python's tables of Unicode and this version: a change is made on purpose, and said."""
    assert open_dataset(expected / "out").fingerprint[:16] == "1deb8d0977711cb2"


# --- pieces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["lines", "four", "packed", "parquet"])
@pytest.mark.parametrize("size", [700, 5_000, 10**6])
def test_pieces_have_every_document_once_with_the_number_of_its_line(tmp_path, layout, size):
    inputs = write(tmp_path, layout)
    from thriftlab.data.corpora.readers import read
    from thriftlab.data.prepare.engines.base import Here

    for source in inputs.values():
        found = units(source, size, lambda *told: None, Here(tmp_path))
        cut = [unit for _, held in pieces(0, found, size) for unit in held]
        assert cut == found
        expected = [(document.id, document.text) for document in read(source.path)]
        assert [row for unit in found for row in documents(unit, "text")] == expected


@pytest.mark.parametrize("text", ["a\n\nbc\n", "a", "\n\n\n", "ab\ncd\nefgh\ni", ""])
def test_lines_between_bytes(tmp_path, text):
    file = tmp_path / "x.jsonl"
    file.write_text(text)
    whole, size = list(streams.lines(file)), len(text)
    for cut in range(size + 1):
        first, second = streams.lines_between(file, 0, cut), streams.lines_between(file, cut, size)
        assert [*first, *second] == whole
        assert streams.line_ends(file, 0, cut) == text[:cut].count("\n")


def test_a_bad_line_is_named_by_its_number_in_whatever_piece_it_is(tmp_path):
    lines = [json.dumps({"text": f"document {k} " * 30}) for k in range(400)]
    lines[371] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="a.jsonl, line 372: not a JSON object"):
        prepare(PrepareConfig(out=tmp_path / "out", inputs={"a": Input(path=str(tmp_path / "a.jsonl"))},
                              piece_bytes=5_000, engine="here"))  # fmt: skip
    assert os.listdir(tmp_path) == ["a.jsonl"]


# --- going on --------------------------------------------------------------------------------------------------------


def test_another_plan_does_not_mix(tmp_path, expected, monkeypatch):
    inputs = write(tmp_path / "in")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_split", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        prepare(PrepareConfig(out=tmp_path / "out", inputs=inputs, **SETTINGS))
    before = {file for file in (tmp_path / ".out.partial").rglob("*")}
    with pytest.raises(
        DataError, match="out.partial: holds the unfinished work.*with seed = 0.*asked for with 1.*force"
    ):
        prepare(PrepareConfig(out=tmp_path / "out", inputs=inputs, **SETTINGS, seed=1))
    assert {file for file in (tmp_path / ".out.partial").rglob("*")} == before, "what is there is not lost"
    with monkeypatch.context() as patch:
        patch.setattr(module, "clean", lambda *given: pytest.fail("read again"))
        prepare(PrepareConfig(out=tmp_path / "out", inputs=inputs, **SETTINGS))
    assert shards(tmp_path / "out") == shards(expected / "out")
    other = prepare(PrepareConfig(out=tmp_path / "out", inputs=inputs, **SETTINGS, seed=1, force=True))
    assert other.fingerprint != open_dataset(expected / "out").fingerprint
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


SCRIPT = """
import json, sys
from thriftlab.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    from tests.tools.dying import die_after
    die_after(int(sys.argv[2]))
    prepare(PrepareConfig(**json.load(open(sys.argv[1]))))
"""


def run_script(tmp_path, inputs, changes, **more):
    settings = SETTINGS | {"inputs": {name: each.model_dump() for name, each in inputs.items()}} | more
    (tmp_path / "settings.json").write_text(json.dumps(settings | {"out": str(tmp_path / "out")}))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "settings.json", str(changes)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL).returncode


@pytest.mark.slow
def test_killed_at_random_it_goes_on_to_the_same_bytes(tmp_path, expected):
    """Its workers are anywhere then, and die with it."""
    inputs, options = write(tmp_path / "in"), {"engine": "processes", "workers": 2}
    for changes in np.random.default_rng(5).integers(5, 70, 4):
        assert run_script(tmp_path, inputs, changes, **options) == -signal.SIGKILL
    assert run_script(tmp_path, inputs, 10**6, **options) == 0
    assert everything(tmp_path / "out") == everything(expected / "out")
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".out")]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for copies in (1, 4):
        place = tmp_path / f"{copies}x"
        place.mkdir()
        draw, words = (
            np.random.default_rng(0),
            ["".join(chr(97 + k // 26**i % 26) for i in range(3)) for k in range(2000)],
        )
        with open(place / "a.jsonl", "w") as file:
            for _ in range(1500 * copies):
                file.write(json.dumps({"text": " ".join(words[k] for k in draw.integers(0, 2000, 400))}) + "\n")
        code = f"""
import resource
from thriftlab.data.prepare import Input, PrepareConfig, prepare
prepare(PrepareConfig(
    out={str(place / "out")!r}, inputs={{"a": Input(path={str(place / "a.jsonl")!r})}}, near={{"bands": "14x8"}},
    rules=("gopher-words",), piece_bytes=2**19, holdout=1e-9, holdout_bytes=0, engine="here",
))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.1 * peaks[0], f"{peaks} kB: 6 and 24 MB of text"


# --- scores ----------------------------------------------------------------------------------------------------------


def ledger(folder):
    files = sorted((folder / "documents").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_scores_are_those_of_models_trained_on_all_documents_of_their_sources(expected):
    rows = sorted((row for row in ledger(expected / "out") if row["stage"] in ("kept", "decontaminate")),
                  key=lambda row: row["number"])  # fmt: skip
    texts = {name: [row["text"] for row in rows if row["source"] == name] for name in ("web", "junk")}
    of_kind = classifier.train(texts["web"], texts["junk"])
    words = {name: [word_ids(text) for text in found] for name, found in texts.items()}
    of_words = trigram.train(words["web"], IDS)
    for name, found in texts.items():
        mine = [row for row in rows if row["source"] == name]
        assert [row["score"] for row in mine] == [value / 65536 for value in of_kind.score(found).tolist()]
        nats = of_words.score(words[name], own=name == "web")
        assert [row["trigram"] for row in mine] == pytest.approx([value / 65536 for value in nats.tolist()], rel=1e-6)
        order = sorted(row["score"] for row in mine)
        cuts = [order[-(-len(order) * k // 3) - 1] for k in (1, 2)]
        assert [row["pool"] for row in mine] == [sum(row["score"] > cut for cut in cuts) for row in mine]


def test_scores_lie_beside_their_documents(expected):
    data, rows = open_dataset(expected / "out"), ledger(expected / "out")
    assert data.manifest["sources"]["web"]["columns"] == {"score": 65536, "trigram": 65536, "pool": 1}
    for name in data.sources:
        for split in ("train", "validation"):
            wanted = [row for row in rows if (row["source"], row["split"]) == (name, split)]
            wanted.sort(key=lambda row: row["number"])
            found = [
                np.load(data.path / shard["scores_file"]) for shard in data.manifest["sources"][name][split]["shards"]
            ]
            scores = np.concatenate(found)
            assert scores[:, 0].tolist() == [round(row["score"] * 65536) for row in wanted]
            assert scores[:, 2].tolist() == [row["pool"] for row in wanted]


def test_scorers_without_sources_are_refused():
    inputs = {"web": {"path": "synthetic:documents=9"}}
    for wrong, message in (
        ({"quality": {"positive": "web"}}, "positive and negative"),
        ({"quality": {"positive": "web", "negative": "wbe"}}, "no input 'wbe'"),
        ({"perplexity": {"on": "none"}}, "no input 'none'"),
        ({"pools": {"by": "model"}}, "set perplexity.run"),
        ({"near": {"bands": "14x8", "threshold": 0.8}}, "not both"),
        ({"near": {"bands": "14"}}, "BANDSxROWS"),
        ({"rules": "gophr"}, "near to it: gopher"),
        ({"rule": {"gopher-words": {"least": 3}}}, "add gopher-words to rules"),
    ):
        with pytest.raises(ValidationError, match=message):
            PrepareConfig(inputs=inputs, **wrong)


def test_a_copy_names_the_document_that_stayed(expected):
    rows = ledger(expected / "out")
    keys = {row["number"]: row["key"] for row in rows if row["number"] is not None}
    copies = [row for row in rows if row["stage"] == "exact"]
    assert len(copies) == 3 and [keys[row["of"]] for row in copies] == [row["key"] for row in copies]
