"""Preparation: from documents to a verified folder, under crashes, rivals and bad input."""

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from thriftlab.data.corpora.readers import normalise, read
from thriftlab.data.corpora.synthetic import generate
from thriftlab.data.errors import DataError
from thriftlab.data.prepare import Input, PrepareConfig, prepare, stages, tokenize
from thriftlab.data.prepare import pipeline as module
from thriftlab.data.prepare.clean import point
from thriftlab.data.prepare.dedup import HeldOut
from thriftlab.data.shards import open_dataset

SMALL = "synthetic:documents=40,words=40"


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    return prepare(PrepareConfig(out=tmp_path_factory.mktemp("prepared") / "embedded", tokenizer="bpe:600"))


def config(out, path=SMALL, **options):
    return PrepareConfig(out=out, inputs={"web": Input(path=str(path))}, holdout_bytes=0, **options)


def documents(dataset, source, split):
    """The texts of a split, decoded from its shards."""
    texts = []
    for shard in dataset.manifest["sources"][source][split]["shards"]:
        ids = np.fromfile(dataset.path / shard["file"], dataset.manifest["dtype"])
        starts = np.flatnonzero(ids == dataset.tokenizer.delimiter)
        assert np.array_equal(np.append(starts[1:], len(ids)), np.load(dataset.path / shard["ends_file"]))
        texts += [dataset.tokenizer.decode(each) for each in np.split(ids, starts[1:])]
    return texts


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def listing(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- the embedded corpus ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_document_of_the_embedded_corpus_is_kept_or_counted(embedded):
    dataset = open_dataset(embedded.path)
    assert set(dataset.sources) <= {"docstrings", "topics", "news"} and dataset.fingerprint == embedded.fingerprint
    dropped = dataset.manifest["drops"]
    for source in dataset.sources:
        original = [normalise(document.text) for document in read(f"embedded:{source}")]
        train, validation = (documents(dataset, source, split) for split in ("train", "validation"))
        assert len(set(train)) == len(train) and not set(train) & set(validation)
        assert set(train + validation) <= set(original)
        lost = len(original) - len(train) - len(validation)
        assert lost == sum(dataset.manifest["sources"][source]["drops"].values())
        entry = dataset.manifest["sources"][source]
        assert entry["train"]["bytes"] == sum(len(text.encode()) for text in train)
        assert entry["licence"] == "PSF-2.0" and len(entry["provenance"]["text_sha256"]) == 64
    assert dropped["exact duplicate"] > 0 and str(dropped["exact duplicate"]) in str(embedded)


@pytest.mark.slow
def test_main_sources_of_the_embedded_corpus_have_validation_to_measure(embedded):
    sources = embedded.manifest["sources"]
    for source in ("docstrings", "topics"):
        total = sum(sources[source][split]["bytes"] for split in ("train", "validation"))
        assert sources[source]["validation"]["bytes"] >= 50_000 or total < 250_000
        assert sources[source]["validation"]["bytes"] < 0.21 * total


@pytest.mark.slow
def test_no_training_document_resembles_a_held_out_one(embedded):
    dataset = open_dataset(embedded.path)
    held_out = HeldOut.of(text for source in dataset.sources for text in documents(dataset, source, "validation"))
    assert max(held_out.overlap(t) for source in dataset.sources for t in documents(dataset, source, "train")) < 0.5


def test_bpe_knows_only_training_text_and_comes_out_the_same_again(tmp_path):
    texts = list(generate(60, 60, vocabulary=60))
    first = prepare(config(tmp_path / "a", write_lines(tmp_path / "a.jsonl", texts), tokenizer="bpe:400"))
    secret = "xylophonequartz" * 40
    held = next(n for n in range(999) if place(f"{secret} {n}") < 0.01)
    lines = write_lines(tmp_path / "b.jsonl", [*texts, f"{secret} {held}"])
    second = prepare(config(tmp_path / "b", lines, tokenizer="bpe:400"))
    data = open_dataset(second.path)
    assert f"{secret} {held}" in documents(data, "web", "validation")
    assert data.manifest["tokenizer"] == first.manifest["tokenizer"], "held-out text reached the tokenizer"
    third = prepare(config(tmp_path / "c", lines, tokenizer="bpe:400"))
    assert third.fingerprint == second.fingerprint != first.fingerprint


def place(text, seed=0):
    """In [0, 1): a text is held out where this is below the share."""
    return point(hashlib.sha256(text.encode()).digest(), seed) / 2**64


# --- holding out and decontamination ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.integers(0, 2**64 - 1)), min_size=1, max_size=50, unique_by=lambda r: r[1]
    ),
    st.floats(0.01, 0.4), st.integers(0, 5000), st.integers(1, 5),
)  # fmt: skip
def test_hold_out_takes_the_share_and_the_minimum_up_to_a_fifth_whatever_the_parts(rows, share, minimum, parts):
    expected, held = set(), 0
    for size, where in sorted(rows, key=lambda row: row[1]):
        more = not expected or held < minimum and held + size <= 0.2 * sum(row[0] for row in rows)
        if where / 2**64 < share or more:
            expected.add(where)
            held += size
        else:
            break
    sizes, points = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.uint64)
    lines = [stages.line(points[p::parts], sizes[p::parts], minimum) for p in range(parts)]
    found = points[stages.is_held(points, share, stages.cut_held_out(lines, minimum))]
    assert set(found.tolist()) == expected


def test_the_split_depends_on_text_and_seed_alone(tmp_path):
    texts = list(generate(200, 20))
    forth, back = write_lines(tmp_path / "a.jsonl", texts), write_lines(tmp_path / "b.jsonl", texts[::-1])
    held = {}
    for name, path, seed in (("a", forth, 0), ("b", back, 0), ("c", forth, 1)):
        prepare(config(tmp_path / name, path, seed=seed))
        held[name] = set(documents(open_dataset(tmp_path / name), "web", "validation"))
    assert held["a"] == held["b"] != held["c"]
    assert all(2 <= len(each) <= 25 for each in held.values())


def test_planted_near_duplicates_leave_training_and_innocents_stay(tmp_path):
    texts = list(generate(200, 120, vocabulary=3000))
    held = [text for text in texts if place(text) < 0.05]
    others = list(generate(50, 120, vocabulary=3000, seed=9))
    words = [text.split() for text in held]

    def in_training(candidates):
        """Planted copies are made to fall on the training side, so that only decontamination can drop them."""
        return [next(t for n in range(999) if place(t := f"{text} z{n}") > 0.06) for text in candidates]

    near = in_training([
        " ".join(w if i % 20 else "changed" for i, w in enumerate(words[0])),  # an edit every 20 words
        held[1].upper().replace(".", " !"),  # other case and punctuation
        " ".join(words[2][10:60]),  # an excerpt: small part of H, all of T
        " ".join([*others[0].split(), *others[1].split(), *others[2].split(), *words[3]]),  # H inside a long T
        " ".join(words[0][:60] + words[1][:60]),  # patchwork of two held-out documents
    ])  # fmt: skip
    innocent = in_training([
        " ".join(w if i % 5 else "changed" for i, w in enumerate(words[0])),  # hardly 8 words in a row left
        " ".join([*others[3].split(), *words[1][:30]]),  # a short quotation
        " ".join(sorted(words[2])),  # the same words in another order
        "the a this every no",
    ])  # fmt: skip
    summary = prepare(config(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [*near, *texts, *innocent, *others])))
    train = documents(open_dataset(tmp_path / "out"), "web", "train")
    assert not set(near) & set(train)
    assert set(innocent) <= set(train) and set(texts) - set(held) <= set(train)
    assert summary.manifest["drops"]["near-duplicate of a held-out document"] == len(near)
    assert set(documents(open_dataset(tmp_path / "out"), "web", "validation")) >= set(held), "the test stays as it was"


def test_near_duplicates_are_found_across_sources_and_the_threshold_counts(tmp_path):
    texts = list(generate(100, 100, vocabulary=3000))
    held = next(text for text in texts if place(text) < 0.05)
    half = next(t for n in range(99) if place(t := f"{n} " + held[: len(held) // 3]) > 0.06)
    quote = f"{half} " + " ".join(list(generate(3, 100, vocabulary=3000, seed=4)))
    inputs = {
        "one": Input(path=str(write_lines(tmp_path / "one.jsonl", texts))),
        "two": Input(path=str(write_lines(tmp_path / "two.jsonl", [*generate(40, 50, seed=5), quote]))),
    }
    found = [
        quote in documents(open_dataset(prepare(
            PrepareConfig(out=tmp_path / str(t), inputs=inputs, near_duplicate=t, holdout_bytes=0)
        ).path), "two", "train")
        for t in (0.2, 0.5)
    ]  # fmt: skip
    assert found == [False, True]


def test_empty_documents_and_exact_duplicates_are_counted_by_source(tmp_path):
    texts = list(generate(30, 30))
    one = write_lines(tmp_path / "one.jsonl", [*texts, " \n", "\0", texts[0].replace("\n", "\r\n")])
    two = write_lines(tmp_path / "two.jsonl", [texts[1], *generate(30, 30, seed=2)])
    inputs = {"one": Input(path=str(one)), "two": Input(path=str(two), licence="CC0")}
    manifest = prepare(PrepareConfig(out=tmp_path / "out", inputs=inputs, holdout_bytes=0)).manifest
    assert manifest["drops"] == {"empty": 2, "exact duplicate": 2, "near-duplicate of a held-out document": 0}
    assert manifest["sources"]["one"]["drops"] == {
        "empty": 2, "exact duplicate": 1, "near-duplicate of a held-out document": 0,
    }  # fmt: skip
    assert manifest["sources"]["two"]["licence"] == "CC0"


# --- restarting ------------------------------------------------------------------------------------------------------


def test_a_finished_folder_is_left_alone_and_another_request_is_refused(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", generate(40, 40))
    first = prepare(config(tmp_path / "out", lines))
    before = listing(tmp_path / "out")
    again = prepare(config(tmp_path / "out", lines))
    assert again.notes == ("already prepared",) and again.fingerprint == first.fingerprint
    with pytest.raises(DataError, match="with holdout = 0.05 and is asked for with 0.1; .*another out.*force=true"):
        prepare(config(tmp_path / "out", lines, holdout=0.1))
    with pytest.raises(DataError, match=r"with inputs\."):
        prepare(PrepareConfig(out=tmp_path / "out", inputs={"web": Input(path=SMALL)}, holdout_bytes=0))
    both = {"web": Input(path=str(lines)), "more": Input(path=SMALL)}
    with pytest.raises(DataError, match=r"inputs\.more"):
        prepare(PrepareConfig(out=tmp_path / "out", inputs=both, holdout_bytes=0))
    lines.write_text(lines.read_text() + '{"text": "one more"}\n')
    with pytest.raises(DataError, match="when web was another"):
        prepare(config(tmp_path / "out", lines))
    left = listing(tmp_path / "out")
    assert {file: left[file] for file in before} == before
    replaced = prepare(config(tmp_path / "out", lines, force=True))
    assert replaced.fingerprint != first.fingerprint
    lines.unlink()
    assert prepare(config(tmp_path / "out", lines)).notes == ("already prepared",), "it outlives its corpus"
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_of_something_else_is_never_touched(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    for force in (False, True):
        with pytest.raises(DataError, match="no prepared data set; choose another out"):
            prepare(config(tmp_path / "home", force=force))
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years" and os.listdir(tmp_path) == ["home"]
    (tmp_path / "empty").mkdir()
    prepare(config(tmp_path / "empty"))
    open_dataset(tmp_path / "empty")


def test_a_flipped_byte_is_found_and_preparing_again_mends_it(tmp_path, capsys):
    whole = prepare(config(tmp_path / "out", tokenizer="bpe:300"))
    for file in sorted(listing(whole.path)):
        if file.name == ".verified.json":
            continue
        path = tmp_path / "out" / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(DataError, match=file.name):
            open_dataset(tmp_path / "out")
        if file.name.startswith("manifest"):
            with pytest.raises(DataError, match="manifest.*force=true"):
                prepare(config(tmp_path / "out", tokenizer="bpe:300"))
        mended = prepare(config(tmp_path / "out", tokenizer="bpe:300", force=file.name.startswith("manifest")))
        assert mended.fingerprint == open_dataset(tmp_path / "out").fingerprint == whole.fingerprint
        assert file.name.startswith("manifest") or file.name in capsys.readouterr().err


def in_child(work) -> int:
    """The exit status of a forked process that does the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of imported libraries sleep
        child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def finish(child) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, settings: PrepareConfig) -> list[str]:
    """Prepares, and dies by SIGKILL at the call of this number among those that change the disk; all their names."""
    calls: list[str] = []

    def watch(frame, event, argument):
        if event == "c_call" and argument.__name__ in ("rename", "mkdir", "rmdir", "unlink", "open", "write"):
            calls.append(argument.__name__)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(watch)
    prepare(settings)
    sys.setprofile(None)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_killed_at_any_moment_it_leaves_nothing_or_a_whole_folder(tmp_path, force):
    """At all renamings of folders and after each, and here and there; every write by itself is in test_places.py."""
    settings = config(tmp_path / "out", "synthetic:documents=12,words=20")
    expected = prepare(settings).fingerprint
    shutil.rmtree(settings.out)
    old = prepare(config(settings.out, "synthetic:documents=12,words=20,seed=3")).fingerprint
    settings = settings.model_copy(update={"force": True})
    settings.out.rename(tmp_path / "copy")

    def reset():
        shutil.rmtree(settings.out, ignore_errors=True)
        if force:
            shutil.copytree(tmp_path / "copy", settings.out)

    reset()
    calls = killed_at(-1, settings)
    renames = {number for number, name in enumerate(calls, 1) if name == "rename"}
    assert len(renames) == (4 if force else 1)
    for number in sorted(renames | {number + 1 for number in renames} | {*range(1, len(calls), 40)}):
        reset()
        assert finish(in_child(lambda number=number: killed_at(number, settings))) == -signal.SIGKILL
        if settings.out.exists():
            assert open_dataset(settings.out).fingerprint in ((expected, old) if force else (expected,))
        elif force:
            assert open_dataset(settings.out.with_name(".out.old")).fingerprint == old, "what was there is not lost"
        assert prepare(settings).fingerprint == open_dataset(settings.out).fingerprint == expected
        assert sorted(os.listdir(tmp_path)) == ["copy", "out"]


def test_two_at_once_make_one_whole_folder(tmp_path):
    settings = config(tmp_path / "out", "synthetic:documents=150,words=60")
    children = [in_child(lambda: prepare(settings)) for _ in range(4)]
    assert [finish(child) for child in children] == [0] * 4
    assert open_dataset(tmp_path / "out").fingerprint == prepare(settings).fingerprint
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_killed_process_left_does_not_get_into_the_folder(tmp_path):
    (tmp_path / ".out.partial" / "web").mkdir(parents=True)
    (tmp_path / ".out.partial" / "web" / "train-00099.bin").write_text("of another preparation")
    names = {file.name for file in listing(prepare(config(tmp_path / "out")).path)}
    assert "manifest.json" in names and "train-00099.bin" not in names and "plan.json" not in names


def test_a_failure_leaves_nothing_behind_and_a_full_disk_what_is_done(tmp_path, monkeypatch):
    lines = write_lines(tmp_path / "a.jsonl", generate(20, 20))
    lines.write_text(lines.read_text() + "{")
    with pytest.raises(DataError, match="line 21"):
        prepare(config(tmp_path / "out", lines))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    assert os.listdir(tmp_path) == ["a.jsonl"]
    with monkeypatch.context() as patch, pytest.raises(DataError, match="out: cannot be made.*No space left.*goes on"):
        patch.setattr(tokenize, "write_array", full)
        prepare(config(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "a.jsonl"], "what is done is kept for the next attempt"
    with monkeypatch.context() as patch:
        patch.setattr(module, "clean", lambda *given: pytest.fail("the corpus was read again"))
        prepare(config(tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_too_little_text_is_refused_in_words(tmp_path):
    (tmp_path / "one.txt").write_text("All in one file.")
    with pytest.raises(DataError, match=r"inputs\.web: too few documents \(1\).*one a line of jsonl"):
        prepare(config(tmp_path / "out", tmp_path / "one.txt"))
    with pytest.raises(DataError, match=r"inputs\.web: in .* every text is empty"):
        prepare(config(tmp_path / "out", write_lines(tmp_path / "a.jsonl", [" ", ""])))
    text = "one two three four five six seven eight nine ten"
    with pytest.raises(DataError, match="all its documents resemble"):
        prepare(config(tmp_path / "out", write_lines(tmp_path / "b.jsonl", [text, text + "!", text + "?"])))


def test_a_part_that_this_python_lacks_is_left_out_and_said(tmp_path, monkeypatch):
    readers = {"news": lambda: iter(()), "topics": lambda: iter(())}
    monkeypatch.setattr("thriftlab.data.corpora.embedded._READERS", readers)
    inputs = {"news": Input(path="embedded:news"), "web": Input(path=SMALL)}
    summary = prepare(PrepareConfig(out=tmp_path / "out", inputs=inputs))
    assert open_dataset(summary.path).sources == ["web"]
    assert "news: absent, this Python came without embedded:news" in str(summary)
    with pytest.raises(DataError, match="name a text of your own"):
        prepare(PrepareConfig(out=tmp_path / "none", inputs={"news": Input(path="embedded:news")}))


@pytest.mark.parametrize("wrong", [
    {"tokenizer": "bert"}, {"tokenizer": "bpe:100"}, {"inputs": {"../up": {"path": "x"}}}, {"inputs": {}},
    {"holdout": 0}, {"near_duplicate": 1.5}, {"nonsense": 1}, {"inputs": {"a": {"path": "x", "name": "y"}}},
])  # fmt: skip
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        PrepareConfig(**wrong)


def test_a_missing_tokenizer_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_build", lambda *arguments: pytest.fail("the corpus was read"))
    with pytest.raises(DataError, match="none.json"):
        prepare(config(tmp_path / "out", tokenizer=str(tmp_path / "none.json")))


def test_shards_are_cut_and_the_tokenizer_of_one_folder_serves_another(tmp_path):
    first = prepare(config(tmp_path / "a", tokenizer="bpe:300"))
    second = prepare(config(tmp_path / "b", tokenizer=str(tmp_path / "a" / "tokenizer.json"), shard_tokens=2000))
    assert second.manifest["tokenizer"]["sha256"] == first.manifest["tokenizer"]["sha256"]
    shards = second.manifest["sources"]["web"]["train"]["shards"]
    assert len(shards) > 2 and all(shard["tokens"] <= 2000 for shard in shards)
    one, two = (documents(open_dataset(tmp_path / name), "web", "train") for name in "ab")
    assert one == two
