"""Text to a prepared data set, in stages that one process, many, or a cluster do part by part, to the same bytes.

    pieces -> clean, each text once -> near duplicates -> scores, pools -> hold out -> decontaminate -> tokens -> shards

A killed preparation goes on where it was: what is finished is not done again (work.py). Nothing that decides a byte
depends on the engine, the workers, or how the input lies in files. The surprise: a document that resembles a held-out
one leaves training, not the test, which stays what it was.
"""

import errno
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from thriftlab.data.corpora import recipes
from thriftlab.data.corpora.readers import locate
from thriftlab.data.errors import DataError, EngineError
from thriftlab.data.files import REMEDIES, replace_atomically
from thriftlab.data.manifest import read_manifest, verify_files
from thriftlab.data.prepare.clean import DOCUMENTS, clean, unique
from thriftlab.data.prepare.engines.base import Engine, open_engine, versions
from thriftlab.data.prepare.intake import cut, is_small, tell_empty_files
from thriftlab.data.prepare.ledger import write_ledger
from thriftlab.data.prepare.near import PAIRS, banding
from thriftlab.data.prepare.parts import LEAKS, TRAIN, Parts, number
from thriftlab.data.prepare.request import PrepareConfig, PrepareRequest, difference, request_of
from thriftlab.data.prepare.result import check_sources, write_result
from thriftlab.data.prepare.rules import chosen
from thriftlab.data.prepare.scoring import Scorer, score, units
from thriftlab.data.prepare.stages import (
    cut_held_out,
    decontaminate,
    fates,
    index_held_out,
    lines,
    merge_near,
    near_edges,
    near_pairs,
    training_texts,
)  # fmt: skip
from thriftlab.data.prepare.summary import Summary
from thriftlab.data.prepare.tokenize import SPLITS, encode, open_tokenizer, shards, write_shard
from thriftlab.data.prepare.work import Work
from thriftlab.data.shards import token_dtype
from thriftlab.data.tokens import train_bpe
from thriftlab.data.workspace import check_place, empty, install, workspace


def prepare(config: PrepareConfig, model: Scorer | None = None) -> Summary:
    """Makes `config.out`, or leaves it alone if it is whole and made with the same settings from the same input.

    Killed at any moment it leaves nothing there, or a whole folder (workspace.py); the same command goes on. DataError
    says what is wrong with the input, or with what is already there, and what to do. `model` scores texts for
    perplexity.run.
    """
    request = request_of(config, model)
    try:
        with workspace(config.out, resumed=True) as folder:
            if done := _already(config, request):
                return done
            _check_place(config.out)
            packages = recipes.gather(_recipes(config), config.downloads)
            request = request_of(config, model)  # again, now that packages are there
            work = _begin(folder, config, request)
            try:
                notes = _build(config, model, work, {"request": request, "packages": packages})
            except EngineError:  # not of the input
                raise
            except DataError:  # of the input: what was made of it is of no use
                empty(folder)
                raise
            except KeyboardInterrupt:
                print(f"\n{folder}: what is done is kept; the same command goes on", file=sys.stderr)
                raise
            install(folder / "out", config.out)
    except OSError as error:  # readers report their own
        remedy = REMEDIES.get(error.errno or 0, "choose another out")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy += ": the same command goes on then"
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


def _build(config: PrepareConfig, model: Scorer | None, work: Work, made: dict[str, Any]) -> tuple[str, ...]:
    """Everything into `work`; returns notes for the user."""
    started = time.monotonic()
    name = "here" if config.engine == "processes" and config.workers is None and is_small(config) else config.engine
    with open_engine(name, config.workers, work.stages) as engine:
        passed = cut(config, work, engine)
        parts = _distinct(config, work, engine)
        tell_empty_files(config, work, passed)
        notes = check_sources(config, parts)
        if config.near.is_on:
            _near(config, parts, engine)
        if columns := units(config):
            score(config, parts, engine, model)
        _split(config, parts, engine)
        tokenizer = _tokenizer(config, parts)
        _each(engine, partial(encode, parts, tokenizer), parts, "tokens", "tokenize")
        ledger = partial(write_ledger, parts, list(config.inputs), columns, config.keep_text)
        _each(engine, ledger, parts, "ledger", "write the ledger")
        entries = _shards(config, parts, engine, tokenizer, len(columns))
    seconds = round(time.monotonic() - started, 1)
    made |= {
        "passed_over": {name: reasons for name, reasons in passed.items() if reasons},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "seconds": seconds,
    }
    write_result(config, parts, open_tokenizer(tokenizer), entries, made)
    return (*notes, f"prepared in {seconds} s")


def _recipes(config: PrepareConfig) -> dict[str, str]:
    """The recipes of sources that are made of packages."""
    located = {name: locate(source.path) for name, source in config.inputs.items()}
    return {name: place for name, (reader, place) in located.items() if reader == "recipe"}


def _begin(folder: Path, config: PrepareConfig, request: PrepareRequest) -> Work:
    """The unfinished folder, as a killed attempt of the same plan left it, or empty."""
    decides = {"request": request, "piece_bytes": config.piece_bytes, "versions": versions() | {"code": code_sha256()}}
    plan, file = json.dumps(decides, indent=1), folder / "plan.json"
    if file.is_file() and file.read_text() != plan and not config.force:
        try:
            other = difference(json.loads(file.read_text())["request"], request)
        except (ValueError, KeyError, TypeError):
            other = None
        why = other or "by another version, or with another piece_bytes"
        raise DataError(
            f"{folder}: holds the unfinished work of another preparation, {why}; finish that one with its settings, "
            "choose another out, or begin anew with force=true"
        )
    if not file.is_file() or file.read_text() != plan or not (folder / "out").is_dir():  # else it was installed
        empty(folder)
        replace_atomically(file, plan.encode())
    for name in ("stages", "out"):
        (folder / name).mkdir(exist_ok=True)
    return Work(folder / "stages", folder / "out")


def code_sha256() -> str:
    """Of the files of this package: half of a preparation by one version and half by another is neither."""
    root = Path(__file__).parents[1]
    found = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    return hashlib.sha256(b"".join(name.encode() + (root / name).read_bytes() for name in found)).hexdigest()[:16]


def _each(engine: Engine, f: Callable[[int], None], parts: Parts, names: str, what: str) -> None:
    """f(part) of the parts that are not finished."""
    engine.each(f, parts.work.unfinished(names, parts.count), what)


def _distinct(config: PrepareConfig, work: Work, engine: Engine) -> Parts:
    plan, sources = work.facts("pieces"), len(config.inputs)
    if left := work.unfinished("unique", plan["parts"]):
        rules = chosen(config.rules, config.rule) if config.rules else None
        mapper = partial(clean, work, config, rules, plan["parts"])
        engine.exchange(mapper, plan["count"], partial(unique, work, sources), left, DOCUMENTS, "clean")
    return number(work, sources, plan["parts"])


def _near(config: PrepareConfig, parts: Parts, engine: Engine) -> None:
    if left := parts.work.unfinished("near", parts.count):
        mapper = partial(near_pairs, parts, banding(config.near.bands, config.near.threshold))
        engine.exchange(mapper, parts.count, partial(near_edges, parts), left, PAIRS, "near duplicates")
    if not parts.work.is_finished("duplicates"):
        merge_near(parts)


def _split(config: PrepareConfig, parts: Parts, engine: Engine) -> None:
    """What is held out, and what of the rest resembles it."""
    found = engine.each(partial(lines, parts, config.holdout_bytes), range(parts.count), "hold out")
    by_source = list(zip(*found, strict=True))
    cuts = [cut_held_out(each, config.holdout_bytes) for each in by_source]
    if not parts.work.is_finished("held"):
        parts.work.finish("held", {"counts": index_held_out(parts, config.holdout, cuts)})
    for name, held, each in zip(config.inputs, parts.work.facts("held")["counts"], by_source, strict=True):
        if held and held == sum(line.documents for line in each):
            raise DataError(
                f"inputs.{name}: too few documents ({held}) to hold one out and keep one; "
                "cut the text into documents, one a file, or one a line of jsonl"
            )
    judge = partial(decontaminate, parts, config.holdout, cuts, config.near_duplicate)
    _each(engine, judge, parts, "fate", "decontaminate")
    for name, fate in zip(config.inputs, fates(parts), strict=True):
        if fate[LEAKS, 0] and not fate[TRAIN, 0]:
            raise DataError(f"inputs.{name}: all its documents resemble held-out ones; leave the source out")


def _tokenizer(config: PrepareConfig, parts: Parts) -> str:
    """The name of the tokenizer, or the file of the one that is trained here."""
    kind, _, size = config.tokenizer.partition(":")
    if kind != "bpe":
        return config.tokenizer
    file = parts.work.path("tokenizer.json")
    if not file.exists():
        total = int(fates(parts)[:, TRAIN, 0].sum())
        texts = tqdm(training_texts(parts), "train the tokenizer", total, disable=None, leave=False)
        replace_atomically(file, (train_bpe(texts, int(size)).json or "").encode())
    return str(file)


def _shards(config: PrepareConfig, parts: Parts, engine: Engine, tokenizer: str, columns: int) -> dict[str, Any]:
    """The manifest's entries of splits, by source."""
    dtype = token_dtype(open_tokenizer(tokenizer).vocab_size)
    sources = list(config.inputs)
    cut_up = list(shards(parts, sources, config.shard_tokens))
    written = engine.each(partial(write_shard, parts, dtype, columns), cut_up, "write shards")
    entries: dict[str, Any] = {name: {split: [] for split in SPLITS} for name in sources}
    for shard, entry in zip(cut_up, written, strict=True):
        entries[shard.source][shard.split].append(entry)
    return {
        name: {
            split: {"shards": found}
            | {key: sum(each[key] for each in found) for key in ("tokens", "documents", "bytes")}
            for split, found in splits.items()
        }
        for name, splits in entries.items()
    }
