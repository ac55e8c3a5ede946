"""Whenever a run is killed, or its disk is full, the files are a state from which the same command goes on."""

import errno
import os
import re

import pytest

from tests.tools.moments import before_each_write, put_back, state_of, states_of
from tests.tools.runs import assert_same, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.train import loop
from thriftlab.train.loop import run

SMALLEST = {
    "model": {"dim": 8, "layers": 1, "heads": 1, "hidden": 8},
    "train": {"batch_size": 2},
    "budget": {"tokens": 4 * 2 * 8},
    "eval": {"every": 2, "tokens": 16},
}
MANNERS = {
    "kept: 1": {"checkpoint": {"every": 2, "keep": 1, "background": False}, "signal": {"name": "linupper"}},
    "kept: 2, in the background": {
        "checkpoint": {"every": 1, "keep": 2, "background": True},
        "budget": {"tokens": 2 * 2 * 8},
        "eval": {"every": 1, "tokens": 16},
    },
}


@pytest.fixture
def small(tiny_data, tmp_path, monkeypatch):
    """A run of four steps; keyword arguments replace the defaults."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here outlives the machine
    monkeypatch.setattr(loop, "provenance", lambda out: dict.fromkeys(("commit", "diff_sha256", "versions", "machine")))

    def small(**sections):
        data = {"sequence_length": 8, "verify": False}
        return tiny_config(tiny_data, tmp_path / "out", data=data, **{**SMALLEST, **sections})

    return small


def end_of(out):
    return traces(out), sorted(path.name for path in out.rglob("*")), (out / "status").read_text()


def assert_same_end(out, end):
    (found, *names), (expected, *others) = end_of(out), end
    assert_same(found, expected)
    assert names == others


@pytest.mark.slow
@pytest.mark.parametrize("manner", MANNERS)
def test_a_kill_at_every_write_leaves_what_the_same_command_ends(small, tmp_path, manner):
    out, config = tmp_path / "out", small(**MANNERS[manner])
    states = states_of(out, lambda: run(config))
    end = end_of(out)
    assert len(states) > 40 and end[-1] == "done\n"
    for state in states:
        put_back(out, state)
        run(config)
        assert_same_end(out, end)


@pytest.mark.slow
def test_a_full_disk_at_any_write_is_one_line_and_the_same_command_goes_on(small, tmp_path):
    out, config, labels = tmp_path / "out", small(**MANNERS["kept: 1"]), []
    with before_each_write(labels.append):
        run(config)
    end = end_of(out)
    assert len(set(labels)) > 15
    for number in sorted({labels.index(label) for label in labels}):
        put_back(out, {})
        left = iter(range(number))

        def write(_, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with before_each_write(write), pytest.raises(UserError) as refused:
            run(config)
        assert refused.value.code == 2
        assert re.fullmatch(rf"[^\n]*{out}[^\n]*No space left on device[^\n]*make room[^\n]*", str(refused.value))
        run(config)
        assert_same_end(out, end)
