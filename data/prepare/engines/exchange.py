"""An exchange through files: a map task writes one Arrow file with one batch for each part, a reducer maps its batches.

M map tasks and P parts make M files, not M x P, and of each a reducer touches the bytes of its part alone.
"""

import os
import platform
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from thriftlab.data.files import writing

Mapper = Callable[[int], pa.Table]
Reducer = Callable[[int, pa.Table], None]


def versions() -> dict[str, str]:
    """What decides bytes and comes from Python: `\\w`, `lower` and NFC follow its tables."""
    return {"python": ".".join(platform.python_version_tuple()[:2]), "unicode": unicodedata.unidata_version}


def split(table: pa.Table, parts: Sequence[int], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """For each of these parts its rows, as one batch; an empty one where there are none."""
    if not table.schema.equals(schema):
        raise TypeError(f"a mapper gives {table.schema}, and not {schema}")
    table = table.combine_chunks()  # `take` on several chunks copies them all
    column = table["part"].to_numpy()
    order = np.argsort(column, kind="stable")
    firsts, lasts = (np.searchsorted(column[order], parts, side) for side in ("left", "right"))
    for first, last in zip(firsts, lasts, strict=True):
        rows = table.take(order[first:last]).combine_chunks().to_batches()
        if len(rows) > 1:
            raise ValueError("a column of one part does not fit into a batch; use large_string")
        yield rows[0] if rows else pa.RecordBatch.from_pylist([], schema)


def spill(mapper: Mapper, parts: Sequence[int], schema: pa.Schema, folder: Path, piece: int) -> None:
    table = mapper(piece)
    path = folder / f"{piece}.arrow"
    with writing(path), pa.OSFile(os.fsencode(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in split(table, parts, schema):
            writer.write_batch(batch)


def gather(reducer: Reducer, parts: Sequence[int], schema: pa.Schema, folder: Path, pieces: int, part: int) -> None:
    batches, place = [], parts.index(part)
    for piece in range(pieces):
        with pa.memory_map(os.fsencode(folder / f"{piece}.arrow")) as source:
            batches.append(pa.ipc.open_file(source).get_batch(place))
    reducer(part, pa.Table.from_batches(batches, schema))
