"""The engine on Ray: map tasks leave one object for each part, which Ray moves, spills and makes again if it is lost.

It starts a Ray of its own on this machine, or joins the one that RAY_ADDRESS names. Two surprises: a reducer waits for
its objects before it is given a core, so that maps which have to run again find one; and what keeps the number of
objects small is the memory of this process, 6 kB for each.
"""

import hashlib
import itertools
import logging
import os
import pickle
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from thriftlab.data.cores import usable_cores
from thriftlab.data.errors import EngineError, UserError
from thriftlab.data.files import make_folder
from thriftlab.data.prepare.engines.exchange import Mapper, Reducer, split, versions
from thriftlab.data.prepare.engines.workers import ONE_THREAD, TRIES, loaded, poisonous

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ModuleNotFoundError as error:
    raise EngineError(f"engine=ray needs the package {error.name}: pip install 'thriftlab[cluster]'") from None

STORE = 256 << 20  # bytes of objects in memory for each worker; the rest waits on the disk
TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once
OBJECTS = 200_000  # of one exchange
WAVE = 4  # tasks submitted for each worker: one hundred thousand that wait would stall the scheduler (ray issue 25412)
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_task_oom_retries": str(TRIES - 1), "RAY_IGNORE_UNHANDLED_ERRORS": "1"}


class OnRay:
    def __init__(self, workers: int | None, spool: Path) -> None:
        self.folders: list[Path] = []
        os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
        own = {} if "RAY_ADDRESS" in os.environ else self._on_this_machine(workers or usable_cores(), spool)
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **ONE_THREAD}
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": environment},
            **own,
        )
        self.workers = workers or int(ray.cluster_resources().get("CPU", 1))

    def _on_this_machine(self, workers: int, spool: Path) -> dict[str, Any]:
        """How a Ray of its own is started. Its folders have fixed names, so those of a run that was killed go."""
        spilled = spool.absolute() / "exchange"
        name = hashlib.sha256(f"{os.getuid()} {spilled}".encode()).hexdigest()[:8]
        self.folders = [spilled, Path(f"/tmp/ray-{name}")]  # short: the path of a socket has 107 bytes at most
        self._remove_folders()
        make_folder(spilled)
        os.environ.setdefault("RAY_AUTH_TOKEN", TOKEN)  # else Ray leaves one in the home folder
        return {
            "num_cpus": workers,
            "object_store_memory": STORE * workers,
            "object_spilling_directory": str(spilled),
            "include_dashboard": False,
            "_temp_dir": str(self.folders[1]),
        }

    def each(self, f: Callable[[Any], Any], items: Sequence[Any], what: str = "") -> list[Any]:
        code = ray.put(pickle.dumps(f))
        return self._all(lambda item: of_item.remote(versions(), code, item), items, what)

    def exchange(
        self, mapper: Mapper, pieces: int, reducer: Reducer, parts: Sequence[int], schema: pa.Schema, what: str = ""
    ) -> None:
        parts = [*parts]
        if not parts:
            return
        if pieces * len(parts) > OBJECTS:
            raise EngineError(
                f"{what}: {pieces:,} pieces x {len(parts):,} parts are more than the {OBJECTS:,} objects that "
                "engine=ray can hold; prepare fewer sources at a time, or use engine=processes"
            )
        code = ray.put(pickle.dumps(mapper))
        made: dict[int, list[Any]] = {}  # piece -> an object for each part

        def map_piece(piece: int) -> Any:
            *made[piece], end = of_piece.options(num_returns=len(parts) + 1).remote(
                versions(), code, piece, parts, schema
            )
            return end

        self._all(map_piece, range(pieces), f"{what}, piece")
        code = ray.put(pickle.dumps(reducer))

        def reduce_part(k: int) -> Any:
            batches = [made[piece][k] for piece in range(pieces)]
            return of_part.remote(versions(), code, parts[k], schema, *batches)

        self._all(reduce_part, range(len(parts)), f"{what}, part", parts)

    def _all(
        self, start: Callable[[Any], Any], items: Sequence[Any], what: str, names: Sequence[Any] | None = None
    ) -> list[Any]:
        """The results of tasks, started a wave at a time."""
        results: list[Any] = [None] * len(items)
        running: dict[Any, int] = {}
        waiting = iter(range(len(items)))
        with tqdm(total=len(items), desc=what, disable=None, leave=False) as bar:
            while True:
                for i in itertools.islice(waiting, WAVE * self.workers - len(running)):
                    running[start(items[i])] = i
                if not running:
                    return results
                for ref in ray.wait([*running], fetch_local=False)[0]:
                    i = running.pop(ref)
                    results[i] = result(ref, what, (names or items)[i])
                    bar.update()

    def close(self) -> None:
        ray.shutdown()
        self._remove_folders()

    def _remove_folders(self) -> None:
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)


def result(ref: Any, what: str, item: object) -> Any:
    """Of a task that has ended. Its own exception; EngineError if its worker was killed each time."""
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, UserError):
            cause.add_note(f"in a worker:\n{error}")
        raise cause from None
    except RayError as error:
        raise poisonous(what, item, type(error).__name__) from None


# --------------------------------------------------------------------------------------------------------- in a worker


task: Any = ray.remote(max_retries=TRIES - 1)


def refuse_other(wanted: dict[str, str]) -> None:
    if (own := versions()) != wanted:
        raise EngineError(
            f"node {os.uname().nodename} has {own} and the first process {wanted}; use one environment on all nodes"
        )


@task
def of_item(wanted: dict[str, str], code: bytes, item: Any) -> Any:
    refuse_other(wanted)
    return loaded(code)(item)


@task
def of_piece(
    wanted: dict[str, str], code: bytes, piece: int, parts: Sequence[int], schema: pa.Schema
) -> Iterator[pa.RecordBatch | None]:
    """An object for each part, and one that says how it ended."""
    refuse_other(wanted)
    yield from split(loaded(code)(piece), parts, schema)
    yield None


@task
def of_part(wanted: dict[str, str], code: bytes, part: int, schema: pa.Schema, *batches: pa.RecordBatch) -> None:
    refuse_other(wanted)
    loaded(code)(part, pa.Table.from_batches(batches, schema))
