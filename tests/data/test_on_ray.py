"""The engine on Ray does what the others do, whatever is killed; also where a node is lost."""

import os
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tools import counting
from tests.tools.counting import check_exchange, contents, double, killed_at
from thriftlab.data.errors import DataError, EngineError
from thriftlab.data.prepare.engines.base import open_engine, versions

pytestmark = pytest.mark.slow

NEEDED = os.environ.get("THRIFTLAB_NEEDS_RAY") == "1"  # then a machine without Ray is a failure
PIECES = st.lists(st.lists(st.integers(0, 30), max_size=8), max_size=4)
VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")


@pytest.fixture(scope="module", autouse=True)
def ray():
    try:
        import ray
    except ModuleNotFoundError:
        (pytest.fail if NEEDED else pytest.skip)("no ray here: pip install 'thriftlab[cluster]'")
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        yield ray


@pytest.fixture(scope="module")
def engine(ray, tmp_path_factory):
    """Two workers, whose store holds less than a third of what the largest exchange moves."""
    from thriftlab.data.prepare.engines import on_ray

    spool = tmp_path_factory.mktemp("spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_ray, "STORE", 50 << 20)
        with open_engine("ray", 2, spool) as engine:
            yield engine
    assert not (spool / "exchange").exists() and not any(folder.exists() for folder in engine.folders)
    assert not (Path.home() / ".ray").exists()


@given(pieces=PIECES, parts=st.integers(1, 4), data=st.data())
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
def test_ray_does_what_plain_python_does(engine, tmp_path_factory, pieces, parts, data):
    wanted = data.draw(st.lists(st.integers(0, parts - 1), unique=True))
    check_exchange(engine, tmp_path_factory.mktemp("ray") / "out", pieces, parts, wanted)
    assert engine.each(double, wanted, "double") == [2 * part for part in wanted]


@pytest.mark.parametrize("verb", ["each", "mapper", "reducer"])
def test_a_killed_worker_changes_nothing(engine, tmp_path, verb):
    around = lambda f: partial(killed_at, f, 2, tmp_path / "tries", 1)  # noqa: E731
    if verb == "each":
        assert engine.each(around(double), range(5), "double") == [0, 2, 4, 6, 8]
    else:
        check_exchange(engine, tmp_path / "out", **{verb: around})
    assert (tmp_path / "tries").read_text() == ".."


def test_a_piece_that_kills_every_worker_is_named(engine, tmp_path):
    around = lambda f: partial(killed_at, f, 2, tmp_path / "tries", 99)  # noqa: E731
    said = r"^count, piece 2: its worker was killed 4 times \(WorkerCrashedError\); .*\Z"
    with pytest.raises(EngineError, match=said):
        check_exchange(engine, tmp_path / "out", mapper=around)
    assert (tmp_path / "tries").read_text() == "...."


def test_an_error_reaches_the_caller(engine, tmp_path):
    for f in (lambda: engine.each(counting.fail, [1], "fail"),
              lambda: check_exchange(engine, tmp_path / "map", mapper=lambda f: counting.fail),
              lambda: check_exchange(engine, tmp_path / "reduce", reducer=lambda f: counting.fail_part)):  # fmt: skip
        with pytest.raises(DataError) as raised:
            f()
        assert type(raised.value) is DataError and raised.value.args == ("document 1 is bad; mend it",)
    with pytest.raises(KeyError, match="^7") as raised:
        engine.each(counting.fail, [7], "fail")
    assert type(raised.value) is KeyError and "in fail" in raised.value.__notes__[0]


def test_a_worker_has_one_thread_and_this_python(engine):
    [(variables, threads, modules, pid)] = engine.each(counting.surroundings, [0])
    assert variables["OMP_NUM_THREADS"] == variables["RAYON_NUM_THREADS"] == "1" and threads == 1
    assert "torch" not in modules and pid != os.getpid()
    assert variables["PYTHONPATH"].split(os.pathsep) == [folder for folder in sys.path if folder]
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0" and engine.workers == 2


def test_a_node_with_another_python_is_refused(engine, monkeypatch):
    monkeypatch.setattr("thriftlab.data.prepare.engines.on_ray.versions", lambda: {**versions(), "unicode": "16.0.0"})
    with pytest.raises(EngineError, match="node .* and the first process .*16.0.0.*; use one environment on all nodes"):
        engine.each(double, [1])


def test_too_many_objects_are_refused(engine):
    with pytest.raises(EngineError, match="^near: 1,000 pieces x 201 parts are more than the 200,000 objects"):
        engine.exchange(abs, 1000, abs, range(201), counting.ROWS, "near")


def test_what_the_store_cannot_hold_is_spilled(engine, tmp_path):
    mapper = partial(counting.wide_rows, 8, 40 << 20)  # 8 x 40 MB through a store of 100 MB
    out, sizes = tmp_path / "out", tmp_path / "sizes"
    for folder in (out, sizes):
        folder.mkdir()
    reducer = partial(counting.with_size, partial(counting.count_rows, out), engine.folders[0], sizes)
    engine.exchange(mapper, 8, reducer, range(8), counting.ROWS, "spill")
    assert sum(int(text.split()[0]) for text in contents(out).values()) == 8 * ((40 << 20) // 1000)
    assert max(map(int, contents(sizes).values())) > 100 << 20
