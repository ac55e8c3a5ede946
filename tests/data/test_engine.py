"""Engines: whoever calls the functions, and whatever is killed, the results are the same."""

import os
import pickle
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thriftlab.data
from tests.tools import counting
from tests.tools.counting import check_exchange, contents, double, killed_at
from tests.tools.waiting import PATIENCE, until
from thriftlab.data.cores import usable_cores
from thriftlab.data.errors import DataError, EngineError, UserError
from thriftlab.data.files import WriteError
from thriftlab.data.prepare.engines import workers
from thriftlab.data.prepare.engines.base import open_engine
from thriftlab.data.prepare.engines.exchange import split
from thriftlab.data.prepare.engines.workers import Pool

PIECES = st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=5)


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    spool = tmp_path_factory.mktemp("spool")
    with (
        open_engine("here", None, spool / "1") as here,
        open_engine("processes", 2, spool / "2") as two,
        open_engine("processes", 3, spool / "3") as three,
    ):
        yield {"here": here, "two": two, "three": three}


@pytest.fixture(params=["here", "two"])
def engine(engines, request):
    return engines[request.param]


@pytest.fixture
def two(engines):
    return engines["two"]


@pytest.mark.slow
@given(pieces=PIECES, parts=st.integers(1, 6), data=st.data())
@settings(max_examples=30, deadline=None)
def test_every_engine_does_what_plain_python_does(engines, tmp_path_factory, pieces, parts, data):
    wanted = data.draw(st.lists(st.integers(0, parts - 1), unique=True))
    for name, engine in engines.items():
        check_exchange(engine, tmp_path_factory.mktemp(name) / "out", pieces, parts, wanted)
        assert engine.each(double, wanted, "double") == [2 * part for part in wanted]


@given(pieces=PIECES, parts=st.integers(1, 6), seed=st.integers(0, 99))
def test_each_part_gets_its_rows_in_one_batch_however_the_table_is_cut(pieces, parts, seed):
    tables = [counting.rows(pieces, parts, piece) for piece in np.random.default_rng(seed).permutation(len(pieces))]
    table = pa.concat_tables([counting.ROWS.empty_table(), *tables])
    batches = [*split(table, range(parts), counting.ROWS)]
    assert len(batches) == parts and all(batch.schema == counting.ROWS for batch in batches)
    for part, batch in enumerate(batches):
        wanted = [number for number in table["number"].to_pylist() if number % parts == part]
        assert batch["number"].to_pylist() == wanted and set(batch["part"].to_pylist()) <= {part}


def test_a_mapper_that_gives_another_schema_is_a_defect(engine, tmp_path):
    with pytest.raises(TypeError, match="a mapper gives"):
        engine.exchange(counting.other_schema, 2, partial(counting.write, tmp_path), [0], counting.ROWS)


def test_more_files_than_a_process_may_open(two, tmp_path):
    pieces = [[number] for number in range(1100)]
    check_exchange(two, tmp_path / "out", pieces, 2)


# ------------------------------------------------------------------------------------------------------------ killed


@pytest.mark.slow
@pytest.mark.parametrize("verb, kills", [("each", 3), ("mapper", 1), ("reducer", 1)])
def test_a_killed_worker_changes_nothing(two, tmp_path, verb, kills):
    around = lambda f: partial(killed_at, f, 2, tmp_path / "tries", kills)  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"2: its worker was killed \(SIGKILL\); again"):
        if verb == "each":
            assert two.each(around(double), range(5), "double") == [0, 2, 4, 6, 8]
        else:
            check_exchange(two, tmp_path / "out", **{verb: around})
    assert (tmp_path / "tries").read_text() == "." * (kills + 1)


@pytest.mark.filterwarnings("ignore:.*its worker was killed")
@pytest.mark.parametrize(
    "verb, name, tries", [("each", "double 2", 4), ("mapper", "count, piece 2", 2), ("reducer", "count, part 2", 2)]
)
def test_an_item_that_kills_every_worker_is_named(two, tmp_path, monkeypatch, verb, name, tries):
    monkeypatch.setattr(workers, "TRIES", tries)
    around = lambda f: partial(killed_at, f, 2, tmp_path / "tries", 99)  # noqa: E731
    with pytest.raises(EngineError, match=rf"^{name}: its worker was killed {tries} times \(SIGKILL\); .*\Z"):
        if verb == "each":
            two.each(around(double), range(5), "double")
        else:
            check_exchange(two, tmp_path / "out", **{verb: around})
    assert (tmp_path / "tries").read_text() == "." * tries
    assert two.each(double, range(5)) == [0, 2, 4, 6, 8] and not two.folder.exists()


@pytest.mark.slow
def test_a_worker_that_dies_before_it_starts_is_no_endless_loop(tmp_path):
    """As where a script of one's own has no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom thriftlab.data.prepare.engines.base import open_engine\n"
        f"with open_engine('processes', 2, Path({str(tmp_path)!r})) as engine:\n    engine.each(abs, [1], 'abs')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "abs 1: its worker was killed 4 times (exit code 1)" in done.stderr
    assert "freeze_support" in done.stderr  # Python's own words for the mistake


RUN = """
import sys
from functools import partial
from pathlib import Path
from tests.tools.counting import wait_in
from thriftlab.data.prepare.engines.base import open_engine
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with open_engine("processes", 2, folder / "spool") as engine:
        engine.each(partial(wait_in, folder / "pids"), [3600] * 5, "wait")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, -2)])
def test_no_worker_outlives_its_parent(tmp_path, number, code):
    (tmp_path / "pids").mkdir()
    (tmp_path / "run.py").write_text(RUN)
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.Popen([sys.executable, tmp_path / "run.py", tmp_path], env={**os.environ, "PYTHONPATH": path},
                           start_new_session=True, stderr=subprocess.PIPE, text=True,
                           preexec_fn=heed_ctrl_c)  # fmt: skip
    until(lambda: len(contents(tmp_path / "pids")) == 2, run)
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)  # Ctrl-C goes to all processes of a terminal
    said = run.communicate(timeout=PATIENCE)[1]
    assert run.returncode == code and said.count("Traceback") == (number == signal.SIGINT)
    until(lambda: not any(alive(int(pid)) for pid in contents(tmp_path / "pids")))


def heed_ctrl_c():
    """What a shell starts with `&` ignores it, and so would what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def alive(pid):
    """A process that has ended and whose parent has not noticed counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------------------ errors


def test_an_error_reaches_the_caller(engine, tmp_path):
    with pytest.raises(DataError) as raised:
        engine.each(counting.fail, [1], "fail")
    assert str(raised.value) == "document 1 is bad; mend it" and raised.value.code == 2
    with pytest.raises(KeyError, match="^7"):
        engine.each(counting.fail, [7], "fail")
    with pytest.raises(DataError, match="^document 1 is bad; mend it$"):
        check_exchange(engine, tmp_path / "out", mapper=lambda f: counting.fail)
    assert not engine.folder.exists()


def test_a_defect_keeps_its_traceback(two):
    with pytest.raises(KeyError) as raised:
        two.each(counting.fail, [7], "fail")
    assert "in fail" in raised.value.__notes__[0] and "KeyError: 7" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="^3 and 4") as raised:
        two.each(counting.fail_oddly, [3], "fail")
    assert "in fail_oddly" in raised.value.__notes__[0]


def test_what_is_said_to_the_user_survives_the_way():
    for module in pkgutil.walk_packages(thriftlab.data.__path__, "thriftlab.data."):
        if not module.name.endswith("on_ray"):  # may lack its package
            import_module(module.name)
    kinds, waiting = set(), [UserError]
    while waiting:
        kinds.add(kind := waiting.pop())
        waiting += kind.__subclasses__()
    for kind in kinds:
        if kind.__module__.startswith("thriftlab.data"):
            error = pickle.loads(pickle.dumps(kind("what, where, remedy")))
            assert type(error) is kind and str(error) == "what, where, remedy"
    assert WriteError in kinds


def test_a_full_disk_is_one_line(engine, tmp_path, monkeypatch):
    engine.folder.parent.mkdir(parents=True, exist_ok=True)
    engine.folder.touch()  # where the folder of an exchange would be
    with pytest.raises(WriteError, match="exchange cannot be written"):
        check_exchange(engine, tmp_path / "out")
    engine.folder.unlink()


# --------------------------------------------------------------------------------------------------------- resources


def test_a_worker_has_one_thread_and_imports_what_its_task_needs(two, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    pool = Pool(2)
    try:
        [(_, (variables, threads, modules, pid))] = pool.results(counting.surroundings, [0], "look")
    finally:
        pool.close()
    assert os.environ["OMP_NUM_THREADS"] == "7" and pid != os.getpid()
    assert variables["OMP_NUM_THREADS"] == variables["RAYON_NUM_THREADS"] == "1" and threads == 1
    assert not {"torch", "ray"} & set(modules)


def test_prepare_imports_no_torch():
    code = "import sys, thriftlab.data.prepare.engines.base, thriftlab.data.prepare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pool_is_started_once_and_only_as_large_as_needed(tmp_path):
    with open_engine("processes", 3, tmp_path) as engine:
        first = engine.each(counting.surroundings, [0])[0][-1]
        assert engine.each(counting.surroundings, [0])[0][-1] == first and len(engine.pool.idle) == 1


def test_items_are_handed_out_one_to_a_worker():
    class Items(Sequence):
        asked = set()

        def __len__(self):
            return 2000

        def __getitem__(self, i):
            self.asked.add(i)
            return i

    pool = Pool(2)
    try:
        for done, (i, result) in enumerate(pool.results(double, Items(), "double")):
            assert len(Items.asked) <= done + 3 and result == 2 * i
    finally:
        pool.close()
    assert done == 1999


def test_what_a_dead_run_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "exchange").mkdir()
    (tmp_path / "exchange" / "0.arrow").touch()
    (tmp_path / "mine").touch()
    with open_engine("here", None, tmp_path) as engine:
        assert contents(tmp_path) == {"mine": ""}
        check_exchange(engine, tmp_path / "out")
    assert sorted(contents_of(tmp_path)) == ["mine", "out"]


def contents_of(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.slow
def test_four_times_the_input_needs_no_more_memory(tmp_path):
    peaks = []
    for times in (1, 4):
        with open_engine("processes", 1, tmp_path / "spool") as engine:
            parts, out = 4 * times, tmp_path / f"{times}"
            out.mkdir()
            mapper = partial(counting.wide_rows, parts, 12 << 20)
            engine.exchange(mapper, 4 * times, partial(counting.count_rows, out), range(parts), counting.ROWS)
            peaks += engine.each(counting.peak, [0])
    assert peaks[1] <= 1.2 * peaks[0], peaks
    before, after = (sum(int(text.split()[0]) for text in contents(tmp_path / name).values()) for name in "14")
    assert after == 4 * before


def test_cores_are_those_of_the_quota(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for quota, cores in (("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1)):
        monkeypatch.setattr(Path, "read_text", lambda self, quota=quota: quota)
        assert usable_cores() == cores
