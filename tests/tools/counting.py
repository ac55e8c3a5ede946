"""What the tests of engines let them do: rows of numbers, exchanged by their remainder, sorted and written."""

import os
import resource
import signal
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np
import pyarrow as pa

from thriftlab.data.errors import DataError

ROWS = pa.schema([("part", pa.int32()), ("number", pa.int64()), ("text", pa.string())])


def double(number):
    return 2 * number


def rows(pieces, parts, piece):
    """The rows of one of `pieces`, lists of numbers; a number goes to the part of its remainder."""
    numbers = np.array(pieces[piece], np.int64)
    return pa.table([(numbers % parts).astype(np.int32), numbers, [text(n) for n in numbers.tolist()]], schema=ROWS)


def text(number):
    return f"{number:o}" * (number % 7)


def write(folder, part, table):
    """Sorts, so that what it writes depends on the set of rows alone."""
    numbers, texts = table["number"].to_numpy(), table["text"].to_pylist()
    assert (table["part"].to_numpy() == part).all()
    lines = [f"{numbers[i]} {texts[i]}\n" for i in np.argsort(numbers, kind="stable")]
    temporary = folder / f".{part}.{os.getpid()}"
    temporary.write_text("".join(lines))
    temporary.rename(folder / f"{part}.txt")


def expected(pieces, parts, wanted):
    """What `write` leaves of the parts that are wanted, in plain Python."""
    numbers = sorted(number for piece in pieces for number in piece)
    lines = {part: [f"{n} {text(n)}\n" for n in numbers if n % parts == part] for part in wanted}
    return {f"{part}.txt": "".join(lines[part]) for part in wanted}


def contents(folder):
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def killed_at(f, at, tries, times, item, *rest):
    """f, but the first `times` workers that come to the item `at` are killed; each try adds a byte to the file."""
    if item == at:
        with tries.open("a") as file:
            file.write(".")
        if tries.stat().st_size <= times:
            os.kill(os.getpid(), signal.SIGKILL)
    return f(item, *rest)


def fail(number):
    raise KeyError(7) if number == 7 else DataError("document 1 is bad; mend it")


class Odd(Exception):
    """Cannot be unpickled: its arguments are not those it was made of."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fail_oddly(number):
    raise Odd(number, number + 1)


def wait_in(folder, seconds):
    """Says in the folder which process it is, and stays busy."""
    (folder / str(os.getpid())).touch()
    time.sleep(seconds)


def surroundings(item):
    return dict(os.environ), pa.cpu_count(), sorted(sys.modules), os.getpid()


def peak(item):
    """Bytes that this process has had in memory at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def wide_rows(parts, size, piece, tries=None):
    """`size` bytes of text in a piece, spread over all parts."""
    if tries:
        (tries / f"{piece}-{time.monotonic_ns()}").touch()
    rng = np.random.default_rng(piece)
    numbers = rng.integers(0, 1 << 40, size // 1000)
    return pa.table(
        [(numbers % parts).astype(np.int32), numbers, [f"{n:01000}" for n in numbers.tolist()]], schema=ROWS
    )


def count_rows(folder, part, table):
    table = table.sort_by("number")
    (folder / f"{part}.txt").write_text(f"{len(table)} {sum(table['number'].to_pylist())}")


def with_size(reducer, place, sizes, part, table):
    """The reducer, which first notes how many bytes lie in a place."""
    found = 0
    for path in place.rglob("*"):
        with suppress(FileNotFoundError):  # removed meanwhile
            found += path.stat().st_size if path.is_file() else 0
    (sizes / str(part)).write_text(str(found))
    reducer(part, table)


def once_there(reducer, out, few, gate, part, table):
    """The reducer, which waits for the gate, a file, if a few others have ended."""
    while len(contents(out)) >= few and not gate.exists():
        time.sleep(0.01)
    reducer(part, table)


def check_exchange(
    engine, folder, pieces=((5, 1, 9), (), (7, 7, 3, 12)), parts=5, wanted=None, mapper=None, reducer=None
):
    """An exchange leaves what plain Python says. `mapper`, `reducer`: what stands around those of this file."""
    folder.mkdir()
    wanted = range(parts) if wanted is None else wanted
    count, put = partial(rows, pieces, parts), partial(write, folder)
    mapper, reducer = mapper(count) if mapper else count, reducer(put) if reducer else put
    engine.exchange(mapper, len(pieces), reducer, wanted, ROWS, "count")
    assert contents(folder) == expected(pieces, parts, wanted)


def other_schema(piece):
    return pa.table({"part": pa.array([0], pa.int32())})


def fail_part(part, table):
    if part == 2:
        fail(1)
