"""Which files a path stands for, and what each is read as: every file is found, refused by name, or passed over.

Names decide: suffixes without regard to case, below one of compression. What no reader knows is refused, because a
file that is taken for plain text by mistake trains a model on commas, braces and padding. Linked folders are entered,
each folder once.
"""

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from thriftlab.data.errors import DataError

Format = Literal["text", "jsonl", "json", "parquet"]
SUFFIXES: dict[Format, str] = {
    "text": ".txt .text .md .markdown .rst .adoc .org .tex .html .htm .c .h .cc .cpp .cu .go .java .js .ts .py .rs .sh",
    "jsonl": ".jsonl .ndjson",
    "json": ".json",
    "parquet": ".parquet",
}
FORMATS: dict[str, Format] = {suffix: format for format, known in SUFFIXES.items() for suffix in known.split()}
PACKED = (".gz", ".zst", ".zstd")
MARKER = re.compile(r"_(SUCCESS|FAILURE|(common_)?metadata|temporary|(committed|started)_.*)")  # of Spark and Hadoop

PassOver = Callable[[str, str], None]  # is told the name of a file or folder, and the reason


def say(name: str, reason: str) -> None:
    print(f"{name}: passed over, {reason}", file=sys.stderr)


def files(path: str | Path, pass_over: PassOver = lambda name, reason: None) -> list[Path]:
    """The files of a file or folder, in the order of their names; hidden ones and marker files are passed over."""
    path = Path(path)
    found: list[Path] = []
    entered: dict[tuple[int, int], Path] = {}  # by device and inode
    stack = [(path, frozenset[tuple[int, int]]())]
    while stack:
        entry, above = stack.pop()
        name = entry.relative_to(path).as_posix()
        if entry != path and (reason := _reason(entry.name)):
            pass_over(name, reason)
            continue
        status = _status(entry)
        if stat.S_ISREG(status.st_mode):
            found.append(entry)
            continue
        folder = status.st_dev, status.st_ino
        if folder in above:
            raise DataError(f"{entry}: links to {entered[folder]}, which it lies in: a loop; remove the link")
        if folder in entered:
            pass_over(name, f"the same folder as {entered[folder]}")
            continue
        entered[folder] = entry
        stack += [(entry / each, above | {folder}) for each in sorted(_names(entry), reverse=True)]
    if not found:
        raise DataError(f"{path}: the folder holds no files, but hidden or marker files at most")
    return found


def formats(
    path: Path, given: Format | None = None, pass_over: PassOver = lambda name, reason: None
) -> list[tuple[Path, Format]]:
    """The files of a file or folder, and what each is read as: `given`, or what its name says."""
    return [(file, _format(file, given)) for file in files(path, pass_over)]


def name_below(file: Path, path: Path) -> str:
    """What a file is called in the corpus at `path`, which may be the file itself."""
    return file.name if file == path else file.relative_to(path).as_posix()


def _format(file: Path, given: Format | None) -> Format:
    *_, inner, last = ["", "", *(suffix.lower() for suffix in file.suffixes)]
    packed = last in PACKED
    format = given or FORMATS.get(inner if packed else last)
    if format is None:
        known = ", ".join(f"{name} ({suffixes})" for name, suffixes in SUFFIXES.items())
        raise DataError(
            f"{file}: its suffix is none of those that are read: {known}, all but parquet also as {' '.join(PACKED)}; "
            f"move it out, or say what the files of this input are: format={', '.join(get_args(Format)[:-1])} or "
            f"{get_args(Format)[-1]}"
        )
    if packed and format == "parquet":
        raise DataError(f"{file}: parquet is compressed inside and is not read from a compressed file; unpack it")
    return format


def _reason(name: str) -> str | None:
    """Why a file or folder of this name is passed over."""
    if name.startswith("."):
        return "hidden"
    return "marker file" if MARKER.fullmatch(name) else None


def _status(path: Path) -> os.stat_result:
    """Of a file or a folder; links are followed. DataError for all else."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path}: links to {path.readlink()}, which is not there; remove the link") from None
        raise DataError(f"{path}: no such file or folder") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path}: a pipe, a socket or a device, and only files and folders are read; move it out")
    return status


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
