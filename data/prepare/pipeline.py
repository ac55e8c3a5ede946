"""Text to a prepared data set: read, normalise, hold out, decontaminate, train a tokenizer, write shards and manifest.

The corpus is read once and spooled to the disk: what comes from a network can neither be held in memory nor be trusted
to come twice the same, and what is held out depends on all of it. In memory stay, a document, 16 bytes of numbers and
about 100 of a hash set (exact duplicates), and the shingles of the held-out documents.

The surprise: a document that resembles a held-out one leaves training, not the test, which stays what it was.
"""

import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from thriftlab.data.corpora import recipes
from thriftlab.data.corpora.folders import PassOver
from thriftlab.data.corpora.readers import locate, read
from thriftlab.data.errors import DataError
from thriftlab.data.files import REMEDIES, printable
from thriftlab.data.manifest import Manifest, fingerprint, read_manifest, verify_files, write_manifest
from thriftlab.data.prepare.dedup import HeldOut
from thriftlab.data.prepare.pool import EMPTY, EXACT, Chosen, Pool, hold_out, spool
from thriftlab.data.prepare.request import PrepareConfig, difference, request_of
from thriftlab.data.shards import token_dtype, write_shards, write_tokenizer
from thriftlab.data.tokens import Tokenizer, encode_document, load_tokenizer, train_bpe
from thriftlab.data.workspace import check_place, install, workspace

Passed = dict[str, dict[str, Any]]  # reason -> how many files, and the names of the first
NEAR = "near-duplicate of a held-out document"


@dataclass(frozen=True)
class Summary:
    """What lies in `path`; `str` is the table that is shown."""

    path: Path
    manifest: Manifest
    notes: tuple[str, ...]  # what the user should know besides

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.manifest)

    def __str__(self) -> str:
        head = f"{'source':14}{'split':12}{'documents':>10}{'tokens':>14}{'MB':>10}"
        lines = [
            f"{name:14}{split:12}{entry['documents']:10,}{entry['tokens']:14,}{entry['bytes'] / 1e6:10.3f}"
            for name, source in self.manifest["sources"].items()
            for split, entry in (("train", source["train"]), ("validation", source["validation"]))
        ]
        origins = [
            f"{name:14}{package['registry']} {package['name']} {package['version']}, {package['licence']}, "
            f"sha256 {package['sha256'][:16]}"
            for name, packages in self.manifest["made"].get("packages", {}).items()
            for package in packages
        ]
        passed = [
            f"{name:14}passed over: {tally['count']:,} {reason} ({', '.join(tally['first'])}"
            f"{', ...' if tally['count'] > len(tally['first']) else ''})"
            for name, reasons in self.manifest["made"].get("passed_over", {}).items()
            for reason, tally in reasons.items()
        ]
        drops = [f"{count:,} {reason}" for reason, count in self.manifest.get("drops", {}).items() if count]
        tokenizer = self.manifest["tokenizer"]
        foot = [
            f"dropped documents: {', '.join(drops) or 'none'}",
            f"tokenizer {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens; data {self.fingerprint[:16]}",
        ]
        return "\n".join([printable(self.path), head, *lines, *origins, *passed, *foot, *self.notes])


def prepare(config: PrepareConfig) -> Summary:
    """Makes `config.out`, or leaves it alone if it is whole and made by the same settings from the same input.

    Killed at any moment it leaves nothing or a whole folder (workspace.py), and can be started again. DataError says
    what is wrong with the input, or with what is already there, and what to do.
    """
    request = request_of(config)
    try:
        with workspace(config.out) as work:
            if done := _already(config, request):
                return done
            _check_place(config.out)
            notes = _build(config, work)
            install(work, config.out)
    except OSError as error:  # readers report their own
        remedy = REMEDIES.get(error.errno or 0, "choose another out")
        raise DataError(f"{config.out}: cannot be made ({error}); {remedy}") from error
    return Summary(config.out, read_manifest(config.out), notes)


# --- is it there already? --------------------------------------------------------------------------------------------


def _already(config: PrepareConfig, request: dict[str, Any]) -> Summary | None:
    """The finished folder, or None if there is none or it may be replaced."""
    out = config.out
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return None
    if not (out / "manifest.json").is_file():
        raise DataError(f"{out}: holds something that is no prepared data set; choose another out")
    if config.force:
        return None
    try:
        manifest = read_manifest(out)
    except DataError as error:
        raise DataError(f"{error}, with force=true to replace it, or choose another out") from None
    if other := difference(manifest.get("made", {}).get("request"), request):
        raise DataError(f"{out}: was prepared {other}; choose another out, or replace it with force=true")
    try:
        verify_files(out, manifest)
    except DataError as error:
        print(f"{error}: doing so", file=sys.stderr)
        return None
    return Summary(out, manifest, ("already prepared",))


def _check_place(out: Path) -> None:
    try:
        check_place(out)
    except OSError as error:
        raise DataError(
            f"{out}: the finished folder could not take its place ({error.strerror}), which a mount point does not "
            f"allow; choose a folder in it: out={out / 'data'}"
        ) from None


# --- making it -------------------------------------------------------------------------------------------------------


def _build(config: PrepareConfig, work: Path) -> tuple[str, ...]:
    """Everything into `work`; returns notes for the user."""
    started = time.monotonic()
    packages = _gather(config)
    request = request_of(config)  # again, now that packages are there
    pools, passed, notes = _read(config, work)
    held_out = {name: _split(name, pool, config) for name, pool in pools.items()}
    train = _decontaminate(pools, held_out, config.near_duplicate)
    texts = (text for name, pool in pools.items() for text in pool.texts(train[name]))
    tokenizer = _tokenizer(config.tokenizer, texts)
    dtype = token_dtype(tokenizer.vocab_size)
    sources = {}
    for name, pool in pools.items():
        sources[name] = {
            split: write_shards(work, name, split, _encode(name, pool, chosen, tokenizer), dtype, config.shard_tokens)
            for split, chosen in (("train", train[name]), ("validation", held_out[name]))
        } | {
            "licence": config.inputs[name].licence,
            "provenance": {"reader": locate(config.inputs[name].path)[0], "text_sha256": pool.text_sha256},
            "drops": dict(pool.drops),
        }
        pool.file.unlink()
    seconds = round(time.monotonic() - started, 1)
    manifest = {
        "tokenizer": write_tokenizer(work, tokenizer),
        "dtype": dtype,
        "sources": sources,
        "prepare": config.model_dump(include={"holdout", "holdout_bytes", "near_duplicate", "shard_tokens", "seed"}),
        "drops": {reason: sum(pool.drops[reason] for pool in pools.values()) for reason in (EMPTY, EXACT, NEAR)},
        "made": {
            "request": request,
            "packages": packages,
            "passed_over": {name: reasons for name, reasons in passed.items() if reasons},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "seconds": seconds,
        },
    }
    write_manifest(work, manifest)
    return (*notes, f"prepared in {seconds} s")


def _gather(config: PrepareConfig) -> dict[str, list[dict[str, str]]]:
    """The packages of each source that is made of packages, downloaded."""
    located = {name: locate(source.path) for name, source in config.inputs.items()}
    places = {name: place for name, (reader, place) in located.items() if reader == "recipe"}
    return recipes.gather(places, config.downloads)


def _read(config: PrepareConfig, work: Path) -> tuple[dict[str, Pool], dict[str, Passed], list[str]]:
    """The pools that are not empty, what was passed over, and a line for each part that this Python came without."""
    seen: set[bytes] = set()
    pools, notes = {}, []
    passed: dict[str, Passed] = {name: {} for name in config.inputs}
    for name, source in config.inputs.items():
        tell = _tally(passed[name])
        documents = read(source.path, name, source.text_key, source.streaming, config.downloads, source.format, tell)
        pool = spool(_progress(documents, f"read {name}"), work / f"{name}.spool", config.seed, seen)
        if len(pool.sizes):
            pools[name] = pool
        elif locate(source.path)[0] == "embedded":
            notes.append(f"{name}: absent, this Python came without {source.path}")
            pool.file.unlink()
        else:
            raise DataError(f"inputs.{name}: in {source.path} every text is empty or a copy of an earlier one")
    if not pools:
        raise DataError("this Python came without its documentation; name a text of your own: inputs.NAME.path=FILE")
    return pools, passed, notes


def _tally(passed: Passed) -> PassOver:
    def tell(name: str, reason: str) -> None:
        tally = passed.setdefault(printable(reason), {"count": 0, "first": []})
        tally["count"] += 1
        if tally["count"] <= 3:
            tally["first"].append(printable(name))

    return tell


def _split(name: str, pool: Pool, config: PrepareConfig) -> Chosen:
    held_out = hold_out(pool, config.holdout, config.holdout_bytes)
    if held_out.all():
        raise DataError(
            f"inputs.{name}: too few documents ({len(held_out)}) to hold one out and keep one; "
            "cut the text into documents, one a file, or one a line of jsonl"
        )
    return held_out


def _decontaminate(pools: dict[str, Pool], held_out: dict[str, Chosen], threshold: float) -> dict[str, Chosen]:
    """By source, the documents to train on: neither held out nor like a held-out one of any source."""
    index = HeldOut(text for name, pool in pools.items() for text in pool.texts(held_out[name]))
    train = {}
    for name, pool in pools.items():
        rest = np.flatnonzero(~held_out[name])
        texts = _progress(pool.texts(~held_out[name]), f"decontaminate {name}", len(rest))
        near = np.fromiter((index.overlap(text) >= threshold for text in texts), bool, len(rest))
        if near.all():
            raise DataError(f"inputs.{name}: all its documents resemble held-out ones; leave the source out")
        train[name] = ~held_out[name]
        train[name][rest[near]] = False
        pool.drops[NEAR] += int(near.sum())
    return train


def _tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    kind, _, size = name.partition(":")
    return train_bpe(_progress(texts, "train the tokenizer"), int(size)) if kind == "bpe" else load_tokenizer(name)


def _encode(name: str, pool: Pool, chosen: Chosen, tokenizer: Tokenizer) -> Iterator[tuple[Any, int]]:
    for text in _progress(pool.texts(chosen), f"tokenize {name}", int(chosen.sum())):
        yield encode_document(tokenizer, text)


def _progress(documents: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    return iter(tqdm(documents, what, total, unit=" documents", disable=None, leave=False))
