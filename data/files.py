"""Files that survive a crash and betray a flipped bit: durable writing, atomic replacement, sealed JSON.

What keeps a file from being written (a full disk, a quota, a missing right) is one line for the user: WriteError.

A sealed JSON file carries the sha256 of its own canonical text. It is whole only if it equals, byte by byte, what
sealing its parsed content gives; so white space and the digest itself are protected as well as the values.
"""

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from thriftlab.data.errors import UserError

NO_ROOM, NO_RIGHT = "make room there", "choose another folder, or get the right to write there"
REMEDIES = {
    errno.ENOSPC: NO_ROOM,
    errno.EDQUOT: f"{NO_ROOM}, or have the quota raised",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: NO_RIGHT,
    errno.EACCES: NO_RIGHT,
    errno.EPERM: NO_RIGHT,
    errno.ENOTDIR: "a file stands where a folder should be: choose another folder, or move it away",
    errno.EISDIR: "a folder stands where a file should be: move it away",
    errno.ELOOP: "links lead in a circle: choose another folder, or mend them",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class WriteError(UserError, OSError):
    """A file cannot be written; the message says which, why, and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: an OSError of the body is a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(unwritten(error, path)) from error


def unwritten(error: OSError, path: Path | str) -> str:
    """Why `path` cannot be written, and what to do."""
    remedy = REMEDIES.get(error.errno or 0, "choose another folder, or repair this one")
    return (
        f"{path} cannot be written ({error.strerror or error}); {remedy}, and start the same command again: "
        "what is there already stays"
    )


def make_folder(path: Path) -> None:
    """A folder with all its parents, if it is not there, in which something can be written."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def append(file: FileIO, content: bytes) -> None:
    """Write to an unbuffered file, so that nothing is left to be written later, when somebody else may have it."""
    while content:
        content = content[file.write(content) :]


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file's content, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a crash leaves either the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            write_synced(temporary, content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Atomically write readable JSON; nan and inf become null."""
    replace_atomically(Path(path), (json.dumps(finite(value), indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """The same tree with nan and inf as None, which JSON can say."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def printable(name: str | Path) -> str:
    """A file's name for a terminal or JSON: what of it is not UTF-8 is spelled out, as `\\udce9`."""
    return str(name).encode(errors="backslashreplace").decode()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(value: dict[str, Any]) -> bytes:
    """Readable JSON of `value` with its own sha256 as the last key."""
    digest = hashlib.sha256(json.dumps(value, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**value, "sha256": digest}, indent=2, allow_nan=False) + "\n").encode()


def unseal(content: bytes) -> dict[str, Any]:
    """The value that was sealed. Raises ValueError if a single bit differs from what `seal` wrote."""
    try:
        value = json.loads(content)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        value.pop("sha256", None)
        if seal(value) != content:
            raise ValueError("its content does not match its sha256")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value
