"""A folder that appears whole or not at all, whoever is killed when, and however many make it at once.

The work is done in a hidden folder beside the target, locked by `flock` on the folder itself; what is finished is
renamed at the end. The kernel drops the lock of a killed process, so nothing has to guess whether an old folder is in
use. Surprise: a lock follows a folder through its renaming, so who waited for it may hold the finished folder and has
to look again.

The lock of a folder is one of this machine: NFS and Lustre hand on the locks of files alone, which must be open for
writing besides. Two machines that make the same folder at once are kept apart by nothing. Where a file system refuses
the lock, a warning says so, and the work goes on.
"""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from thriftlab.data.lock import warn_of_no_locks


@contextmanager
def workspace(target: Path, resumed: bool = False) -> Iterator[Path]:
    """Yields a folder for what will be `target`, alone; waits for another process that has it.

    `install` makes it, or a folder in it, the target. It is empty, and removed at the end. If it is `resumed` it holds
    what an earlier attempt left, and is removed only if the body ends well or leaves nothing in it. Where the target is
    a link, the folder lies where the link leads.
    """
    target = _resolved(target)
    work, old = target.with_name(f".{target.name}.partial"), _old(target)
    with _locked(work) as lock:
        done = not resumed
        try:
            if old.exists() and not target.exists():  # killed between two renames of `check_place` or `install`
                old.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            if not resumed:
                empty(work)
            yield work
            done = True
        finally:
            if (done or not any(work.iterdir())) and _is_open(work, lock):
                shutil.rmtree(work)


def check_place(target: Path) -> None:
    """Raises OSError if `install` could not replace what is there, as a mount point. Call it within the workspace."""
    target = _resolved(target)
    if target.exists():
        target.rename(_old(target))
        _old(target).rename(target)


def install(work: Path, target: Path) -> None:
    """Renames the workspace, or a folder in it, to the target, replacing what is there."""
    target = _resolved(target)
    if target.exists() and any(target.iterdir()):
        target.rename(_old(target))
    work.rename(target)
    shutil.rmtree(_old(target), ignore_errors=True)


def _resolved(target: Path) -> Path:
    try:
        target = target.resolve()
    except RuntimeError:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target)) from None
    if not target.name:
        raise OSError(errno.EBUSY, "it is the root of a file system", str(target))
    return target


def _old(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


@contextmanager
def _locked(work: Path) -> Iterator[int]:
    lock = _lock(work)
    try:
        yield lock
    finally:
        os.close(lock)


def _lock(work: Path) -> int:
    work.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(FileExistsError):  # not `exist_ok`, which fails where another process renames it just then
            work.mkdir()
        try:
            lock = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # renamed since by who had it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{work}: another process is at work here; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            warn_of_no_locks(work.parent, error)
        if _is_open(work, lock):
            return lock
        os.close(lock)


def _is_open(path: Path, descriptor: int) -> bool:
    """Whether the path still names the folder that the descriptor has open."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
