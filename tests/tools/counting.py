"""What the tests of engines let them do: rows of numbers, exchanged by their remainder, sorted and written."""

import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa

from thriftlab.data.errors import DataError

ROWS = pa.schema([("part", pa.int32()), ("number", pa.int64()), ("text", pa.string())])


def double(number):
    return 2 * number


def rows(pieces, parts, piece):
    """The rows of one of `pieces`, lists of numbers; a number goes to the part of its remainder."""
    numbers = np.array(pieces[piece], np.int64)
    texts = [f"{number:o}" * (number % 7) for number in numbers.tolist()]
    return pa.table([(numbers % parts).astype(np.int32), numbers, texts], schema=ROWS)


def write(folder, part, table):
    """A sorting reducer: what it writes depends on the set of rows alone."""
    numbers, texts = table["number"].to_numpy(), table["text"].to_pylist()
    assert (table["part"].to_numpy() == part).all()
    lines = [f"{numbers[i]} {texts[i]}\n" for i in np.argsort(numbers, kind="stable")]
    temporary = folder / f".{part}.{os.getpid()}"
    temporary.write_text("".join(lines))
    temporary.rename(folder / f"{part}.txt")


def killed_at(f, at, marks, item, *rest):
    """f, but the worker is killed at the item `at`; once, if `marks` is a folder."""
    mark = marks and Path(marks) / f"{f.func.__name__ if hasattr(f, 'func') else f.__name__}-{at}"
    if item == at and not (mark and mark.exists()):
        if mark:
            mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f(item, *rest)


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def fail(number):
    raise DataError(f"document {number} is bad; mend it") if number == 1 else KeyError(number)
