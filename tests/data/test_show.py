"""`thriftlab data show`: what is said of a folder, and of every document that was read."""

import hashlib
import json

import numpy as np
import pytest

from tests.tools.finished import SETTINGS, document, finish
from tests.tools.stand_ins import rules_of
from thriftlab.data.errors import DataError
from thriftlab.data.prepare.report import show as module
from thriftlab.data.prepare.report.documents import open_documents
from thriftlab.data.prepare.report.show import show
from thriftlab.data.prepare.report.why import explain
from thriftlab.launch import cli

AGAIN = "web number 9, said again\nand much of 9"
HELD, LEAK = "kept, held out for validation", "near-duplicate of a held-out document"


def rows():
    found = []
    for k in range(20):
        for source in ("web", "books"):
            scores = {"score": k / 64, "trigram": k / 8, "pool": k // 5}
            split = "validation" if k in (3, 4) else "train"
            found.append(
                document(
                    source,
                    f"a.jsonl:{k}",
                    f"{source} number {k}\nsaid  much of {k}",
                    split=split,
                    overlap=k / 100,
                    **scores,
                )
            )
    found += [
        document("web", "b.jsonl:1", "too short", "rules", "words"),
        document("web", "b.jsonl:2", " \n", "empty", "empty"),
        document("books", "b.jsonl:3", "books number 7\nsaid  much of 7", "exact", "exact duplicate"),
        document("web", "b.jsonl:4", AGAIN, "near", "near duplicate", of="a.jsonl:9"),
        document("web", "b.jsonl:5", "leaking words", "decontaminate", LEAK, overlap=0.75, score=0.5),
    ]  # fmt: skip
    for row in found:
        if row["source"] == "books":
            row["id"] = row["id"].replace("a.jsonl", "books/a.jsonl")
    return found


@pytest.fixture(params=[True, False], ids=["texts kept", "no texts"])
def folder(request, tmp_path):
    """And its inputs, as they were read."""
    lines = {row["id"]: row["text"] for row in rows() if row["source"] == "web"}
    for name in ("a", "b"):
        longest = max(int(id.split(":")[1]) for id in lines if id.startswith(name))
        written = [json.dumps({"text": lines.get(f"{name}.jsonl:{k}", "")}) for k in range(1, longest + 1)]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/{name}.jsonl").write_text("\n".join(written))
    settings = SETTINGS | {"inputs.web.path": str(tmp_path / "in"), "rules": ["words"], "keep_text": request.param}
    finish(tmp_path / "data", rows(), keep_text=request.param, settings=settings, shard_tokens=200)
    return tmp_path / "data"


@pytest.fixture(autouse=True)
def rules(monkeypatch):
    rules_of(monkeypatch)


def said(folder, name):
    return {block.split("\n")[0].split(",")[0]: block for block in show(folder, name).split("\n\n")}


def test_a_document_that_was_kept(folder):
    number = next(row["number"] for row in open_documents(folder).rows() if row["id"] == "a.jsonl:9")
    found = said(folder, "web/a.jsonl:9")
    head = found["web/a.jsonl:9"].split("\n")
    assert head[1].startswith(f"document {number}, 28 bytes, key ") and head[2] == "kept for training"
    assert "  passed  words  7      5      words" in found["rules"]
    assert "dropped as near duplicate of it" in found["copies"] and "b.jsonl:4" in found["copies"]
    assert "score   0.1406   pools are cut at 0.25, 0.5, 0.75" in found["scores"] and "pool    1" in found["scores"]
    assert "not held out: its point" in found["held-out text"] and "9.0% in common" in found["held-out text"]
    assert found["text"].endswith("  web number 9\n  said  much of 9")
    assert show(folder, str(number)) == show(folder, "web/a.jsonl:9")


def test_its_tokens_are_where_it_says(folder):
    """For every document that stayed, by the shards alone."""
    documents = open_documents(folder)
    for row in documents.rows():
        if row["stage"] == "kept":
            place = documents.place(row)
            ids = np.fromfile(folder / place.file, "<u2")[place.start : place.stop]
            assert ids[0] == 256 and hashlib.sha256(bytes(ids[1:].tolist())).hexdigest()[:32] == row["key"]
            assert np.load((folder / place.file).with_suffix(".ends.npy"))[place.document] == place.stop
            block = said(folder, f"{row['source']}/{row['id']}")["tokens"]
            assert f"  {row['tokens']} in {place.file}, from {place.start} to {place.stop}; " in block


def test_every_document_that_was_read_has_an_answer(folder):
    for row in rows():
        text = show(folder, f"{row['source']}/{row['id']}")
        assert text.startswith(f"{row['source']}/{row['id']}\n")
        fate = f"dropped in stage {row['stage']}: {row['reason']}"
        kept = "kept for training" if row["split"] == "train" else HELD
        assert text.split("\n")[2] == (kept if row["stage"] == "kept" else fate)


def test_dropped_by_a_rule(folder):
    found = said(folder, "b.jsonl:1")
    assert "  FAILED  words  2      5      words" in found["rules"]
    assert found["text"] == "text, read again from the input, before rules of lines\n  too short"
    assert not found.keys() & {"tokens", "held-out text", "copies"}


def test_dropped_by_a_rule_and_the_input_is_gone(folder):
    (folder.parent / "in" / "b.jsonl").rename(folder.parent / "elsewhere")
    found = said(folder, "b.jsonl:1")
    assert "the rule that dropped it: words" in found["rules"]
    assert found["text"] == "text, its beginning\n  too short"


def test_dropped_as_a_copy(folder):
    found = said(folder, "b.jsonl:3")
    assert "exact duplicate of document" in found["copies"]
    assert "books/books/a.jsonl:7: books number 7" in found["copies"] and "which was kept for train" in found["copies"]
    assert found["text"].startswith("text, that of books/a.jsonl:7\n  books number 7\n")
    assert "exact duplicate of it: books/b.jsonl:3" in said(folder, "books/a.jsonl:7")["copies"]
    near = said(folder, "b.jsonl:4")["copies"]
    assert "near duplicate of document" in near and "web/a.jsonl:9: web number 9" in near


def test_held_out_and_like_held_out(folder):
    held = said(folder, "web/a.jsonl:3")["held-out text"]
    digest = hashlib.sha256(b"web number 3\nsaid  much of 3").digest()
    drawn = int.from_bytes(hashlib.sha256(bytes(8) + digest).digest()[:8], "little") / 2**64
    assert f"its point {drawn:.6f} is " + ("below" if drawn < 0.05 else "next in line, for holdout_bytes=0") in held
    leak = said(folder, "b.jsonl:5")
    assert "75.0% in common with held-out text; dropped at near_duplicate=50.0%" in leak["held-out text"]
    assert "score   0.5" in leak["scores"] and "tokens" not in leak


def test_a_point_below_the_share_is_why(tmp_path):
    finish(tmp_path / "data", rows(), settings=SETTINGS | {"holdout": 0.999})
    assert "is below holdout=0.999" in show(tmp_path / "data", "web/a.jsonl:3")


def test_documents_are_found_by_the_end_of_an_id_or_words(folder):
    assert show(folder, "a.jsonl:9").startswith("web/a.jsonl:9\n")  # exact, before books/a.jsonl:9 that ends so
    assert show(folder, "books/a.jsonl:11").startswith("books/books/a.jsonl:11\n")
    assert show(folder, "b.jsonl:4").startswith("web/")
    assert show(folder, text="too SHORT") == show(folder, "b.jsonl:1")
    assert show(folder, text="web number 12 SAID much").startswith("web/a.jsonl:12\n")
    for arguments, message in [
        ({"document": "jsonl:9"}, "fits several documents; name one:"),
        ({"document": "c.jsonl:9"}, "no document 'c.jsonl:9' was read; give a number, an id"),
        ({"document": "12345"}, "no document '12345' was read"),
        ({"text": "no such words"}, "no document has the words 'no such words'"),
    ]:
        with pytest.raises(DataError, match=message):
            show(folder, **arguments)


def test_words_of_several_documents(tmp_path):
    finish(tmp_path / "data", rows())
    with pytest.raises(DataError, match="--text fits several documents") as error:
        show(tmp_path / "data", text="SAID much of")
    lines = str(error.value).splitlines()
    assert len(lines) == 12 and lines[-1] == "  ..." and all(": " in line for line in lines[1:-1])
    assert show(tmp_path / "data", text="web number 12\tsaid much").startswith("web/a.jsonl:12\n")


def test_words_are_words_and_no_pattern(tmp_path):
    finish(tmp_path / "data", [*rows(), document("web", "c:1", "costs (a.b) $5 [or so] *more* \\d")])
    assert show(tmp_path / "data", text="(a.b) $5 [or so] *more* \\d").startswith("web/c:1\n")
    with pytest.raises(DataError, match="no document has the words"):
        show(tmp_path / "data", text="(aXb)")


def test_the_copy_of_a_copy_and_other_folders(tmp_path):
    """An exact duplicate whose original was dropped by the near stage leads to it."""
    made = rows() + [
        document("books", "d.jsonl:1", "web number 9, said again\nand much of 9", "exact", "exact duplicate")
    ]
    finish(tmp_path / "data", made)
    found = said(tmp_path / "data", "d.jsonl:1")["copies"]
    assert "b.jsonl:4" in found and "which was dropped in stage near" in found
    bare = tmp_path / "bare"
    finish(bare, rows(), units={})
    assert "scores" not in said(bare, "web/a.jsonl:9")
    manifest = json.loads((bare / "manifest.json").read_text())
    del manifest["made"]["documents"]
    from thriftlab.data.manifest import write_manifest

    write_manifest(bare, manifest)
    with pytest.raises(DataError, match="no list of the documents"):
        show(bare)


def test_a_rule_that_is_not_known_here(tmp_path):
    finish(tmp_path / "data", rows(), settings=SETTINGS | {"rules": ["mine"]})
    assert "unknown rule 'mine' (a rule of your own: add --plugin FILE.py)" in show(tmp_path / "data", "web/a.jsonl:9")


def test_thresholds_are_those_of_the_folder_and_counted_rules_say_so(tmp_path):
    settings = SETTINGS | {"rules": ["words"], "rule": {"words": {"least": 99}}}
    finish(tmp_path / "data", rows(), settings=settings)
    found = said(tmp_path / "data", "web/a.jsonl:9")["rules"]
    assert "FAILED  words  7      99     words" in found and "only counted: they act on sources with kind=web" in found


def test_the_summary(folder):
    text = show(folder)
    table = {
        line.split()[0]: line.split()[1:]
        for line in text.split("documents after each stage\n")[1].split("\n\n")[0].split("\n")
    }
    assert table["source"] == ["read", "empty", "rules", "exact", "near", "decontaminate", "train", "validation"]
    assert " ".join(table["web"]) == "24 23 22 22 21 20 18 2"
    assert " ".join(table["books"]) == "21 21 21 20 20 20 18 2"
    assert " ".join(table["all"]) == "45 44 43 42 41 40 36 4"
    for line in ("rules          words ", "near           near duplicate ", f"decontaminate  {LEAK} "):
        assert line in text
    assert "web     c4-braces     12" in text and "books   pool " in text
    score = next(line.split() for line in text.splitlines() if line.startswith("web     score"))
    values = sorted(k / 64 for k in range(20) if k not in (3, 4))
    assert score[2:] == [f"{np.quantile(values, q, method='nearest'):.4g}" for q in (0, 0.1, 0.5, 0.9, 1)]


def test_scores_that_are_missing_are_not_counted(tmp_path):
    made = rows()
    for row in made[::2]:
        row["score"] = -(2**31) / 65536
    finish(tmp_path / "data", made)
    assert "-3.277e+04" not in module.aligned(module.score_table(open_documents(tmp_path / "data")))


def test_the_command(folder, capsys):
    assert cli.main(["data", "show", str(folder), "--document", "b.jsonl:4"]) == 0
    assert "dropped in stage near: near duplicate" in capsys.readouterr().out
    assert cli.main(["data", "show", str(folder), "--text", "too short"]) == 0
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["data", "show", str(folder)]) == 0
    for words, message in [
        ([], "takes a folder and what to do with it"),
        (["show"], "takes a folder"),
        (["shwo", str(folder)], "takes a folder"),
        (["show", str(folder), "force=true"], "data show takes no force"),
        (["show", str(folder), "document=1", "text=a"], "document or text, not both"),
        (["show", str(folder), "--docment", "1"], "docment"),
        (["show", str(folder / "nowhere")], "nowhere"),
    ]:
        capsys.readouterr()
        assert cli.main(["data", *words]) == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1
    assert cli.main(["data", "--help"]) == 0
    assert "the end of an id" in capsys.readouterr().out


def test_a_damaged_ledger_is_one_line(tmp_path):
    finish(tmp_path / "data", rows())
    path = tmp_path / "data/documents/funnel.json"
    path.write_text(path.read_text().replace("4", "5"))
    with pytest.raises(DataError, match="funnel.json: changed since it was prepared"):
        show(tmp_path / "data")
    (tmp_path / "data/documents/00001.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(DataError, match="cannot be read"):
        explain(open_documents(tmp_path / "data"), next(open_documents(tmp_path / "data").rows()))
