"""Scores of the distinct documents: models are trained on some sources, each part is scored alone.

Columns of `scores/PART.npy` [documents, columns] are integers: score, trigram and model in units of 1/65536, pool as it
is; UNSCORED where a document left before. Cuts of pools come from exact counts of all parts.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from thriftlab.data.prepare.engines.base import Engine
from thriftlab.data.prepare.parts import Parts, texts
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.data.prepare.scores import classifier, pools, trigram
from thriftlab.data.prepare.scores.tally import Tally, add, tally
from thriftlab.data.prepare.scores.words import IDS, word_ids
from thriftlab.data.prepare.work import write_array

UNSCORED = np.iinfo(np.int32).min
NATS = 1 << 16


class Scorer(Protocol):
    """Texts to nats per token, in units of 1/65536; `about` says what decides them. It can be pickled."""

    def __call__(self, texts: Iterable[str]) -> NDArray[np.int32]: ...
    def about(self) -> dict[str, Any]: ...


def units(config: PrepareConfig) -> dict[str, int]:
    """The columns of scores that are asked for, and the stored integer that is 1."""
    asked = {
        "score": (classifier.UNIT, bool(config.quality.positive)),
        "trigram": (trigram.UNIT, bool(config.perplexity.on)),
        "model": (NATS, config.perplexity.run is not None),
        "pool": (1, config.pools.by is not None),
    }
    return {name: unit for name, (unit, wanted) in asked.items() if wanted}


def score(config: PrepareConfig, parts: Parts, engine: Engine, model: Scorer | None) -> None:
    """Leaves the scores of every part, and the cuts of pools."""
    columns = [name for name in units(config) if name != "pool"]
    names, work = list(config.inputs), parts.work
    if "score" in columns and not work.is_finished("models/classifier"):
        positive, negative = config.quality.positive, config.quality.negative
        trained = classifier.train(texts_of(parts, names, positive), texts_of(parts, names, negative), config.seed)
        write_array(work.folder("models") / "classifier.npy", trained.weights)
        work.finish("models/classifier", {"documents": trained.documents})
    if "trigram" in columns and not work.is_finished("models/trigram"):
        _train_trigram(parts, names, config.perplexity.on)
    pooled = config.pools.by is not None
    f = partial(score_part, parts, columns, names, config.perplexity.on, model, "scored" if pooled else "scores")
    engine.each(f, work.unfinished("scored" if pooled else "scores", parts.count), "score")
    if config.pools.by is not None:
        _pools(config, parts, engine, columns.index(config.pools.by), len(columns))


def texts_of(parts: Parts, names: list[str], sources: Iterable[str]) -> Iterator[str]:
    """The distinct texts of some sources, in the order of their numbers."""
    for _, text in _numbered(parts, names, sources):
        yield text


def _numbered(parts: Parts, names: list[str], sources: Iterable[str]) -> Iterator[tuple[int, str]]:
    for s in sorted(names.index(name) for name in sources):
        for part in range(parts.count):
            first, last = parts.rows(part)[s : s + 2]
            numbers = parts.numbers(part)[first:last]
            left = np.asarray(parts.duplicates(part))[first:last] == numbers
            for rows, found in texts(parts.table(part).slice(first, last - first), left):
                yield from zip(numbers[left][rows].tolist(), found, strict=True)


def _train_trigram(parts: Parts, names: list[str], sources: tuple[str, ...]) -> None:
    read: list[int] = []

    def ids() -> Iterator[NDArray[np.int64]]:
        for number, text in _numbered(parts, names, sources):
            read[:] = [number]
            yield word_ids(text)

    counts = trigram.train(ids(), IDS).levels[-1].grams  # all others are sums of them
    write_array(parts.work.folder("models") / "trigram.npy", np.stack([counts.values, counts.counts]))
    parts.work.finish("models/trigram", {"last": read[0] if read else -1})


def _trigram(parts: Parts) -> trigram.Trigram:
    file = parts.work.path("models/trigram.npy")
    return _read_trigram(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _read_trigram(file: Path, written: int) -> trigram.Trigram:
    """Once in a process; `written` tells two preparations in the same place apart."""
    values, counts = np.load(file)
    return trigram.model(Tally(values, counts), IDS, 0)


def _classifier(parts: Parts) -> classifier.Classifier:
    return classifier.Classifier(np.load(parts.work.path("models/classifier.npy")), (0, 0))


def score_part(
    parts: Parts,
    columns: list[str],
    names: list[str],
    on: tuple[str, ...],
    model: Scorer | None,
    target: str,
    part: int,
) -> None:
    table, numbers = parts.table(part), parts.numbers(part)
    left = np.asarray(parts.duplicates(part)) == numbers
    kept = np.flatnonzero(left)
    own = _own(parts, names, on, table, numbers) if "trigram" in columns else np.zeros(len(table), bool)
    scorers: dict[str, Callable[[list[str], NDArray[np.int64]], NDArray[np.int32]]] = {
        "score": lambda found, rows: _classifier(parts).score(found),
        "trigram": lambda found, rows: _trigram(parts).score([word_ids(text) for text in found], own[rows]),
        "model": lambda found, rows: model(found) if model else np.empty(0, np.int32),
    }
    scores = np.full((len(table), len(columns)), UNSCORED, np.int32)
    for rows, found in texts(table, left):
        for k, name in enumerate(columns):
            scores[kept[rows], k] = scorers[name](found, kept[rows])
    write_array(parts.work.folder(target) / f"{part:05}.npy", scores)
    parts.work.finish(f"{target}/{part:05}", {})


def _own(
    parts: Parts, names: list[str], on: tuple[str, ...], table: pa.Table, numbers: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which documents the trigram model was trained on."""
    sources = [names.index(name) for name in on]
    return np.isin(table["source"].to_numpy(), sources) & (numbers <= parts.work.facts("models/trigram")["last"])


# --- pools -----------------------------------------------------------------------------------------------------------


def _pools(config: PrepareConfig, parts: Parts, engine: Engine, column: int, width: int) -> None:
    """Leaves the scores with a column more, and the cuts."""
    work = parts.work
    if not work.is_finished("cuts"):
        counted = engine.each(partial(_tallies, parts, column), range(parts.count), "count scores")
        by_source = [add(each) for each in zip(*counted, strict=True)]
        groups = by_source if config.pools.within == "source" else [add(by_source)] * len(by_source)
        ends = [pools.cuts(each, config.pools.count).tolist() if len(each.values) else [] for each in groups]
        work.finish("cuts", {"by": config.pools.by, "cuts": ends})
    engine.each(partial(_with_pools, parts, column, work.facts("cuts")["cuts"]),
                work.unfinished("scores", parts.count), "cut into pools")  # fmt: skip


def _tallies(parts: Parts, column: int, part: int) -> list[Tally]:
    values, rows = parts.array("scored", part)[:, column], parts.rows(part)
    return [tally(each[each != UNSCORED]) for each in (values[a:b] for a, b in zip(rows[:-1], rows[1:], strict=True))]


def _with_pools(parts: Parts, column: int, cuts: list[list[int]], part: int) -> None:
    scores, rows = np.asarray(parts.array("scored", part)), parts.rows(part)
    pool = np.full(len(scores), UNSCORED, np.int32)
    for ends, first, last in zip(cuts, rows[:-1], rows[1:], strict=True):
        values = scores[first:last, column]
        pool[first:last] = np.where(values == UNSCORED, UNSCORED, pools.pool_of(values, np.array(ends, np.int64)))
    write_array(parts.work.folder("scores") / f"{part:05}.npy", np.column_stack([scores, pool]))
    parts.work.finish(f"scores/{part:05}", {})
