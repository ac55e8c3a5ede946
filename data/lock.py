"""One folder has one writer: a lock on a file `.lock` in it, which the kernel drops when its holders have ended.

The lock is `flock`, so children that inherit the file hold it too, and a process that was killed never does. It is seen
by all processes of a machine, and by other machines on NFS (since Linux 2.6.12; after a crash of a client only when the
server gives it up, about 90 s for NFS 4), CephFS, and Lustre mounted with `flock`. BeeGFS and GPFS may keep it to one
machine, as they are set up. Where there are no locks at all a warning says so, and the work goes on.
"""

import fcntl
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thriftlab.data.errors import UserError
from thriftlab.data.files import make_folder, writing

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Holds the folder, which is made if missing; yields the lock as a file descriptor, for children to inherit.

    UserError where another process holds it, with the name of that process and of its machine.
    """
    folder = Path(folder)
    make_folder(folder)
    path = folder / LOCK
    with writing(path):
        file = open(path, "a+b")  # not `with`: NFS locks only what is open for writing, and closing is what unlocks
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal(path)) from None
        except OSError as error:
            warn_of_no_locks(folder, error)
        with writing(path):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), (json.dumps(myself()) + "\n").encode())
        yield file.fileno()
    finally:
        file.close()


def warn_of_no_locks(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder}: its file system has no locks ({error.strerror}), so nothing keeps a second process from "
        "writing here; see to it that there is one",
        RuntimeWarning,
        stacklevel=4,
    )


def myself() -> dict[str, str | int]:
    """What the lock says of its holder; `parent` tells later whether a launcher has left it behind."""
    return {"host": platform.node(), "process": os.getpid(), "parent": os.getppid()}


def refusal(path: Path) -> str:
    """Who holds the lock, and what to do."""
    holder = said(path)
    host, process = holder.get("host"), holder.get("process")
    place, kill = f" on {host}" if host else "", "stop it"
    who = f"process {process}{place}" if process else "another process"
    if host == platform.node():
        open_in = processes_with(path)
        if process in open_in and parent_of(process) != holder.get("parent"):
            who += " (its parent is gone: perhaps a launcher that was killed left it behind)"
            kill = f"end it with `kill {process}`"
        elif open_in and process not in open_in:
            numbers = " ".join(map(str, open_in))
            who = f"process {numbers}{place}, left behind by process {process}, which is gone,"
            kill = f"end it with `kill {numbers}`"
    return (
        f"{who} is at work in {path.parent}, and a folder has one writer; wait until it is done or {kill}, then start "
        "again"
    )


def said(path: Path) -> dict[str, object]:
    """What the lock says; nothing where its holder has not written it yet."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def processes_with(path: Path) -> list[int]:
    """The processes of this machine that have a file open, but for this one, as far as one may see."""
    found, wanted = [], path.stat()
    for process in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with suppress(OSError):  # it has ended, or is somebody else's
            files = [os.path.join("/proc", process, "fd", number) for number in os.listdir(f"/proc/{process}/fd")]
            if any(is_file(file, wanted) for file in files) and int(process) != os.getpid():
                found.append(int(process))
    return sorted(found)


def is_file(link: str, wanted: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(link), wanted)
    except OSError:  # closed meanwhile
        return False


def parent_of(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
