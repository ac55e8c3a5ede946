"""The documents of a prepared folder, each with what was decided about it: the ledger under documents/, read back.

A scan holds some rows at a time. Where texts were not kept, those of documents that stayed are decoded from the shards,
which gives them back to the byte.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
from numpy.typing import NDArray

from thriftlab.data.errors import DataError
from thriftlab.data.manifest import Manifest, file_sha256, read_manifest
from thriftlab.data.shards import Dataset, open_dataset

if TYPE_CHECKING:
    import pyarrow.dataset as arrow

FUNNEL = "documents/funnel.json"
SCORES = ("score", "trigram", "model", "pool")
ROWS = 1024  # that are held at once
BUFFER = 1 << 16  # bytes of a file
REMEDY = "prepare it again with force=true"

Row = dict[str, Any]


class Place(NamedTuple):
    """Where the tokens of a document are."""

    file: str
    document: int  # which one of the file
    start: int  # tokens before it
    stop: int


@dataclass(frozen=True, eq=False)
class Documents:
    """A prepared folder and its ledger, not yet read."""

    folder: Path
    manifest: Manifest

    @property
    def settings(self) -> dict[str, Any]:
        """What the folder was prepared with."""
        return self.manifest["made"]["request"]["settings"]

    @cached_property
    def funnel(self) -> dict[str, Any]:
        self.verify(FUNNEL)
        return json.loads((self.folder / FUNNEL).read_bytes())

    @cached_property
    def files(self) -> list[Path]:
        """Of the ledger, in the order of the documents."""
        return [self.folder / name for name in sorted(self.manifest["made"]["documents"]) if name.endswith(".parquet")]

    @cached_property
    def ledger(self) -> "arrow.Dataset":
        import pyarrow.dataset as arrow  # brings pandas, which no worker of a preparation needs
        from fsspec.implementations.dirfs import DirFileSystem
        from fsspec.implementations.local import LocalFileSystem
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        # Not Arrow's own file system, which takes no names that are not UTF-8: those below the folder are.
        below = PyFileSystem(FSSpecHandler(DirFileSystem(str(self.folder), LocalFileSystem())))
        names = [file.relative_to(self.folder).as_posix() for file in self.files]
        return arrow.dataset(names, format="parquet", filesystem=below)

    @cached_property
    def scores(self) -> list[str]:
        return [name for name in SCORES if name in self.ledger.schema.names]

    @cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.folder, verify=False)

    def verify(self, name: str) -> None:
        """DataError unless a file is what was written."""
        if not (self.folder / name).is_file():
            raise DataError(f"{self.folder / name}: missing; {REMEDY}")
        if file_sha256(self.folder / name) != self.manifest["made"]["documents"][name]:
            raise DataError(f"{self.folder / name}: changed since it was prepared (sha256 differs); {REMEDY}")

    def batches(self, columns: Sequence[str], condition: pc.Expression | None = None) -> Iterator[pa.RecordBatch]:
        """Rows that fit; columns that the ledger lacks are left out."""
        names = [name for name in columns if name in self.ledger.schema.names]
        try:
            yield from self.ledger.scanner(
                columns=names, filter=condition, batch_size=ROWS, batch_readahead=1, fragment_readahead=1,
                use_threads=False,
            ).to_batches()  # fmt: skip
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.folder}/documents: cannot be read ({error}); {REMEDY}") from None

    def in_order(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """All rows in the order of the ledger. Unlike a scan, which reads ahead, it holds no more than ROWS."""
        names = [name for name in columns if name in self.ledger.schema.names]
        for path in self.files:
            with open(path, "rb") as stream, parquet.ParquetFile(stream, pre_buffer=False, buffer_size=BUFFER) as file:
                yield from file.iter_batches(ROWS, columns=names, use_threads=False)

    def rows(self, condition: pc.Expression | None = None, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """The same, row by row; all columns unless given."""
        for batch in self.batches(columns or self.ledger.schema.names, condition):
            yield from batch.to_pylist()

    def place(self, row: Row) -> Place:
        """Where the tokens of a document that stayed are: documents lie in the order of their numbers."""
        before = 0
        earlier = (pc.field("number") < row["number"]) & (pc.field("split") == row["split"])
        for batch in self.batches(["source"], earlier):
            before += batch.column(0).to_pylist().count(row["source"])
        for shard in self.manifest["sources"][row["source"]][row["split"]]["shards"]:
            if before < shard["documents"]:
                ends = self.ends(shard)
                return Place(shard["file"], before, int(ends[before - 1]) if before else 0, int(ends[before]))
            before -= shard["documents"]
        raise DataError(f"{self.folder}: document {row['number']} is in no shard; {REMEDY}")

    def ends(self, shard: dict[str, Any]) -> NDArray[np.int64]:
        return np.load(self.folder / shard["ends_file"], mmap_mode="r")

    def decoded(self, source: str, split: str) -> Iterator[str]:
        """The texts of the documents that stayed, from their tokens, in the order of their numbers."""
        entry, dtype = self.manifest["sources"][source][split], np.dtype(self.manifest["dtype"]).newbyteorder("<")
        for shard in entry["shards"]:
            tokens, start = np.memmap(self.folder / shard["file"], dtype, mode="r"), 0
            for end in self.ends(shard):
                yield self.dataset.tokenizer.decode(tokens[start:end])
                start = end

    def decoded_at(self, place: Place) -> str:
        dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        tokens = np.memmap(self.folder / place.file, dtype, mode="r")
        return self.dataset.tokenizer.decode(tokens[place.start : place.stop])


def open_documents(folder: str | Path) -> Documents:
    """DataError where there is no prepared folder, or one without a ledger."""
    manifest = read_manifest(Path(folder))
    if not manifest.get("made", {}).get("documents"):
        raise DataError(f"{folder}: has no list of the documents that were read, as older versions left none; {REMEDY}")
    return Documents(Path(folder), manifest)
