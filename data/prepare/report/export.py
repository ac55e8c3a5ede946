"""The documents that stayed as one file for other programs: parquet or lines of JSON, a row for each document.

Rows are in the order of the ledger, some are held at a time, and the file is there whole or not at all.
"""

import gzip
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zstandard

from thriftlab.data.errors import DataError
from thriftlab.data.files import sync, writing
from thriftlab.data.prepare.report.documents import Documents, Row, open_documents

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
KEPT = ("source", "id", "split", "text")
TYPES = {"source": pa.string(), "id": pa.large_string(), "split": pa.string(), "text": pa.large_string()}

Writer = Callable[[list[Row]], Any]


def export(folder: str | Path, out: Path, force: bool = False) -> int:
    """Write the documents that stayed to `out`, whose suffix says how; returns how many. DataError."""
    documents = open_documents(folder)
    if not out.name.endswith(SUFFIXES):
        raise DataError(f"{out}: its suffix is none of {', '.join(SUFFIXES)}; choose one")
    if out.exists() and not force:
        raise DataError(f"{out}: is there already; choose another file, or replace it with force=true")
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder; make it first")
    for file in documents.files:
        documents.verify(file.relative_to(documents.folder).as_posix())
    temporary, count = out.with_name(f".{out.name}.{os.getpid()}.tmp"), 0
    with writing(out):
        try:
            with ExitStack() as stack:
                write = open_writer(temporary, out.name, documents.scores, stack)
                for rows in kept(documents):
                    write(rows)
                    count += len(rows)
            sync(temporary)
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
    return count


def kept(documents: Documents) -> Iterator[list[Row]]:
    """The rows of the documents that stayed, with their texts."""
    decoded: dict[tuple[str, str], Iterator[str]] = {}
    for batch in documents.in_order([*KEPT, *documents.scores, "stage"]):
        rows = batch.filter(pc.equal(batch["stage"], "kept")).drop_columns("stage").to_pylist()
        for row in rows:
            if row.get("text") is None:
                place = row["source"], row["split"]
                texts = decoded.setdefault(place, documents.decoded(*place))
                row["text"] = next(texts)
        yield rows


def open_writer(path: Path, name: str, scores: list[str], stack: ExitStack) -> Writer:
    """A function that writes rows; the file is complete when the stack is left."""
    if name.endswith(".parquet"):
        types = TYPES | {score: pa.int16() if score == "pool" else pa.float32() for score in scores}
        schema = pa.schema(list(types.items()))
        table = stack.enter_context(pq.ParquetWriter(path, schema, compression="zstd"))
        return lambda rows: rows and table.write_table(pa.Table.from_pylist(rows, schema))
    file: Any = stack.enter_context(open(path, "wb"))
    if name.endswith(".gz"):
        file = stack.enter_context(gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename=""))
    elif name.endswith(".zst"):
        file = stack.enter_context(zstandard.ZstdCompressor().stream_writer(file, closefd=False))
    columns = [*KEPT, *scores]
    text = stack.enter_context(io.TextIOWrapper(file, "utf-8", newline="\n"))
    return lambda rows: text.writelines(
        json.dumps({name: row[name] for name in columns}, ensure_ascii=False) + "\n" for row in rows
    )
