"""Whenever a run is killed, or its disk is full, the files are a state from which the same command goes on."""

import errno
import hashlib
import os
import re
import shutil
import warnings

import pytest

from tests.tools import gang
from tests.tools.moments import before_each_write, put_back, state_of, states_of
from tests.tools.runs import assert_same, said, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import UserError
from thriftlab.data.lock import claimed
from thriftlab.train import loop
from thriftlab.train.checkpoints.reader import load
from thriftlab.train.checkpoints.writer import Writer
from thriftlab.train.loop import run
from thriftlab.train.write_reference import ReferenceConfig, write_reference

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
    out, config, names = tmp_path / "out", small(**MANNERS["kept: 1"]), []
    with before_each_write(lambda label: names.append(label.split()[-1])):
        run(config)
    end = end_of(out)
    assert len(set(names)) > 12
    for number in sorted({names.index(name) for name in names}):
        put_back(out, {})
        left = iter(range(number))

        def write(_, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        with before_each_write(write), pytest.raises(UserError) as refused:
            run(config)
        assert refused.value.code == 2
        assert names[number] != "metrics.jsonl" or "metrics.jsonl cannot" in str(refused.value)
        assert re.fullmatch(rf"[^\n]*{out}[^\n]*No space left on device[^\n]*make room[^\n]*", str(refused.value))
        run(config)
        assert_same_end(out, end)


def test_a_second_run_in_the_folder_is_refused_and_writes_nothing(small, tmp_path):
    out, config = tmp_path / "out", small()
    with claimed(out):
        before = state_of(out)
        with pytest.raises(UserError, match=f"process {os.getpid()} .* is at work in {out}"):
            run(config)
        assert state_of(out) == before
    run(config)
    with claimed(out):
        assert run(config)["status"] == "done"  # it has only to be read


@pytest.mark.slow
def test_ranks_share_one_lock_and_one_refusal(small, tmp_path):
    tree = small().model_dump()
    with claimed(tmp_path / "out"):
        first, second = gang.ranks(2, said, tree)
    assert first == second and re.search(f"UserError: process {os.getpid()} .* is at work in", first)
    assert gang.ranks(2, said, tree) == ["done"] * 2


def test_a_checkpoint_keeps_the_lines_it_was_bound_to(small, tmp_path):
    """As earlier versions left it: the checkpoint of the last step is older than the last evaluation of that step."""
    out, config = tmp_path / "out", small()
    run(config)
    end, metrics = end_of(out), out / "metrics.jsonl"
    *lines, evaluation = metrics.read_bytes().splitlines(keepends=True)
    assert b"eval" in evaluation
    kept = hashlib.sha256(b"".join(lines)).hexdigest()
    (newest,) = out.glob("checkpoints/step-00000004")
    found = load(newest)
    tensors = found.tensors
    shutil.rmtree(newest)
    Writer(newest.parent, keep=2, background=False).save(4, tensors, {**found.meta, "history": kept})
    for more in (b"", evaluation, evaluation[:9], evaluation + b"\0" * 9):
        (out / "record.json").unlink(missing_ok=True)
        metrics.write_bytes(b"".join(lines) + more)
        run(config)
        assert_same_end(out, end)


def test_a_full_disk_is_one_line_of_the_reference_too(small, tmp_path):
    out = tmp_path / "reference"
    run(small())
    asked = ReferenceConfig(run=str(tmp_path / "out"), out=str(out))

    def write(label):
        if ".npy" in label:
            raise OSError(errno.ENOSPC, "No space left on device")

    with before_each_write(write), pytest.raises(UserError, match=f"{out}/plain.npy cannot be written .*make room"):
        write_reference(asked)
    with claimed(out), pytest.raises(UserError, match="at work in"):
        write_reference(asked)
    assert write_reference(asked) == out and (out / "reference.json").exists()


@pytest.mark.parametrize("name", ["model.safetensors", None])
def test_losses_of_a_run_whose_last_weights_are_lost_are_refused(small, tmp_path, name):
    """Those of the checkpoint before would be another model's."""
    out, config = tmp_path / "out", small(checkpoint={"every": 2, "keep": 2})
    run(config)
    end, last = end_of(out), out / "checkpoints" / "step-00000004"
    if name:
        content = bytearray((last / name).read_bytes())
        content[-1] ^= 1
        (last / name).write_bytes(content)
    else:
        shutil.rmtree(last)
    asked = ReferenceConfig(run=str(out), out=str(tmp_path / "reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(UserError, match=f"{out}/checkpoints has no whole checkpoint of the last step, 4; remove"):
            write_reference(asked)
        assert not (tmp_path / "reference").exists()
        (out / "record.json").unlink()
        run(config)
    assert_same_end(out, end)
    write_reference(asked)


def test_what_others_put_among_the_checkpoints_is_theirs(small, tmp_path):
    """Copies, editors' files and whatever else: passed over or refused by name, never a trace."""
    out, config = tmp_path / "out", small()
    run(config)
    end = end_of(out)[0]
    theirs = [".step-00000100.backup.tmp",
              ".step-00000100.99999999999999999999.tmp", ".step-1.tmp", "step-00000004.bak",
              "step-4", "step-backup", ".DS_Store", "step-٠٠٠٠٠٠٠٤", "latest"]  # fmt: skip
    for number, name in enumerate(theirs):
        path = out / "checkpoints" / name
        path.mkdir() if number % 2 else path.write_text("")
    (out / "record.json").unlink()
    run(config)
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "record.json").unlink()
    (out / "checkpoints" / "step-00000009").write_text("a file")
    (out / "checkpoints" / "step-00000008").symlink_to("nowhere")
    with pytest.warns(RuntimeWarning, match="step-0000000[89] is broken"):
        run(config)
    assert_same(traces(out, "step-00000004"), end)
