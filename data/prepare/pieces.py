"""What one task reads: the inputs cut into pieces of about `piece_bytes`, by sizes alone.

A piece is a list of units of one source: whole files, bytes of a file of lines, row groups of parquet. What can be read
only from its beginning to its end, or only once (packed files larger than a piece, packages, a network), is landed
first: read by one task, and written as units that can be read again.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from thriftlab.data.corpora import readers, streams
from thriftlab.data.corpora.folders import Format, formats, name_below
from thriftlab.data.files import printable
from thriftlab.data.prepare.engines.base import Engine
from thriftlab.data.prepare.request import Input, PrepareConfig
from thriftlab.data.prepare.work import Work

PACKED = 4  # bytes of text that are expected of a byte of a packed file

LANDED = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])


class Unit(NamedTuple):
    """A file or a part of it, and the bytes of text that are expected there."""

    file: str
    name: str  # of the file in the corpus
    format: Format | None  # None: landed
    given: bool
    size: int
    part: tuple[int, int, int] | None = None


Piece = tuple[int, list[Unit]]  # source, units


def units(source: Input, piece_bytes: int, passed: Callable[[str, str], None], engine: Engine) -> list[Unit]:
    """Those of the files of an input, in the order of their names; parts of large ones."""
    root = Path(source.path)
    found = [
        (file, name_below(file, root), format, source.format is not None)
        for file, format in formats(root, source.format, passed)
    ]
    large = [file for file, _, format, _ in found if format == "jsonl" and _is_split(file, piece_bytes)]
    parts = dict(zip(large, engine.each(partial(_byte_ranges, piece_bytes), large, "count lines"), strict=True))
    return [
        Unit(str(file), name, format, given, size, part)
        for file, name, format, given in found
        for size, part in (parts.get(file) or _parts(file, format, source.text_key, piece_bytes))
    ]


def is_landed(unit: Unit, piece_bytes: int) -> bool:
    """Whether a unit is too large for one task, and cannot be cut without reading it."""
    return unit.part is None and unit.size > piece_bytes and unit.format != "text"


def _is_split(file: Path, piece_bytes: int) -> bool:
    return file.stat().st_size > piece_bytes and not streams.is_packed(file)


def _byte_ranges(piece_bytes: int, file: Path) -> list[tuple[int, tuple[int, int, int]]]:
    size = file.stat().st_size
    bounds = [*range(0, size, piece_bytes), size]
    line, parts = 0, []
    for start, stop in pairwise(bounds):
        parts.append((stop - start, (start, stop, line + 2 if start else 1)))
        line += streams.line_ends(file, max(start - 1, 0), stop - 1)
    return parts


def _parts(
    file: Path, format: Format, text_key: str, piece_bytes: int
) -> list[tuple[int, tuple[int, int, int] | None]]:
    size = file.stat().st_size
    if format == "parquet":
        return _row_groups(file, text_key, piece_bytes) or [(size, None)]
    return [(size * (PACKED if size and streams.is_packed(file) else 1), None)]


def _row_groups(file: Path, text_key: str, piece_bytes: int) -> list[tuple[int, tuple[int, int, int] | None]]:
    """Runs of row groups of about a piece; none for a file that is damaged, which its reader will say."""
    from pyarrow.parquet import ParquetFile

    parts: list[tuple[int, tuple[int, int, int] | None]] = []
    try:
        with ParquetFile(file) as table:
            metadata, columns = table.metadata, table.schema_arrow.names
    except (pa.ArrowException, OSError):
        return []
    if text_key not in columns:
        return []
    start, first, row, size = 0, 1, 1, 0
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        row += about.num_rows
        size += sum(
            about.column(c).total_uncompressed_size
            for c in range(about.num_columns)
            if about.column(c).path_in_schema.split(".")[0] == text_key
        )
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            parts.append((size, (start, group + 1, first)))
            start, first, size = group + 1, row, 0
    return parts


def pieces(source: int, found: Iterable[Unit], piece_bytes: int) -> Iterator[Piece]:
    """Neighbouring units together, up to `piece_bytes`."""
    held: list[Unit] = []
    size = 0
    for unit in found:
        if held and size + unit.size > piece_bytes:
            yield source, held
            held, size = [], 0
        held, size = [*held, unit], size + unit.size
    if held:
        yield source, held


def write_piece(work: Work, number: int, piece: Piece) -> None:
    work.finish(f"pieces/{number:05}", {"source": piece[0], "units": piece[1]})


def read_piece(work: Work, number: int) -> Piece:
    facts = work.facts(f"pieces/{number:05}")
    return facts["source"], [Unit(*unit) for unit in facts["units"]]


def documents(unit: Unit, text_key: str) -> Iterator[tuple[str, str]]:
    """(id, text) of the documents of a unit."""
    if unit.format is None:
        with pa.memory_map(os.fsencode(unit.file)) as stream, pa.ipc.open_file(stream) as reader:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                yield from zip(batch["id"].to_pylist(), batch["text"].to_pylist(), strict=True)
        return
    part = readers.Part(*unit.part) if unit.part else None
    for row, text, _ in readers.rows(Path(unit.file), unit.format, text_key, unit.given, part):
        yield printable(unit.name) + row, text


# --- landing ---------------------------------------------------------------------------------------------------------


def land(work: Work, config: PrepareConfig, item: tuple[int, str, Unit | None]) -> None:
    """Reads a source, or a unit of it, once, and leaves pieces of it and a list of them."""
    number, name, unit = item
    source = config.inputs[name]
    passed: list[tuple[str, str]] = []
    if unit:
        found: Iterator[tuple[str, str]] = documents(unit, source.text_key)
    else:
        read = readers.read(
            source.path, name, source.text_key, source.streaming, config.downloads, source.format,
            lambda *told: passed.append(told),
        )  # fmt: skip
        found = ((printable(document.id), document.text) for document in read)
    landed = []
    for count, (ids, texts, size) in enumerate(_filled(found, config.piece_bytes)):
        file = work.folder(f"land/{number:05}") / f"{count:05}.arrow"
        _write_landed(file, ids, texts)
        landed.append(Unit(str(file), unit.name if unit else file.name, None, True, size))
    work.finish(f"land/{number:05}", {"units": landed, "passed": passed})


def landed(work: Work, number: int) -> tuple[list[Unit], list[tuple[str, str]]]:
    facts = work.facts(f"land/{number:05}")
    return [Unit(*unit) for unit in facts["units"]], [(name, reason) for name, reason in facts["passed"]]


def _filled(found: Iterator[tuple[str, str]], most: int) -> Iterator[tuple[list[str], list[str], int]]:
    ids: list[str] = []
    texts: list[str] = []
    size = 0
    for identity, text in found:
        ids.append(identity)
        texts.append(text)
        size += len(text)
        if size >= most:
            yield ids, texts, size
            ids, texts, size = [], [], 0
    if ids:
        yield ids, texts, size


def _write_landed(file: Path, ids: Sequence[str], texts: Sequence[str]) -> None:
    with pa.OSFile(os.fsencode(file), "wb") as sink, pa.ipc.new_file(sink, LANDED) as writer:
        writer.write_batch(pa.record_batch([pa.array(ids, pa.large_string()), pa.array(texts, pa.large_string())],
                                           schema=LANDED))  # fmt: skip
