"""Who calls the functions of the stages: this process, a pool of processes, or Ray. All end with the same bytes.

An engine has two verbs. It promises no order of arrival and may call a function again whose worker was killed, so what
it calls is a function of its arguments alone that leaves whole files or none.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import pyarrow as pa
from tqdm import tqdm

from thriftlab.data.cores import usable_cores
from thriftlab.data.files import make_folder
from thriftlab.data.prepare.engines.exchange import Mapper, Reducer, gather, spill, versions
from thriftlab.data.prepare.engines.workers import Pool

__all__ = ["Engine", "Here", "Processes", "open_engine", "versions"]

Item = TypeVar("Item")
T = TypeVar("T")
Name = Literal["here", "processes", "ray"]


class Engine(Protocol):
    workers: int

    def each(self, f: Callable[[Item], T], items: Sequence[Item], what: str = "") -> list[T]:
        """f(item) of all items, in their order. `what` names the stage in errors and progress."""

    def exchange(
        self, mapper: Mapper, pieces: int, reducer: Reducer, parts: Sequence[int], schema: pa.Schema, what: str = ""
    ) -> None:
        """mapper(i) of all pieces i gives a table of this schema, with a column `part`; then reducer(p, all rows of
        part p) of all `parts`, which are different. Rows of other parts are thrown away; empty parts count."""

    def close(self) -> None: ...


@contextmanager
def open_engine(name: Name, workers: int | None, spool: Path) -> Iterator[Engine]:
    """The engine of this name, with as many workers as there are usable cores unless given.

    What an exchange moves lies below `spool`; what a run that was killed left there is removed.
    """
    engine: Engine
    if name == "ray":
        from thriftlab.data.prepare.engines.on_ray import OnRay

        engine = OnRay(workers, spool)
    else:
        engine = Here(spool) if name == "here" else Processes(spool, workers or usable_cores())
    try:
        yield engine
    finally:
        engine.close()


class Here:
    """One process, this one."""

    workers = 1

    def __init__(self, spool: Path) -> None:
        self.folder = spool / "exchange"
        shutil.rmtree(self.folder, ignore_errors=True)

    def each(self, f: Callable[[Item], T], items: Sequence[Item], what: str = "") -> list[T]:
        return [f(item) for item in tqdm(items, what, disable=None, leave=False)]

    def exchange(
        self, mapper: Mapper, pieces: int, reducer: Reducer, parts: Sequence[int], schema: pa.Schema, what: str = ""
    ) -> None:
        if not parts:
            return
        make_folder(self.folder)
        try:
            self.each(partial(spill, mapper, parts, schema, self.folder), range(pieces), f"{what}, piece")
            self.each(partial(gather, reducer, parts, schema, self.folder, pieces), parts, f"{what}, part")
        finally:
            shutil.rmtree(self.folder)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Processes(Here):
    """A pool of processes of one thread each, for the whole run."""

    def __init__(self, spool: Path, workers: int) -> None:
        super().__init__(spool)
        self.workers = workers
        self.pool = Pool(workers)

    def each(self, f: Callable[[Item], T], items: Sequence[Item], what: str = "") -> list[T]:
        results: dict[int, Any] = {}
        arriving = self.pool.results(f, items, what)
        results.update(tqdm(arriving, what, len(items), disable=None, leave=False))
        return [results[i] for i in range(len(items))]

    def close(self) -> None:
        self.pool.close()
        super().close()
