"""Checkpoints: whole or not there, every flipped bit found, every tensor back bit for bit."""

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.tools import gang
from tests.tools.dying import die_after
from thriftlab.data.errors import CheckpointError
from thriftlab.train.checkpoints import writer as writing
from thriftlab.train.checkpoints.codec import from_json, to_json
from thriftlab.train.checkpoints.reader import fault, latest, load
from thriftlab.train.checkpoints.writer import Writer

STATE = {"model": {"w": torch.arange(12.0).reshape(3, 4)}, "optim": {"w/step": torch.tensor(3.0)}}


def saved(folder: Path, steps=(1,), keep=9, tensors=STATE) -> Path:
    writer = Writer(folder, keep=keep, background=False)
    for step in steps:
        writer.save(step, tensors, {"seconds": 0.1 * step})
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


# --------------------------------------------------------------------------------------------------------- contents


@pytest.mark.parametrize("background", [False, True])
def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path, background):
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors = {
        "scalar": torch.tensor(3.25),
        "bf16": base.bfloat16(),
        "fp16": base.half(),
        "fp64": base.double() / 3,
        "bool": base > 0,
        "int64": torch.tensor([2**62 + 1, -1]),
        "uint8": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, 4, dtype=torch.int32),
        "odd": odd,
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "slice of one buffer": base.view(-1)[3:7],
        "parameter": torch.nn.Parameter(base + 1),
    }
    writer = Writer(tmp_path, keep=2, background=background)
    writer.save(7, {"model": tensors, "nothing": {}}, {})
    writer.wait()
    found = latest(tmp_path)
    assert found.step == 7 and found.tensors["nothing"] == {}
    assert found.tensors["model"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found.tensors["model"][name], tensor), name


def test_meta_comes_back_equal(tmp_path):
    meta = {
        "step": 3,
        "floats": [0.1, 1e-323, -0.0, 1.7976931348623157e308, float("inf"), float("-inf")],
        "betas": (0.9, (0.999, [True, None])),
        "dtype": torch.bfloat16,
        "big": 2**80,
        "text": 'é"\n',
    }
    Writer(tmp_path, keep=1, background=False).save(1, {}, {"it": meta, "nan": float("nan")})
    found = latest(tmp_path).meta
    assert found["it"] == meta and repr(found["it"]) == repr(meta) and found["nan"] != found["nan"]


def test_what_json_cannot_hold_is_refused_by_its_name():
    with pytest.raises(CheckpointError, match=r"meta\.groups\[1\]\.order is"):
        to_json({"groups": [1, {"order": print}]})
    with pytest.raises(CheckpointError, match="meta.a"):
        to_json({"a": {1: 2}})
    assert from_json(to_json({})) == {}


def test_tied_weights_are_refused_by_name(tmp_path):
    weight = torch.ones(3)
    with pytest.raises(CheckpointError, match="'embed' and 'head' share memory"):
        Writer(tmp_path, keep=1).save(1, {"model": {"embed": weight, "head": weight}}, {})


def test_the_background_writes_what_was_there_at_save(tmp_path):
    weight = torch.zeros(1000)
    writer = Writer(tmp_path, keep=5)
    for step in range(4):
        weight.fill_(step)
        writer.save(step, {"model": {"w": weight}}, {})
        weight.fill_(-1)
    writer.wait()
    for step in range(4):
        assert (load(tmp_path / f"step-{step:08d}").tensors["model"]["w"] == step).all()


# ----------------------------------------------------------------------------------------------------------- folder


def test_keeps_the_newest(tmp_path):
    assert names(saved(tmp_path, [1, 2, 30, 4_000_000_000], keep=2)) == ["step-00000030", "step-4000000000"]
    assert latest(tmp_path).step == 4_000_000_000


def test_a_broken_newer_one_does_not_push_out_the_good_one(tmp_path):
    saved(tmp_path, [1, 9])
    (tmp_path / "step-00000009" / "state.json").write_text("")
    saved(tmp_path, [5], keep=1)
    with pytest.warns(RuntimeWarning):
        assert latest(tmp_path).step == 5
    saved(tmp_path, [9], keep=1)
    assert names(tmp_path) == ["step-00000009"] and latest(tmp_path).step == 9


def test_a_step_that_is_there_is_left_alone(tmp_path):
    before = {path: path.stat().st_ino for path in (saved(tmp_path) / "step-00000001").iterdir()}
    saved(tmp_path)
    assert before == {path: path.stat().st_ino for path in (tmp_path / "step-00000001").iterdir()}


def test_leftovers_of_the_dead_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for owner in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".step-00000001.{owner}.tmp").mkdir()
    Writer(tmp_path, keep=1)
    assert names(tmp_path) == [f".step-00000001.{os.getppid()}.tmp"]
    assert latest(tmp_path) is None


def test_nothing_there_is_none(tmp_path):
    assert latest(tmp_path) is None and latest(tmp_path / "missing") is None


def test_everyone_may_read_what_the_umask_allows(tmp_path):
    modes = {path.stat().st_mode for path in (saved(tmp_path) / "step-00000001").iterdir()}
    assert len(modes) == 1


# ----------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "checksums.json"])
def test_any_flipped_bit_is_found(tmp_path, name):
    path = saved(tmp_path) / "step-00000001" / name
    content = path.read_bytes()
    draw = random.Random(name)
    for _ in range(200):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        assert name in fault(path.parent)
    path.write_bytes(content)
    assert fault(path.parent) is None


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["truncate", "empty", "longer", "missing", "folder"])
def test_a_torn_one_is_passed_over_with_a_warning_that_says_so(tmp_path, name, damage):
    path = saved(tmp_path, [1, 2]) / "step-00000002" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"truncate": content[:-1], "empty": b"", "longer": content + b"\0"}[damage])
    with pytest.warns(RuntimeWarning, match=f"(?s)step-00000002 is broken.*{name}.*going on from.*step-00000001"):
        assert latest(tmp_path).step == 1
    sizes = f"bytes instead of {len(content)}" if name != "checksums.json" else ""
    why = {"truncate": sizes, "empty": sizes, "longer": sizes, "missing": f"{name} is missing"}.get(damage, "")
    with pytest.raises(CheckpointError, match=f"step-00000002 is broken.*{why}"):
        load(path.parent)


def test_a_renamed_one_is_found(tmp_path):
    (saved(tmp_path) / "step-00000001").rename(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError, match="it holds step 1"):
        load(tmp_path / "step-00000005")


def test_all_broken_is_an_error_not_a_fresh_start(tmp_path):
    for path in saved(tmp_path, [1, 2]).glob("*/state.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole .*state.json is missing.*to start anew"):
        latest(tmp_path)


# ------------------------------------------------------------------------------------------------- failures and kills


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_is_reported_and_loses_nothing(tmp_path, background):
    writer = Writer(tmp_path, keep=1, background=background)
    writer.save(1, STATE, {})
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(CheckpointError, match="step 2 could not be written.*untouched.*make room"):
            writer.save(2, {"model": {"w": torch.zeros(10_000)}}, {})
            writer.save(3, STATE, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"] and latest(tmp_path).step == 1
    writer.save(3, STATE, {})
    writer.wait()
    assert names(tmp_path) == ["step-00000003"]


def test_any_error_of_the_thread_surfaces_once(tmp_path, monkeypatch):
    writer = Writer(tmp_path, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(writing, "save_file", lambda *_: 1 / 0)
        writer.save(1, STATE, {})
        with pytest.raises(ZeroDivisionError):
            writer.wait()
    writer.save(1, STATE, {})
    writer.wait()
    assert latest(tmp_path).step == 1


def save_until_killed(folder, background, changes):
    found = latest(folder)
    die_after(changes)
    writer = Writer(folder, keep=1, background=background)
    for step in itertools.count(found.step + 1 if found else 1):
        tensors = {f"w{i}": torch.full((300, 100), float(step)) for i in range(3)}
        writer.save(step, {"model": tensors, "optim": {"s": torch.full((5,), step)}}, {"seconds": step / 7})


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, background):
    draw, last = random.Random(0), 0
    for _ in range(16):
        process, _ = gang.start(save_until_killed, tmp_path, background, draw.randint(1, 40))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a kill tears nothing: there is never something broken to warn about
            found = latest(tmp_path)
        assert all(fault(path) is None for path in tmp_path.glob("step-*"))
        if found is None:
            continue
        step = found.step
        assert step >= last and found.meta == {"seconds": step / 7}
        assert all((tensor == step).all() for group in found.tensors.values() for tensor in group.values())
        last = step
    assert last > 5
    Writer(tmp_path, keep=1)
    assert len(names(tmp_path)) <= 2 and not list(tmp_path.glob(".*"))


def test_checksums_are_readable(tmp_path):
    sums = json.loads((saved(tmp_path) / "step-00000001" / "checksums.json").read_text())
    assert sums["files"].keys() == {"model.safetensors", "optim.safetensors", "state.json"}
