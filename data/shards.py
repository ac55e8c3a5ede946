"""Token shards: written once, read through memory maps as overlapping windows.

A prepared folder holds manifest.json (see manifest.py), tokenizer.json (BPE only), and for every source and split
SOURCE/SPLIT-00000.bin (little-endian ids) with SOURCE/SPLIT-00000.ends.npy (int64, where documents end).
The surprise: shards break between documents, so every shard opens with a delimiter and no text byte goes unpredicted.
"""

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thriftlab.data.chosen import ChosenRows, ChosenTokens, choose
from thriftlab.data.documents import Documents, documents
from thriftlab.data.errors import DataError
from thriftlab.data.manifest import Manifest, file_sha256, fingerprint, read_manifest, verify_files
from thriftlab.data.manifest import write_manifest as write_manifest  # part of this module's interface
from thriftlab.data.tokens import Tokenizer, load_tokenizer, read_bpe

SHARD_TOKENS = 2**27

EncodedDocument = tuple[NDArray[Any], int]


def token_dtype(vocab_size: int) -> str:
    """The smallest id type that holds the vocabulary: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_shards(
    folder: Path,
    source: str,
    split: str,
    documents: Iterable[EncodedDocument],
    dtype: str,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write one split of one source and return its manifest entry.

    `documents` yields (ids starting with the delimiter, UTF-8 bytes of the text), as `tokens.encode_document` gives
    them, and is read once, a document at a time. A shard holds up to `shard_tokens` tokens, or one longer document;
    a validation split is one shard whatever its size, so that its windows and one tail cover it.
    The entry: {"shards": [{"file", "tokens", "documents", "bytes", "sha256", "ends_file", "ends_sha256"}], "tokens",
    "documents", "bytes"}, files relative to `folder`.
    """
    if not re.fullmatch(r"\w[\w.-]*", source):
        raise DataError(f"source {source!r} names a folder: use letters, digits, and . _ - after the first")
    (folder / source).mkdir(parents=True, exist_ok=True)
    numbered = _number(documents, shard_tokens if split == "train" else sys.maxsize)
    groups = itertools.groupby(numbered, key=lambda pair: pair[0])
    shards = [
        _write_shard(folder, f"{source}/{split}-{number:05d}", (document for _, document in group), dtype)
        for number, group in groups
    ]
    return {"shards": shards} | {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents", "bytes")}


def _number(documents: Iterable[EncodedDocument], shard_tokens: int) -> Iterator[tuple[int, EncodedDocument]]:
    number = filled = 0
    for document in documents:
        size = len(document[0])
        if filled and filled + size > shard_tokens:
            number, filled = number + 1, 0
        filled += size
        yield number, document


def _write_shard(folder: Path, stem: str, documents: Iterable[EncodedDocument], dtype: str) -> dict[str, Any]:
    largest, stored = np.iinfo(dtype).max, np.dtype(dtype).newbyteorder("<")
    digest, lengths, text_bytes = hashlib.sha256(), [], 0
    with open(folder / f"{stem}.bin", "wb") as file:
        for ids, size in documents:
            if ids.max() > largest:
                raise DataError(f"{stem}: token id {ids.max()} does not fit {dtype}; write uint32")
            raw = ids.astype(stored).tobytes()
            file.write(raw)
            digest.update(raw)
            lengths.append(len(ids))
            text_bytes += size
    ends = np.cumsum(lengths, dtype="<i8")
    np.save(folder / f"{stem}.ends.npy", ends)
    return {
        "file": f"{stem}.bin",
        "tokens": int(ends[-1]),
        "documents": len(ends),
        "bytes": text_bytes,
        "sha256": digest.hexdigest(),
        "ends_file": f"{stem}.ends.npy",
        "ends_sha256": file_sha256(folder / f"{stem}.ends.npy"),
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Write tokenizer.json where the tokenizer has one, and return the manifest's "tokenizer" entry."""
    entry = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "delimiter", "sha256")}
    if tokenizer.json is not None:
        (folder / "tokenizer.json").write_bytes(tokenizer.json.encode())
        entry["file"] = "tokenizer.json"
    return entry


@dataclass(frozen=True, eq=False)
class Windows:
    """Rows of one split: s = tokens[s * T : s * T + T + 1] of each shard, neighbours sharing one token.

    `len(w)` counts full windows, (tokens - 1) // T per shard; `w[rows]` gathers them, [len(rows), T + 1] in the dtype
    of the shards. `tokens`, `documents` and `bytes` (UTF-8, of the text) are those of the whole split, or of the
    documents that were chosen of it, whose bytes are counted when they are asked for.
    """

    shards: list[NDArray[Any]] | list[ChosenTokens]
    sequence_length: int
    tokens: int
    documents: int
    text: int | Callable[[], int]  # its bytes, or what counts them

    @cached_property
    def bytes(self) -> int:
        return self.text() if callable(self.text) else self.text

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First window of each shard, then the number of all: int64 [shards + 1]."""
        return np.cumsum([0, *((len(shard) - 1) // self.sequence_length for shard in self.shards)], dtype=np.int64)

    @cached_property
    def _views(self) -> list[NDArray[Any] | ChosenRows]:
        """Each shard as overlapping rows [windows, T + 1], without a copy."""
        return [_rows(shard, self.sequence_length) for shard in self.shards]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        dtype = self.shards[0].dtype if self.shards else np.uint16
        out = np.empty((len(rows), self.sequence_length + 1), dtype)
        self.gather(rows, out, np.arange(len(rows)))
        return out

    def gather(self, rows: NDArray[np.int64], out: NDArray[Any], where: NDArray[np.int64]) -> None:
        """Write window rows[i] to out[where[i]], converted to the dtype of `out` [any, T + 1]."""
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        for k in np.unique(shard):
            chosen = shard == k
            out[where[chosen]] = self._views[k][rows[chosen] - self.starts[k]]

    def tail(self) -> NDArray[Any] | None:
        """What the full windows leave of a split of one shard, 2 .. T tokens; None if nothing is left to predict."""
        if len(self.shards) > 1:
            raise DataError(f"a split of {len(self.shards)} shards has a tail in each; only validation has one tail")
        done = len(self) * self.sequence_length
        return self.shards[0][done:] if self.tokens > done + 1 else None  # type: ignore[index]  # never chosen from


def _rows(shard: NDArray[Any] | ChosenTokens, step: int) -> NDArray[Any] | ChosenRows:
    if isinstance(shard, ChosenTokens):
        return ChosenRows(shard, step)
    return np.lib.stride_tricks.sliding_window_view(shard, step + 1)[::step] if len(shard) > step else shard[:0]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared folder, verified at opening. `fingerprint` identifies its content wherever it lies."""

    path: Path
    manifest: Manifest
    fingerprint: str

    @property
    def sources(self) -> list[str]:
        return list(self.manifest["sources"])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        entry = self.manifest["tokenizer"]
        return read_bpe(self.path / entry["file"], entry["name"]) if "file" in entry else load_tokenizer(entry["name"])

    def windows(self, source: str, split: str, sequence_length: int, where: str | None = None) -> Windows:
        """Windows of `sequence_length` + 1 tokens of split "train" or "validation".

        `where`, as "score>0.7", chooses documents of "train" by their scores; held-out ones are never chosen among, so
        that held-out losses of all choices compare.
        """
        if source not in self.manifest["sources"]:
            raise DataError(f"{self.path}: no source {source!r}; it has {', '.join(self.sources)}")
        entry = self.manifest["sources"][source][split]
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        shards = [np.asarray(np.memmap(self.path / shard["file"], dtype, mode="r")) for shard in entry["shards"]]
        if where is None:
            return Windows(shards, sequence_length, entry["tokens"], entry["documents"], entry["bytes"])
        if split != "train":
            raise DataError(f"{self.path}: where={where} chooses training documents; held-out ones all count")
        masks = self._chosen(source, where)
        chosen = [
            choose(shard, np.load(self.path / each["ends_file"]), mask)
            for shard, each, mask in zip(shards, entry["shards"], masks, strict=True)
            if mask.any()
        ]
        documents = sum(int(mask.sum()) for mask in masks)
        return Windows(chosen, sequence_length, sum(map(len, chosen)), documents, lambda: self._bytes(chosen))

    def documents(self, source: str, where: str | None = None) -> Documents:
        """Its training documents, or those that `where` chooses, numbered over all shards."""
        windows, entry = self.windows(source, "train", 1), self.manifest["sources"][source]["train"]
        ends = [np.load(self.path / shard["ends_file"]) for shard in entry["shards"]]
        masks = self._chosen(source, where) if where else None
        return documents(windows.shards, ends, masks, f"{self.fingerprint}/{source}/{where}")  # type: ignore[arg-type]

    def _chosen(self, source: str, where: str) -> list[NDArray[np.bool_]]:
        """Which training documents the expression chooses, for each shard: [documents]. DataError if there is none."""
        from thriftlab.data.where import parse

        entry = self.manifest["sources"][source]
        if not (units := entry.get("columns")):
            raise DataError(
                f"{self.path}: source {source!r} has no scores, and where={where} needs some; prepare it with scores, "
                "or leave where out"
            )
        condition, masks = parse(where), []
        for shard in entry["train"]["shards"]:
            scores = np.load(self.path / shard["scores_file"], mmap_mode="r")  # [documents, columns]
            try:
                masks.append(condition.choose(dict(zip(units, scores.T, strict=True)), units))
            except DataError as error:
                raise DataError(f"{self.path}: source {source!r}: {error}") from None
        if not any(mask.any() for mask in masks):
            raise DataError(
                f"{self.path}: where={where} chooses none of the {entry['train']['documents']} training documents of "
                f"source {source!r}; ask for less, or leave the source out"
            )
        return masks

    def _bytes(self, shards: list[ChosenTokens]) -> int:
        """What their tokens spell."""
        size = self.tokenizer.token_bytes
        return sum(int(size[piece].sum()) for shard in shards for piece in shard.pieces())


def open_dataset(path: str | Path, verify: bool = True) -> Dataset:
    """Open a prepared folder; DataError names the file that is missing, truncated or changed.

    verify=False checks presence and sizes, and leaves the hashes of the shards unread.
    """
    path = Path(path)
    manifest = read_manifest(path)
    verify_files(path, manifest, hashes=verify)
    return Dataset(path, manifest, fingerprint(manifest))
