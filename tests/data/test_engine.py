"""Engines: whoever calls the functions, and whatever is killed, the results are the same."""

from functools import partial

from tests.tools.counting import ROWS, contents, double, rows, write
from thriftlab.data.prepare.engine import open_engine


def exchanged(engine, folder, pieces, parts):
    folder.mkdir()
    mapper = partial(rows, pieces, parts)
    engine.exchange(mapper, len(pieces), partial(write, folder), range(parts), ROWS, "count")
    return contents(folder)


def test_processes_do_what_one_process_does(tmp_path):
    pieces = [[5, 1, 9], [], [7, 7, 3, 12]]
    with open_engine("here", None, tmp_path / "a") as here, open_engine("processes", 2, tmp_path / "b") as processes:
        assert processes.each(double, range(9), "double") == here.each(double, range(9)) == [*range(0, 18, 2)]
        made = exchanged(here, tmp_path / "one", pieces, 5)
        assert made == exchanged(processes, tmp_path / "two", pieces, 5)
        assert set(made) == {f"{part}.txt" for part in range(5)} and made["0.txt"]
    assert not (tmp_path / "a" / "exchange").exists() and not (tmp_path / "b" / "exchange").exists()
