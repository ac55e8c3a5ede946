"""A command on another machine over ssh: what it prints passes through, its last words and how it ended are kept.

How the commands of several machines ended is known from the processes themselves, in the order in which they ended,
however soon that was.
"""

import codecs
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import IO, Any

from thriftlab.data.errors import UserError

SSH = ("ssh", "-tt", "-o", "BatchMode=yes")  # -tt: what runs there ends with the connection
POLL = 0.2  # seconds between looks at what was asked meanwhile
DECORATION = re.compile(rb"(Shared )?[Cc]onnection to \S* closed\.?$|[\W_]*$")


class Remote:
    """A running command, in a session of its own, where Ctrl-C does not reach it."""

    def __init__(self, host: str, command: str, ended: "queue.Queue[Remote]"):
        self.host = host
        self.said: list[bytes] = []  # the last line, and before it the last one that names an error
        try:
            self.process = subprocess.Popen(
                [*SSH, host, command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"{host}: {shutil.which(SSH[0]) or SSH[0]} cannot be run: {error.strerror}") from None
        assert self.process.stdout and self.process.stderr
        streams = ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr))
        self.readers = [threading.Thread(target=self.pass_on, args=pair, daemon=True) for pair in streams]
        for thread in (*self.readers, threading.Thread(target=self.wait, args=(ended,), daemon=True)):
            thread.start()

    def pass_on(self, source: IO[bytes], target: Any) -> None:
        """As it comes, and line by line into `said`."""
        rest, decode = b"", codecs.getincrementaldecoder("utf-8")("replace").decode
        while chunk := source.read1(1 << 16):  # type: ignore[attr-defined]
            with suppress(OSError, ValueError):  # nobody reads any more; the machine goes on
                target.write(decode(chunk))
                target.flush()
            *lines, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in lines:
                self.note(line)
        self.note(rest)

    def note(self, line: bytes) -> None:
        line = re.sub(rb"\x1b\[[\d;?]*[A-Za-z]", b"", line).strip()
        if not DECORATION.match(line):
            errors = [old for old in self.said if is_error(old)]
            self.said = [*([line] if is_error(line) else errors[-1:]), line]

    def wait(self, ended: "queue.Queue[Remote]") -> None:
        self.process.wait()
        for reader in self.readers:
            reader.join(POLL)  # a process that it left behind may hold the pipe open
        ended.put(self)

    @property
    def last_words(self) -> str:
        return self.said[0].decode(errors="replace").removeprefix("error: ") if self.said else "it said nothing"


def is_error(line: bytes) -> bool:
    return line.startswith((b"error: ", b"ssh: "))


def run_all(commands: dict[str, str], grace: float, meanwhile: Callable[[], None]) -> Remote | None:
    """Run one command on each host; returns when all have ended, or `grace` seconds after the first failure, with the
    one that failed first. `meanwhile` is called every now and then."""
    if not shutil.which(SSH[0]):
        raise UserError("thriftlab launch needs ssh, and there is none here; install it (Debian: openssh-client)")
    ended: queue.Queue[Remote] = queue.Queue()
    running: list[Remote] = []
    failed, deadline = None, float("inf")
    try:
        for host, command in commands.items():
            running.append(Remote(host, command, ended))
        left = len(running)
        while left and time.monotonic() < deadline:
            meanwhile()
            try:
                remote = ended.get(timeout=POLL)
            except queue.Empty:
                continue
            left -= 1
            if remote.process.returncode and not failed:
                failed, deadline = remote, time.monotonic() + grace
    finally:
        end([remote.process for remote in running], grace)
        for reader in (reader for remote in running for reader in remote.readers):
            reader.join(POLL)
    return failed


def end(processes: Collection[subprocess.Popen], grace: float) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
