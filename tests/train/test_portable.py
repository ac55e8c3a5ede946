"""A checkpoint saved by any backend and world size is taken up by any other, in the middle of a refresh period, too."""

import functools

import pytest
import torch

from tests.tools import gang
from tests.tools.methods import MAKERS
from tests.tools.scale import alone, batch, distance, make, one_step, weights_of
from thriftlab.data.errors import CheckpointError
from thriftlab.train.backends import make_backend
from thriftlab.train.backends.channel import Channel
from thriftlab.train.backends.pieces import Piece
from thriftlab.train.checkpoints import writer as writing
from thriftlab.train.checkpoints.reader import latest, load
from thriftlab.train.checkpoints.writer import Writer

CASES = [
    "adamw",
    "blocks",
    "columns",
    "galore, project",
    "fira",
    "muon, ember",
    "lion, all",
    "scale",
    "rmnp",
    "adam mini",
    "normuon",
    "stable_spam",
    "subtrack",
    "8bit",
    "frozen+columns",
]
MAKERS = {**MAKERS, "8bit": functools.partial(MAKERS["columns"], state_dtype="8bit")}


def made(name):
    frozen, _, rule = name.rpartition("+")
    return make(MAKERS[rule], frozen="mlp.up" if frozen else None)


def leg(backend_name, folder, first, last, world):
    """Steps first to last of every case, from a checkpoint and into one; `world` ranks' batches in all."""
    backend = make_backend(backend_name)
    channel, ends = backend.channel(), {}
    for name in CASES:
        model, optimizer = made(name)
        backend.prepare(model, optimizer)
        if first:
            found = latest(folder / name, Channel(backend.rank, backend.share))
            assert found.step == first
            backend.load(found.reader("model"), found.reader("optim"), found.meta["optim"])
        mine = range(world)[backend.rank :: backend.world]
        for t in range(first, last):
            one_step(backend, [batch(t, rank, world) for rank in mine])
        groups = {"model": backend.weights(), "optim": backend.states()}
        ours = {group: {k: p for k, p in pieces.items() if backend.saves(k)} for group, pieces in groups.items()}
        writer = Writer(folder / name, keep=1, background=True, channel=channel)
        writer.save(last, ours, {"optim": backend.options()})
        writer.wait()
        ends[name] = {k: w.numpy() for k, w in weights_of(model).items()}
    backend.close()
    return ends


def journey(folder, *stops):
    """(backend, ranks, up to step), one after the other; the weights at the end."""
    first = 0
    for backend, ranks, last in stops:
        if ranks == 1:
            ends = leg(backend, folder, first, last, 2)
        else:
            ends = gang.ranks(ranks, leg, backend, folder, first, last, 2)[0]
        first = last
    return ends


@pytest.mark.slow
def test_any_backend_goes_on_where_another_stopped_bitwise(tmp_path):
    """Two ranks and one process that takes their batches in order add the same numbers in the same order."""
    ends = journey(
        tmp_path, ("ddp", 2, 3), ("owned", 2, 5), ("fsdp2", 2, 6), ("single", 1, 7), ("fsdp2", 2, 8), ("owned", 2, 9),
        ("ddp", 2, 10),
    )  # fmt: skip
    for name in CASES:
        frozen, _, rule = name.rpartition("+")
        assert distance(ends[name], alone(MAKERS[rule], 2, 10, frozen="mlp.up" if frozen else None)[0]) == 0, name


def wide_leg(name, folder, first, last):
    """In fp64."""
    backend = make_backend(name)
    model, optimizer = make(MAKERS["columns"], torch.float64)
    backend.prepare(model, optimizer)
    if first:
        found = latest(folder, Channel(backend.rank, backend.share))
        backend.load(found.reader("model"), found.reader("optim"), found.meta["optim"])
    for t in range(first, last):
        one_step(backend, [batch(t, rank, 12) for rank in range(12)[backend.rank :: backend.world]])
    ours = [{k: p for k, p in of.items() if backend.saves(k)} for of in (backend.weights(), backend.states())]
    writer = Writer(folder, 1, False, backend.channel())
    writer.save(last, {"model": ours[0], "optim": ours[1]}, {"optim": backend.options()})
    ends = {k: w.numpy() for k, w in weights_of(model).items()}
    backend.close()
    return ends


@pytest.mark.slow
@pytest.mark.parametrize("names", [("owned", "owned", "owned"), ("fsdp2", "fsdp2", "owned")], ids="-".join)
def test_other_world_sizes_go_on_up_to_summation_noise(tmp_path, names):
    gang.ranks(3, wide_leg, names[0], tmp_path, 0, 3)
    assert len(list((tmp_path / "step-00000003").glob("optim*.safetensors"))) == 3
    gang.ranks(4, wide_leg, names[1], tmp_path, 3, 6)
    ends = gang.ranks(2, wide_leg, names[2], tmp_path, 6, 8)[0]
    assert distance(ends, alone(MAKERS["columns"], 12, 8, dtype=torch.float64)[0]) < 1e-8


# --------------------------------------------------------------------------------------------- several ranks, one disk


def write(folder, failing=None, missing=False):
    """Each rank writes its half of one tensor; what the writer said."""
    backend = make_backend("ddp")
    rank, said = backend.rank, None
    writer = Writer(folder, keep=1, background=True, channel=backend.channel())
    whole = torch.arange(10.0).view(2, 5)
    half = Piece((2, 5), 5 * rank, whole.view(-1)[5 * rank :][: 4 if missing else 5])
    if rank == failing:
        writing.save_file = lambda *_: (_ for _ in ()).throw(OSError("no space left"))
    try:
        writer.save(1, {"model": {"w": half}, "optim": {}}, {"by": rank})
        writer.wait()
    except CheckpointError as error:
        said = str(error)
    backend.close()
    return said


def test_pieces_of_several_ranks_are_read_as_a_whole_or_in_any_part(tmp_path):
    assert gang.ranks(2, write, tmp_path) == [None, None]
    found = load(tmp_path / "step-00000001")
    reader = found.reader("model")
    assert found.meta == {"by": 0} and found.tensors["optim"] == {}
    assert torch.equal(reader["w"], torch.arange(10.0).view(2, 5))
    for start in range(10):
        for stop in range(start + 1, 11):
            assert torch.equal(reader.read("w", start, stop), torch.arange(10.0)[start:stop])
    with pytest.raises(CheckpointError, match="has no 'v'"):
        reader.read("v")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_on_all(tmp_path, rank):
    for said in gang.ranks(2, write, tmp_path, rank):
        assert "no space left" in said and "untouched" in said
    assert not list(tmp_path.iterdir())


def test_a_hole_between_the_ranks_is_not_saved(tmp_path):
    said, other = gang.ranks(2, write, tmp_path, None, True)
    assert "'w': entries 4 to 5 are held by nobody" in said and "entries 4 to 5" in other
    assert not list(tmp_path.glob("step-*"))


def test_a_flipped_bit_in_any_ranks_file_is_found(tmp_path):
    gang.ranks(2, write, tmp_path)
    path = tmp_path / "step-00000001" / "model.1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.1.safetensors does not match"):
        load(tmp_path / "step-00000001")


def test_an_old_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "FORMAT", 1)
    Writer(tmp_path, 1, background=False).save(1, {"model": {"w": torch.zeros(3)}}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 1, and this thriftlab reads format 2.*another folder"):
        latest(tmp_path)
