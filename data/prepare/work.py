"""The folder of an unfinished preparation: who reads what is finished from it, and how a finished piece is told.

A piece of work has a name, as "clean/00017". It is finished when NAME.json is there, sealed with its own hash and
written after all that it speaks of; so a killed preparation goes on with what has none. Temporary names hold the
machine and the process: a task that runs twice at once writes the same bytes twice, and the later rename wins.
"""

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from thriftlab.data.errors import DataError
from thriftlab.data.files import seal, unseal


class Work(NamedTuple):
    """`stages`: what tasks leave for each other. `out`: what will be the prepared folder."""

    stages: Path
    out: Path

    def folder(self, name: str) -> Path:
        folder = self.stages / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def path(self, name: str) -> Path:
        return self.stages / name

    def finish(self, name: str, facts: dict[str, Any]) -> None:
        file = self.stages / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        with putting(file) as temporary:
            temporary.write_bytes(seal({"facts": facts}))  # which may have a sha256 of their own

    def is_finished(self, name: str) -> bool:
        return (self.stages / f"{name}.json").is_file()

    def unfinished(self, names: str, count: int) -> list[int]:
        """Those of the pieces NAMES/00000 ... that are not finished."""
        return [number for number in range(count) if not self.is_finished(f"{names}/{number:05}")]

    def facts(self, name: str) -> dict[str, Any]:
        file = self.stages / f"{name}.json"
        try:
            return unseal(file.read_bytes())["facts"]
        except ValueError as error:
            raise DataError(f"{file}: {error}; delete it and run the same command again") from None

    def all_facts(self, names: str, count: int) -> Iterator[dict[str, Any]]:
        """Of the pieces by number, never of what lies in the folder: an older plan may have left more."""
        return (self.facts(f"{names}/{number:05}") for number in range(count))


@contextmanager
def putting(file: Path) -> Iterator[Path]:
    """A temporary path to write; then it takes the place of `file`, whole and on the disk."""
    temporary = file.with_name(f".{file.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_table(file: Path, table: pa.Table) -> None:
    """As one batch, so that it is read back as one."""
    batches = table.combine_chunks().to_batches()
    with putting(file) as temporary, pa.OSFile(os.fsencode(temporary), "wb") as sink:
        with pa.ipc.new_file(sink, table.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Mapped into memory: only what is looked at is read."""
    with pa.memory_map(os.fsencode(file)) as source, pa.ipc.open_file(source) as reader:
        table = reader.read_all()
    return table.select(columns) if columns else table


def write_array(file: Path, array: np.ndarray) -> None:
    with putting(file) as temporary, open(temporary, "wb") as sink:
        np.save(sink, array)


def read_array(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")
