"""A pool of processes that have one item at a time each, so that a worker that is killed names the item it was at.

They are spawned, because numpy, Arrow and torch have threads, which do not survive a fork. A worker is killed with its
parent: by the kernel on Linux, elsewhere when it is done with its item. The surprise: Linux means the thread that
started the worker, so a pool belongs to one thread.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from thriftlab.data.errors import EngineError, UserError

TRIES = 4  # of an item whose worker is killed
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Pool:
    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.idle: list[Worker] = []
        self.busy: dict[Connection, tuple[Worker, int]] = {}  # with the number of its item

    def results(self, f: Callable[[Any], Any], items: Sequence[Any], what: str) -> Iterator[tuple[int, Any]]:
        """(i, f(items[i])) as they come. What `f` raises comes out of here; EngineError if an item kills workers."""
        code = pickle.dumps(f)
        waiting, killed = deque(range(len(items))), Counter[int]()
        busy = self.busy
        try:
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    worker = self.idle.pop() if self.idle else Worker()
                    busy[worker.pipe] = worker, waiting[0]
                    worker.give(code, items[waiting.popleft()])
                for pipe in wait([*busy]):
                    assert isinstance(pipe, Connection)
                    worker, i = busy.pop(pipe)
                    try:
                        done, result = worker.answer()
                    except WorkerKilled as error:
                        killed[i] += 1
                        if killed[i] == TRIES:
                            raise poisonous(what, items[i], str(error)) from None
                        warnings.warn(f"{what} {items[i]}: its worker was killed ({error}); again", RuntimeWarning, 2)
                        waiting.append(i)
                        continue
                    self.idle.append(worker)
                    if not done:
                        raise result
                    yield i, result
        finally:
            self.end_busy()

    def end_busy(self) -> None:
        while self.busy:
            worker, _ = self.busy.popitem()[1]
            worker.end()

    def close(self) -> None:
        self.end_busy()
        while self.idle:
            self.idle.pop().end()


def poisonous(what: str, item: object, how: str) -> EngineError:
    return EngineError(
        f"{what} {item}: its worker was killed {TRIES} times ({how}); if memory ran out, give more of it or fewer "
        "workers, else leave this part of the input out"
    )


class WorkerKilled(Exception):
    """Says how."""


class Worker:
    """A process, and the pipe to it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, os.getpid()), daemon=True)
        with inherited(ONE_THREAD):
            self.process.start()
        theirs.close()

    def give(self, code: bytes, item: Any) -> None:
        content = pickle.dumps((code, pickle.dumps(item)))
        with suppress(OSError):  # it was killed: `answer` says so
            self.pipe.send_bytes(content)

    def answer(self) -> tuple[bool, Any]:
        """(True, the result) or (False, the exception)."""
        try:
            content = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.end()
            code = self.process.exitcode or 0
            raise WorkerKilled(signal.Signals(-code).name if code < 0 else f"exit code {code}") from None
        return pickle.loads(content)

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


@contextmanager
def inherited(variables: dict[str, str]) -> Iterator[None]:
    """Processes that are started here have these variables, and no Ctrl-C, which is for their parent."""
    before = {name: os.environ.get(name) for name in variables}
    resource_tracker.ensure_running()  # its start would let Ctrl-C through again
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# ---------------------------------------------------------------------------------------------------- in the process


def serve(pipe: Connection, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send_bytes(outcome(*pickle.loads(pipe.recv_bytes())))


def outcome(code: bytes, item: bytes) -> bytes:
    try:
        return pickle.dumps((True, loaded(code)(pickle.loads(item))))
    except Exception as error:
        return pickle.dumps((False, portable(error)))


@lru_cache(maxsize=1)
def loaded(code: bytes) -> Callable[..., Any]:
    return pickle.loads(code)


def portable(error: Exception) -> Exception:
    """The same error for another process, with its traceback if it is a defect."""
    if isinstance(error, UserError):
        return error
    trace = f"in a worker:\n{''.join(traceback.format_exception(error))}"
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(str(error))
    error.add_note(trace)
    return error
