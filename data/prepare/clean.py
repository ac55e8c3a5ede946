"""Documents in, distinct documents out: normalised, judged by rules, each text once, in an order of their own.

The key of a document is the first half of the sha256 of its text. Parts of the work are ranges of the keys, so copies
meet whatever source and file they come from; of equal texts the first by (source, id) stays. What stays, and in which
order, is a function of the set of documents: neither files nor their order nor the number of parts or workers counts.
"""

import hashlib
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from thriftlab.data.corpora.readers import normalise
from thriftlab.data.prepare.pieces import documents, read_piece
from thriftlab.data.prepare.request import PrepareConfig
from thriftlab.data.prepare.rules import Rules
from thriftlab.data.prepare.work import Work, write_table

EMPTY, EXACT = "empty", "exact duplicate"
SAMPLES, SAMPLED = 20, 2000  # of a reason; characters of each

DOCUMENTS = pa.schema([
    ("part", pa.int32()), ("source", pa.int16()), ("hi", pa.uint64()), ("lo", pa.uint64()), ("point", pa.uint64()),
    ("bytes", pa.int32()), ("id", pa.large_string()), ("stage", pa.large_string()), ("reason", pa.large_string()),
    ("text", pa.large_string()),
])  # fmt: skip
ORDER = [(name, "ascending") for name in ("hi", "lo", "source", "id")]


class Judged(NamedTuple):
    """What became of a text: the stage and reason it left for, or the text that stays."""

    text: str
    stage: str | None
    reason: str | None


def clean(work: Work, config: PrepareConfig, rules: Rules | None, parts: int, number: int) -> pa.Table:
    """A piece of the input: its documents with their keys; what is dropped comes without its text."""
    source, units = read_piece(work, number)
    name = list(config.inputs)[source]
    acting = config.inputs[name].kind == "web"
    counts, samples, rows = Counts(), Samples(), []
    empty_files = []
    for unit in units:
        found = False
        for identity, raw in documents(unit, config.inputs[name].text_key):
            found = True
            text = normalise(raw)
            digest, size = _hashed(text)
            counts.read(digest, size)
            judged = _judge(text, size, rules, acting, counts)
            if judged.reason:
                counts.dropped(judged.stage, judged.reason, size, acted=True)
                samples.add(f"{judged.stage}/{judged.reason}", digest, identity, text)
            elif judged.text != text:
                before, (digest, size) = size, _hashed(judged.text)
                counts.edited_bytes += before - size
            rows.append((
                source, int.from_bytes(digest[:8]), int.from_bytes(digest[8:16]), point(digest, config.seed),
                size, identity, judged.stage, judged.reason, None if judged.reason else judged.text,
            ))  # fmt: skip
        if not found:
            empty_files.append(unit.name)
    work.finish(f"clean/{number:05}", {
        "source": source, "empty_files": empty_files, "samples": samples.first, **counts.facts(),
    })  # fmt: skip
    return _table(rows, parts)


def _hashed(text: str) -> tuple[bytes, int]:
    """The sha256 of a text in UTF-8, and its bytes."""
    encoded = text.encode()
    return hashlib.sha256(encoded).digest(), len(encoded)


def _judge(text: str, size: int, rules: Rules | None, acting: bool, counts: "Counts") -> Judged:
    if not text.strip():
        return Judged(text, EMPTY, EMPTY)
    if rules is None:
        return Judged(text, None, None)
    cleaned = rules.clean(text)
    counts.edits.update(cleaned.edits)
    if not acting:
        if cleaned.reason:
            counts.dropped("rules", cleaned.reason, size, acted=False)
        return Judged(text, None, None)
    if not cleaned.reason and not cleaned.text.strip():
        return Judged(text, "rules", "nothing left by line rules")
    return Judged(cleaned.text if not cleaned.reason else text, "rules" if cleaned.reason else None, cleaned.reason)


def point(digest: bytes, seed: int) -> int:
    """A uniform number in [0, 2^64) for the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little") + digest).digest()[:8], "little")


def _table(rows: list[tuple[Any, ...]], parts: int) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * (len(DOCUMENTS) - 1)
    hi = np.array(columns[1], np.uint64)
    part = (hi >> np.uint64(65 - parts.bit_length())).astype(np.int32) if parts > 1 else np.zeros(len(hi), np.int32)
    arrays = [pa.array(part), pa.array(columns[0], pa.int16()), pa.array(hi)]
    arrays += [pa.array(column, field.type) for column, field in zip(columns[2:], list(DOCUMENTS)[3:], strict=True)]
    return pa.table(arrays, schema=DOCUMENTS)


# --- counts ----------------------------------------------------------------------------------------------------------


class Counts:
    """What a piece read and dropped; as integers, so that the sums over pieces are exact."""

    def __init__(self) -> None:
        self.documents = self.bytes = self.text_sum = self.edited_bytes = 0
        self.reasons: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # documents, bytes
        self.edits: Counter[str] = Counter()

    def read(self, digest: bytes, size: int) -> None:
        self.documents += 1
        self.bytes += size
        self.text_sum += int.from_bytes(digest)  # a sum, so that it knows no order

    def dropped(self, stage: str | None, reason: str, size: int, acted: bool) -> None:
        tally = self.reasons[f"{stage}/{reason}/{int(acted)}"]  # see `taken_apart`
        tally[0] += 1
        tally[1] += size

    def facts(self) -> dict[str, Any]:
        return {
            "documents": self.documents, "bytes": self.bytes, "edited_bytes": self.edited_bytes,
            "text_sum": f"{self.text_sum % 2**256:064x}",
            "reasons": dict(sorted(self.reasons.items())), "edits": dict(sorted(self.edits.items())),
        }  # fmt: skip


def taken_apart(key: str) -> tuple[str, str, bool]:
    """Stage, reason, and whether documents were dropped; else they were counted only."""
    stage, _, rest = key.partition("/")
    reason, _, acted = rest.rpartition("/")
    return stage, reason, acted == "1"


class Samples:
    """The first SAMPLES texts by key of every reason: [key, id, text]."""

    def __init__(self) -> None:
        self.first: dict[str, list[list[str]]] = {}

    def add(self, reason: str, digest: bytes, identity: str, text: str) -> None:
        self.merge(reason, [[digest[:16].hex(), identity, text[:SAMPLED]]])

    def merge(self, reason: str, more: list[list[str]]) -> None:
        held = self.first.get(reason, [])
        if len(held) < SAMPLES or more[0] < held[-1]:
            self.first[reason] = sorted([*held, *more])[:SAMPLES]


# --- each text once --------------------------------------------------------------------------------------------------


def unique(work: Work, sources: int, part: int, table: pa.Table) -> None:
    """All documents of one part: those that stay, sorted by (source, key), and all others, with the reason."""
    table = table.sort_by(ORDER)
    stays = table["reason"].is_null().to_numpy()
    hi, lo = table["hi"].to_numpy(), table["lo"].to_numpy()
    kept, others = _first_of_each(hi, lo, stays)
    copies = np.flatnonzero(stays & ~kept)
    by_source = np.argsort(table["source"].to_numpy()[kept], kind="stable")
    place = np.empty(len(by_source), np.int64)
    place[by_source] = np.arange(len(by_source))  # of the kept ones, in order of key, their rows in the file
    stayed = np.full(len(table), -1, np.int64)
    stayed[copies] = place[others[copies]]

    held = table.filter(pa.array(kept)).take(pa.array(by_source))
    write_table(
        work.folder("unique") / f"{part:05}.arrow",
        held.select(["source", "hi", "lo", "point", "bytes", "id", "text"]),
    )
    left = table.append_column("of", pa.array(stayed)).filter(pa.array(~kept))
    left = left.select(["source", "hi", "lo", "bytes", "id", "stage", "reason", "of"])
    copied = left["reason"].is_null()
    left = left.set_column(5, "stage", pc.if_else(copied, "exact", left["stage"]))
    left = left.set_column(6, "reason", pc.if_else(copied, EXACT, left["reason"]))
    write_table(work.folder("unique") / f"{part:05}.dropped.arrow", left.sort_by([("source", "ascending"), *ORDER[:2],
                                                                                  ORDER[3]]))  # fmt: skip
    source, size = table["source"].to_numpy(), table["bytes"].to_numpy()
    work.finish(f"unique/{part:05}", {
        "rows": np.bincount(source[kept], minlength=sources).tolist(),
        "copies": np.bincount(source[copies], minlength=sources).tolist(),
        "copied_bytes": [int(size[copies][source[copies] == s].sum()) for s in range(sources)],
    })  # fmt: skip


def _first_of_each(
    hi: NDArray[np.uint64], lo: NDArray[np.uint64], stays: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which rows are the first of their key among those that stay; of each of these rows, the rank of that first."""
    rows = np.flatnonzero(stays)
    opens = np.ones(len(rows), bool)
    opens[1:] = (hi[rows][1:] != hi[rows][:-1]) | (lo[rows][1:] != lo[rows][:-1])
    kept = np.zeros(len(hi), bool)
    kept[rows[opens]] = True
    rank = np.zeros(len(hi), np.int64)
    rank[rows] = np.cumsum(opens) - 1
    return kept, rank
