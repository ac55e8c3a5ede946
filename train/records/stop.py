"""How a run is asked to stop, and the word it leaves for those who wait for it.

A signal, or a file OUT/STOP, asks; the loop answers at the end of a step, on several GPUs of a later one. OUT/status is
one word: running, preempted, done or failed. A process that was killed leaves "running"; only who watched it knows that
it is gone.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, replace_atomically
from thriftlab.train.backends.environment import read_environment

POLL_SECONDS = 1.0


class Interrupted(UserError):
    """The run was asked to stop, has saved and can go on. `number`: of the signal that asked, None for OUT/STOP.

    `code` is what a shell expects, 128 + number; but 0 after OUT/STOP under torchrun, which would take another one for
    a crash and start the ranks again.
    """

    def __init__(self, out: Path, step: int, number: int | None):
        asked = f", as {out}/STOP asks; without it" if stop_file(out) else ";"
        super().__init__(f"stopped after step {step} and saved in {out}{asked} the same command resumes")
        self.code = 0 if not number and "TORCHELASTIC_RUN_ID" in os.environ else 128 + (number or signal.SIGTERM)


def stop_file(out: Path) -> bool:
    """A file OUT/STOP asks the run to stop, from anywhere, and keeps it from going on."""
    return Path(out, "STOP").exists()


def stop_file_lately(out: Path) -> Callable[[], bool]:
    """The same, looked for once in POLL_SECONDS: on a parallel file system a look may take longer than a step."""
    next_look = -math.inf

    def look() -> bool:
        nonlocal next_look
        if time.monotonic() < next_look:
            return False
        next_look = time.monotonic() + POLL_SECONDS
        return stop_file(out)

    return look


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The numbers of the SIGINTs, SIGTERMs and SIGHUPs that come; a second SIGINT stops at once."""
    received: list[int] = []
    speaks = read_environment().rank == 0

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        if speaks and not received:
            print("\nfinishing this step, then saving; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def status(out: Path, speaks: bool) -> Iterator[None]:
    """Keeps OUT/status true while the body runs. `speaks`: whether this rank writes it."""

    def write(word: str) -> None:
        if speaks:
            replace_atomically(out / "status", f"{word}\n".encode())

    if speaks:
        make_folder(out)
    write("running")
    try:
        yield
    except BaseException as error:
        with suppress(OSError):  # where nothing can be written, the error that says so is the one to be seen
            write("preempted" if isinstance(error, Interrupted) else "failed")
        raise
    write("done")


def correct_status(out: Path) -> None:
    """A finished run was killed between its record and its last word: say it."""
    path = out / "status"
    if path.exists() and path.read_bytes() != b"done\n":
        replace_atomically(path, b"done\n")
