"""The ledger: one row for every document that was read, with what was decided about it, and the sums of it.

Files of parquet under `documents/`, one a part, in the order (source, key, id). What left before the near stage has no
number. Texts are kept of all that had one then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from thriftlab.data.prepare.clean import SAMPLED, Samples
from thriftlab.data.prepare.histograms import count_histograms
from thriftlab.data.prepare.parts import HELD, LEAKS, NEAR, TRAIN, Parts
from thriftlab.data.prepare.work import putting, read_table

NEAR_REASON, LEAK_REASON = "near duplicate", "near-duplicate of a held-out document"
STAGES = {int(TRAIN): "kept", int(HELD): "kept", int(NEAR): "near", int(LEAKS): "decontaminate"}
REASONS = {int(TRAIN): None, int(HELD): None, int(NEAR): NEAR_REASON, int(LEAKS): LEAK_REASON}
SPLIT_NAMES = {int(TRAIN): "train", int(HELD): "validation", int(NEAR): None, int(LEAKS): None}
ROW_GROUP = 4096

LEDGER = pa.schema([
    ("source", pa.dictionary(pa.int16(), pa.string())), ("number", pa.int64()), ("id", pa.large_string()),
    ("key", pa.string()), ("stage", pa.string()), ("reason", pa.string()), ("split", pa.string()),
    ("bytes", pa.int32()), ("tokens", pa.int32()), ("of", pa.int64()), ("overlap", pa.float32()),
])  # fmt: skip


def write_ledger(parts: Parts, sources: Sequence[str], units: dict[str, int], keep_text: bool, part: int) -> None:
    """The ledger of a part; `units`: of each column of scores, the stored integer that is 1."""
    kept, dropped = _kept(parts, units, part), _dropped(parts, units, part)
    table = pa.concat_tables([kept, dropped]).sort_by([(name, "ascending") for name in ("rank", "key", "id")])
    source = pa.DictionaryArray.from_arrays(table["rank"].combine_chunks(), pa.array(list(sources), pa.string()))
    samples: dict[str, Samples] = {name: Samples() for name in sources}
    for row in _sampled(table):
        reason = f"{row['stage']}/{row['reason']}"
        samples[sources[row["rank"]]].merge(reason, [[row["key"], row["id"], (row["text"] or "")[:SAMPLED]]])
    columns = ["text"] if keep_text else []
    file = parts.work.out / "documents" / f"{part:05}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    written = table.select([*LEDGER.names[1:], *units, *columns]).add_column(0, LEDGER.field("source"), source)
    with putting(file) as temporary, open(temporary, "wb") as sink:
        pq.write_table(written, sink, row_group_size=ROW_GROUP, compression="zstd")
    facts = {
        "documents": len(table),
        "samples": {name: each.first for name, each in samples.items()},
        "histograms": count_histograms(parts, len(sources), units, part),
    }
    parts.work.finish(f"ledger/{part:05}", facts)


def _kept(parts: Parts, units: dict[str, int], part: int) -> pa.Table:
    """The distinct documents of a part."""
    table, fate = parts.table(part), np.asarray(parts.array("fate", part))
    numbers, stayed = parts.numbers(part), np.asarray(parts.duplicates(part))
    tokens = np.full(len(table), -1, np.int64)
    index = parts.array("tokens", part)
    tokens[index[:, 0]] = index[:, 1]
    of = np.where(fate == NEAR, stayed, -1)
    columns = {
        "rank": table["source"], "number": pa.array(numbers), "id": table["id"], "key": _keys(table),
        "stage": _words(fate, STAGES), "reason": _words(fate, REASONS), "split": _words(fate, SPLIT_NAMES),
        "bytes": table["bytes"], "tokens": _where(tokens, tokens >= 0, pa.int32()),
        "of": _where(of, of >= 0, pa.int64()), "overlap": _overlap(np.asarray(parts.array("overlap", part))),
    }  # fmt: skip
    if units:
        columns |= _scores(np.asarray(parts.array("scores", part)), units)
    return pa.table(columns | {"text": table["text"]}).cast(_schema(units))


def _dropped(parts: Parts, units: dict[str, int], part: int) -> pa.Table:
    """The documents that left before; a copy has the number of the one that stayed."""
    table = read_table(parts.work.path(f"unique/{part:05}.dropped.arrow"))
    of = table["of"].to_numpy()
    numbers = np.append(parts.numbers(part), -1)[of]  # row -1 is the last, which is none
    columns = {
        "rank": table["source"], "id": table["id"], "key": _keys(table), "stage": table["stage"],
        "reason": table["reason"], "bytes": table["bytes"], "of": _where(numbers, of >= 0, pa.int64()),
    }  # fmt: skip
    schema = _schema(units)
    nulls = {field.name: pa.nulls(len(table), field.type) for field in schema if field.name not in columns}
    return pa.table({field.name: (columns | nulls)[field.name] for field in schema}).cast(schema)


def _schema(units: dict[str, int]) -> pa.Schema:
    scores = [(name, pa.int16() if name == "pool" else pa.float32()) for name in units]
    fields = [("rank", pa.int16()), *((field.name, field.type) for field in list(LEDGER)[1:])]
    return pa.schema([*fields, *scores, ("text", pa.large_string())])


def _keys(table: pa.Table) -> pa.Array:
    pairs = zip(table["hi"].to_pylist(), table["lo"].to_pylist(), strict=True)
    return pa.array([f"{hi:016x}{lo:016x}" for hi, lo in pairs], pa.string())


def _words(fate: NDArray[np.int8], names: Mapping[int, str | None]) -> pa.Array:
    return pa.array([names[each] for each in fate.tolist()], pa.string())


def _where(values: NDArray[Any], there: NDArray[np.bool_], type: pa.DataType) -> pa.Array:
    return pa.array(values, type, mask=~there)


def _overlap(values: NDArray[np.float32]) -> pa.Array:
    return pa.array(values, pa.float32(), mask=np.isnan(values))


def _scores(scores: NDArray[np.int32], units: dict[str, int]) -> dict[str, pa.Array]:
    there = scores != np.iinfo(np.int32).min
    return {
        name: _where(scores[:, k] / unit if unit > 1 else scores[:, k], there[:, k],
                     pa.int16() if name == "pool" else pa.float32())
        for k, (name, unit) in enumerate(units.items())
    }  # fmt: skip


def _sampled(table: pa.Table) -> list[dict[str, Any]]:
    """The first rows of every source and reason among those that the near stage and decontamination drop."""
    wanted = table.filter(pc.is_in(table["stage"], pa.array(["near", "decontaminate"])))
    rows: list[dict[str, Any]] = []
    for stage in ("near", "decontaminate"):
        for rank in pc.unique(wanted["rank"]).to_pylist():
            mine = wanted.filter(pc.and_(pc.equal(wanted["stage"], stage), pc.equal(wanted["rank"], rank)))
            rows += mine.slice(0, 20).select(["rank", "stage", "reason", "key", "id", "text"]).to_pylist()
    return rows
