"""A Ray node that is lost in the middle of an exchange: what it held is made again, and the result is the same."""

import threading
from functools import partial
from tempfile import TemporaryDirectory

import pytest

from tests.tools.counting import ROWS, contents, count_rows, once_there, wide_rows
from tests.tools.waiting import until
from thriftlab.data.prepare.engines.base import open_engine

pytestmark = pytest.mark.slow

PIECES, PARTS, SIZE = 6, 12, 6 << 20  # objects of half a MB: what is below 100 kB lies with the first process


@pytest.fixture
def short(monkeypatch):
    """Where Ray puts its sockets, whose paths have 107 bytes at most."""
    with TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


def test_a_node_lost_in_mid_exchange_changes_nothing(short, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="no ray here: pip install 'thriftlab[cluster]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    store = {"object_store_memory": 100 << 20}
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head | store)
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(2)]
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    tries, out, plain = tmp_path / "tries", tmp_path / "out", tmp_path / "plain"
    for folder in (tries, out, plain):
        folder.mkdir()
    lost, done_then = tmp_path / "lost", []

    def lose_a_node():
        until(lambda: len(contents(out)) >= 2)
        cluster.remove_node(nodes[1], allow_graceful=False)
        done_then.append(len(contents(out)))
        lost.touch()

    try:
        with open_engine("ray", None, tmp_path) as engine:
            assert engine.workers == 2
            killer = threading.Thread(target=lose_a_node)
            killer.start()
            mapper = partial(wide_rows, PARTS, SIZE, tries=tries)
            reducer = partial(once_there, partial(count_rows, out), out, 2, lost)
            engine.exchange(mapper, PIECES, reducer, range(PARTS), ROWS, "lost")
            killer.join()
    finally:
        cluster.shutdown()
    assert done_then[0] < PARTS and len(contents(tries)) > PIECES
    with open_engine("here", None, tmp_path) as here:
        here.exchange(partial(wide_rows, PARTS, SIZE), PIECES, partial(count_rows, plain), range(PARTS), ROWS)
    assert contents(out) == contents(plain)
