"""Documents that stay, as tokens: each part by itself, then shards that know nothing of the parts.

A part leaves its tokens source by source, training text before held-out text, and an index of its documents. A shard
is cut from the tokens of all parts one after the other, so that its bytes depend on the documents alone.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.manifest import file_sha256
from thriftlab.data.prepare.parts import HELD, TRAIN, Parts, texts
from thriftlab.data.prepare.work import putting, write_array
from thriftlab.data.shards import token_dtype
from thriftlab.data.tokens import Tokenizer, encode_document, load_tokenizer, read_bpe

SPLITS = {"train": TRAIN, "validation": HELD}


class Run(NamedTuple):
    """Neighbouring documents of the tokens of a part."""

    part: int
    first: int  # in the index of the part
    last: int


class Shard(NamedTuple):
    source: str
    split: str
    number: int
    runs: list[Run]

    @property
    def stem(self) -> str:
        return f"{self.source}/{self.split}-{self.number:05d}"


def encode(parts: Parts, tokenizer: str, part: int) -> None:
    """Leaves the tokens of a part and int64 [documents, 3]: row in the part, tokens, bytes of text."""
    encoder = open_tokenizer(tokenizer)
    stored = np.dtype(token_dtype(encoder.vocab_size)).newbyteorder("<")
    table, fate, bounds = parts.table(part), np.asarray(parts.array("fate", part)), parts.rows(part)
    index, blocks = [], []
    folder = parts.work.folder("tokens")
    with putting(folder / f"{part:05}.bin") as temporary, open(temporary, "wb") as file:
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            for wanted in SPLITS.values():
                chosen = fate[first:last] == wanted
                rows = first + np.flatnonzero(chosen)
                for where, found in texts(table.slice(first, last - first), chosen):
                    for row, text in zip(rows[where].tolist(), found, strict=True):
                        ids, size = encode_document(encoder, text)
                        file.write(ids.astype(stored).tobytes())
                        index.append((row, len(ids), size))
                blocks.append(len(index))
    write_array(folder / f"{part:05}.npy", np.array(index, np.int64).reshape(-1, 3))
    parts.work.finish(f"tokens/{part:05}", {"blocks": blocks})


def open_tokenizer(name: str) -> Tokenizer:
    """By its name, or the tokenizer.json that this preparation trained."""
    return read_bpe(Path(name)) if name.endswith(".json") else load_tokenizer(name)


def shards(parts: Parts, sources: list[str], shard_tokens: int) -> Iterator[Shard]:
    """The shards of all sources: up to `shard_tokens` tokens or one longer document; validation is one shard."""
    blocks = [facts["blocks"] for facts in parts.work.all_facts("tokens", parts.count)]
    for s, source in enumerate(sources):
        for k, split in enumerate(SPLITS):
            bounds = [(each[2 * s + k - 1] if s or k else 0, each[2 * s + k]) for each in blocks]
            for number, runs in enumerate(_cut(parts, bounds, shard_tokens if split == "train" else 2**63 - 1)):
                yield Shard(source, split, number, runs)


def _cut(parts: Parts, bounds: list[tuple[int, int]], most: int) -> Iterator[list[Run]]:
    runs: list[Run] = []
    filled = 0
    for part, (first, last) in enumerate(bounds):
        ends = np.cumsum(parts.array("tokens", part)[first:last, 1])
        at = 0
        while at < len(ends):
            before = int(ends[at - 1]) if at else 0
            to = int(np.searchsorted(ends, before + most - filled, "right"))
            if to == at and filled == 0:
                to = at + 1  # longer than a shard
            if to > at:
                runs.append(Run(part, first + at, first + to))
                filled, at = filled + int(ends[to - 1]) - before, to
            if at < len(ends):
                yield runs
                runs, filled = [], 0
    if runs:
        yield runs


def write_shard(parts: Parts, dtype: str, columns: int, shard: Shard) -> dict[str, Any]:
    """Writes a shard below the finished folder; returns its entry of the manifest."""
    name = f"shards/{shard.stem}"
    if parts.work.is_finished(name):
        return parts.work.facts(name)
    out = parts.work.out
    (out / shard.source).mkdir(parents=True, exist_ok=True)
    width, digest = np.dtype(dtype).itemsize, hashlib.sha256()
    lengths, size, scores = [], 0, []
    with putting(out / f"{shard.stem}.bin") as temporary, open(temporary, "wb") as file:
        for run in shard.runs:
            index = parts.array("tokens", run.part)
            start = int(index[: run.first, 1].sum()) * width
            chosen = index[run.first : run.last]
            for block in _bytes(parts.work.path(f"tokens/{run.part:05}.bin"), start, int(chosen[:, 1].sum()) * width):
                file.write(block)
                digest.update(block)
            lengths.append(chosen[:, 1])
            size += int(chosen[:, 2].sum())
            if columns:
                scores.append(parts.array("scores", run.part)[chosen[:, 0]])
    ends = np.cumsum(np.concatenate(lengths), dtype="<i8")
    entry = {
        "file": f"{shard.stem}.bin", "tokens": int(ends[-1]), "documents": len(ends), "bytes": size,
        "sha256": digest.hexdigest(), **_beside(out, shard.stem, "ends", ends),
    }  # fmt: skip
    if columns:
        entry |= _beside(out, shard.stem, "scores", np.concatenate(scores).astype("<i4"))
    parts.work.finish(name, entry)
    return entry


def _beside(out: Path, stem: str, kind: str, array: NDArray[Any]) -> dict[str, str]:
    write_array(out / f"{stem}.{kind}.npy", array)
    return {f"{kind}_file": f"{stem}.{kind}.npy", f"{kind}_sha256": file_sha256(out / f"{stem}.{kind}.npy")}


def _bytes(file: Path, start: int, count: int) -> Iterator[bytes]:
    with open(file, "rb") as source:
        source.seek(start)
        while count:
            block = source.read(min(count, 1 << 22))
            yield block
            count -= len(block)
