"""Layer methods in a run: what they keep is saved and taken up, equal on all ranks, and said."""

import contextlib
import json
import os

import pytest
import torch

from tests.fake_cuda.counts import Counts, to_device
from tests.tools import gang
from tests.tools.runs import (
    LAYERWISE,
    LONG,
    NORMAL,
    assert_same,
    ended,
    run_status,
    said,
    saved_buffers,
    stop_at,
    stop_rank,
    traces,
)
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import CheckpointError, ConfigError
from thriftlab.optim import LAYERS, LostLinear, convert
from thriftlab.optim.layers import lost
from thriftlab.train import build, loop
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.config.schema import RunConfig, fingerprint
from thriftlab.train.loop import run
from thriftlab.train.model import GPT, ModelConfig

LOST = {"name": "lost", "rank": 8, "density": 0.1}
INDEX = "layers.1.mlp.down.sp_index"


def other_channels(monkeypatch):
    """From now on a machine that chooses others."""
    plain = LostLinear.load_dense

    def load_dense(self, *arguments):
        plain(self, *arguments)
        self.sp_index.copy_((self.sp_index + 1) % self.in_features)

    monkeypatch.setattr(LostLinear, "load_dense", load_dense)


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("optim", [{"name": "adamw"}, {"name": "fira", "rank": 4, "gap": 7}], ids=lambda o: o["name"])
def test_stopped_and_resumed_is_unbroken_whatever_the_machine_would_choose(tiny_data, tmp_path, monkeypatch, optim):
    whole, broken = (
        tiny_config(tiny_data, tmp_path / name, layer=LOST, optim=optim, **LONG) for name in ("whole", "broken")
    )
    run(whole)
    stop_at(broken, 8)
    kept = saved_buffers(tmp_path / "broken")
    other_channels(monkeypatch)
    run(broken)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))
    for out in ("broken", "whole"):
        last = saved_buffers(tmp_path / out)
        assert last.keys() == kept.keys() and len(kept) == 14
        assert all(torch.equal(last[name], index) and index.dtype == torch.int64 for name, index in kept.items())


@pytest.fixture
def decompositions(monkeypatch):
    """One entry for each SVD of a weight."""
    seen, plain = [], lost.svd
    monkeypatch.setattr(lost, "svd", lambda weight: seen.append(weight.shape) or plain(weight))
    return seen


@pytest.mark.parametrize("damage", [None, "model.safetensors"])
def test_a_run_that_goes_on_decomposes_nothing(tiny_data, tmp_path, decompositions, damage):
    """But where there is nothing to be taken up, it is as it was: the checkpoint before serves."""
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, **LONG)
    stop_at(config, 8)
    assert len(decompositions) == 14
    decompositions.clear()
    if damage:
        (latest(tmp_path / "out" / "checkpoints").path / damage).write_bytes(b"no")
    with pytest.warns(RuntimeWarning, match="is broken") if damage else contextlib.nullcontext():
        entry = run(config)
    assert entry["status"] == "done" and len(decompositions) == (14 if damage else 0)


def filled_on_a_device(name, options):
    with torch.device("meta"):
        model = GPT(ModelConfig(preset=None, dim=16, layers=1, heads=2, hidden=24, vocab_size=17))
        convert(model, LAYERS[name], [r"\.(attn|mlp)\."], **options)
    to_device(model)
    with Counts() as counts:
        model.init_weights(0)
    return counts.counted


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("lost", {"init_gain": "dense"}), ("cola", {"init": "svd"})])
def test_first_weights_are_decomposed_where_the_layer_is(fake_cuda, name, options):
    counted = fake_cuda(filled_on_a_device, name, {"rank": 4, **options})
    assert counted.launches["_linalg_eigh"] == 7, "all layers, none on the CPU"
    assert {place.partition(":")[0] for place in counted.reads if counted.reads[place]} <= {"optim/layers/factored.py"}


@pytest.mark.slow
def test_one_rank_and_two_and_back(tiny_data, tmp_path):
    """Saved by one backend and world size, taken up by another, with other channels before."""
    one, two = (
        tiny_config(tiny_data, tmp_path / "out", layer=LOST, backend=backend, **LONG)
        for backend in ({}, {"name": "deepspeed", "stage": 3})
    )
    run(tiny_config(tiny_data, tmp_path / "whole", layer=LOST, **LONG))
    stop_at(one, 8)
    assert gang.ranks(2, resumed_with_other_channels, two.model_dump(), 13) == [True] * 2
    run(one)
    for ours, theirs in zip(*(traces(tmp_path / name)[2] for name in ("out", "whole")), strict=True):
        assert ours.get("loss") == pytest.approx(theirs.get("loss"), abs=2e-5)
    assert all(torch.equal(saved_buffers(tmp_path / "out")[k], i) for k, i in saved_buffers(tmp_path / "whole").items())


def resumed_with_other_channels(tree, step):
    with pytest.MonkeyPatch.context() as patch:
        other_channels(patch)
        return f"after step {8 + step}" in (stop_rank(tree, step) or "")


def without_buffers(monkeypatch):
    """Checkpoints as they were written before they had this group."""
    plain = loop.Writer.save

    def save(self, step, tensors, meta):
        plain(self, step, {group: named for group, named in tensors.items() if group != "buffers"}, meta)

    monkeypatch.setattr(loop.Writer, "save", save)


def test_a_checkpoint_from_before_there_were_buffers_is_taken_up(tiny_data, tmp_path, monkeypatch):
    run(tiny_config(tiny_data, tmp_path / "whole", **LONG))
    config = tiny_config(tiny_data, tmp_path / "broken", **LONG)
    with monkeypatch.context() as older:
        without_buffers(older)
        stop_at(config, 8)
    assert "buffers" not in latest(tmp_path / "broken" / "checkpoints").index
    run(config)
    assert_same(traces(tmp_path / "broken"), traces(tmp_path / "whole"))


def test_a_checkpoint_without_the_layers_buffers_is_refused(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, **LONG)
    with monkeypatch.context() as older:
        without_buffers(older)
        stop_at(config, 8)
    with pytest.raises(CheckpointError, match=r"'layers.0.attn.k.sp_index' is \(3,\) .* and not there in the check"):
        run(config)


def test_a_flipped_bit_in_the_buffers_is_found(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, **LONG)
    stop_at(config, 8)
    path = latest(tmp_path / "out" / "checkpoints").path / "buffers.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.warns(RuntimeWarning, match=r"buffers.safetensors.*the one before"):
        run(config)


# ------------------------------------------------------------------------------------------------------ several ranks


def damaged(tree, name, rank):
    """What a run says in which one rank has something else when all is built."""
    plain = build.refuse_differences

    def refuse_differences(model, share):
        if int(os.environ["RANK"]) == rank:
            tensor = model.state_dict()[name]
            tensor.view(-1)[0] += 1
        plain(model, share)

    build.refuse_differences = refuse_differences
    return said(tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "rank"),
    [
        ({"name": "ddp"}, INDEX, 1),
        ({"name": "ddp"}, INDEX, 0),
        ({"name": "ddp"}, "layers.0.attn_norm.weight", 1),
        ({"name": "owned"}, INDEX, 1),
        ({"name": "deepspeed", "stage": 3}, INDEX, 1),
    ],
)
def test_a_rank_that_has_something_else_is_refused_by_all(tiny_data, tmp_path, backend, name, rank):
    """Also where nobody asked for the witness."""
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, backend={**backend, "witness": False})
    for words in gang.ranks(2, damaged, config.model_dump(), name, rank):
        assert words.startswith(f"BackendError: before the first step not all ranks have what rank 0 has: {name} on")
        assert "rank 1. What a rank begins with" in words
    assert not (tmp_path / "out" / "checkpoints").exists()


def with_own_seed(tree):
    return said({**tree, "seed": int(os.environ["RANK"])})


def test_seeds_of_their_own_are_refused(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, backend={"witness": False})
    for words in gang.ranks(2, with_own_seed, config.model_dump()):
        assert "embed.weight on rank 1" in words


def on_other_machines(tree):
    """Another BLAS chooses other channels: whoever fills a layer fills it for all."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            other_channels(patch)
        return run_status(tree)


@pytest.mark.slow
def test_a_layer_is_filled_once_for_all_ranks(tiny_data, tmp_path):
    one, mixed = (
        tiny_config(tiny_data, tmp_path / name, layer=LOST, checkpoint={"every": 0}) for name in ("one", "mixed")
    )
    run(one)
    assert gang.ranks(2, on_other_machines, mixed.model_dump()) == ["done"] * 2
    ours, theirs = saved_buffers(tmp_path / "mixed"), saved_buffers(tmp_path / "one")
    filled = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down"]
    names = [f"layers.{i}.{layer}.sp_index" for i in range(2) for layer in filled]
    same = [torch.equal(ours[name], theirs[name]) for name in names]
    assert same == [True, False] * 7  # the second rank fills every second layer


def test_any_share_of_the_layers_is_filled_as_alone():
    def empty():
        model = GPT(ModelConfig(preset=None, dim=16, layers=2, heads=2, hidden=24, vocab_size=17))
        build.convert(model, LostLinear, [r"\.(attn|mlp)\."], rank=4, density=0.2)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
        return model

    alone, shares = empty(), [empty() for _ in range(3)]
    alone.init_weights(0)
    for rank, model in enumerate(shares):
        model.init_weights(0, slice(rank, None, 3))
    for turn, name in enumerate(alone.replaced()):
        for rank, model in enumerate(shares):
            layer = model.get_submodule(name).state_dict()
            same = [torch.equal(tensor, layer[key]) for key, tensor in alone.get_submodule(name).state_dict().items()]
            assert all(same) == (rank == turn % 3), name


def test_ddp_sends_no_buffers_in_a_step(tiny_data, tmp_path):
    assert gang.ranks(2, sends_buffers) == [False] * 2


def sends_buffers():
    from tests.tools.scale import make
    from thriftlab.optim import AdamW
    from thriftlab.train.backends import make_backend

    backend = make_backend("ddp")
    backend.prepare(*make(AdamW, layer="lost"))
    sends = backend.replica.will_sync_module_buffers()
    backend.close()
    return sends


# ---------------------------------------------------------------------------------------------------- ways of training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lost", "cola"])
def test_ways_that_change_speed_and_memory_change_nothing_else(tiny_data, tmp_path, monkeypatch, name):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled(model, backend="aot_eager", fullgraph=True))
    ways = {
        "plain": NORMAL,
        "layerwise": LAYERWISE,
        "checkpointing": {**NORMAL, "activation_checkpointing": True},
        "bf16": {**NORMAL, "precision": "bf16"},
        **({"compile": {**NORMAL, "compile": True}} if name == "lost" else {}),
    }
    given = {"layer": {"name": name, "rank": 8}, "optim": {"name": "frugal", "gap": 3}}
    loss = {way: ended(tiny_config(tiny_data, tmp_path / way, train=train, **given)) for way, train in ways.items()}
    assert loss["layerwise"] == loss["checkpointing"] == loss["plain"]
    assert loss.get("compile", loss["plain"]) == pytest.approx(loss["plain"], abs=1e-5)
    assert 0 < abs(loss["bf16"] - loss["plain"]) < 2e-2


# ------------------------------------------------------------------------------------------------------- what is said


def test_the_record_says_what_the_model_is_made_of(tiny_data, tmp_path, capfd):
    layer = {**LOST, "rank": 16, "exclude": [r"layers\.0\.attn"]}
    config = tiny_config(tiny_data, tmp_path / "out", layer=layer, optim={"name": "fira", "rank": 16})
    run(config)
    entry = json.loads((tmp_path / "out" / "record.json").read_text())
    assert entry["method"] == "lost+fira"
    layers = entry["model"]["layers"]
    assert layers["converted"] == [f"layers.{i}.mlp.{kind}" for i in range(2) for kind in ("gate", "up", "down")]
    assert set(layers["left"]) == {f"layers.1.attn.{kind}" for kind in "qkvo"}
    assert set(layers["left"].values()) == {"1,120 parameters are not fewer than 1,024"}
    sizes = [(48, 32), (48, 32), (32, 48)]  # [out, in]
    per_block = sum(16 * (m + n) + m * int(0.1 * n) for m, n in sizes)
    plain = 256 * 32 + 32 + 2 * (2 * 32 + 4 * 32 * 32)  # tied embedding, norms, attention
    vocabulary = entry["model"]["parameters"] - plain - 2 * per_block
    assert vocabulary % 32 == 0 and 0 <= vocabulary < 32 * 32  # bytes, and a few special tokens
    assert entry["model"]["trained"] == entry["model"]["parameters"]
    memory = entry["memory"]
    assert memory["buffer_bytes"] == 8 * 2 * sum(int(0.1 * n) for _, n in sizes)
    assert memory["parameter_bytes"] == 4 * entry["model"]["parameters"]
    assert memory["state_bytes"] == memory["predicted_state_bytes"]
    words = capfd.readouterr().err
    assert (
        "lost in the place of 6 of 10 Linears; left as they are: 1,120 parameters are not fewer than 1,024: " in words
    )
    assert "layers.1.attn.q, layers.1.attn.k, layers.1.attn.v and 1 more" in words
    # every factor has a side of 16 or less; what attention has left to it is split
    assert "rank 16 >= smaller side 16: layers.0.mlp.gate.lr_in, layers.0.mlp.gate.lr_out" in words
    assert "rank 16 >= smaller side 3: " in words and entry["remarks"] == []


def test_a_projection_that_nothing_is_wide_enough_for_is_full_adamw(tiny_data, tmp_path):
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, optim={"name": "galore", "rank": 8})
    assert run(config)["remarks"] == [
        "no matrix is split, this is full AdamW alone (rank 8 >= smaller side 3; rank 8 >= smaller side 4; "
        "rank 8 >= smaller side 8)"
    ]


def test_the_factors_are_the_matrices_of_the_update_rule(tiny_data, tmp_path):
    optim = {"name": "frugal", "subspace": "columns", "density": 0.25}
    config = tiny_config(tiny_data, tmp_path / "out", layer=LOST, optim=optim)
    run(config)
    state = latest(tmp_path / "out" / "checkpoints").reader("optim").shapes
    name = "layers.0.mlp.down"  # [32, 48], 4 channels
    kept = {key: state[f"{name}.{key}/exp_avg"] for key in ("lr_in", "lr_out", "sp_weight")}
    assert kept == {"lr_in": (8, 12), "lr_out": (32, 2), "sp_weight": (32, 1)}
    assert state["norm.weight/exp_avg"] == (32,)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"name": "lost", "rank": 64}, r"layer.name = lost replaces no Linear: 2,080 parameters are not"),
        ({"name": "lost", "include": ["nope"]}, "layer: pattern 'nope' matches no Linear; near: "),
        ({"name": "lost", "exclude": ["nope"]}, "layer: pattern 'nope' matches no Linear; near: "),
        ({"name": "lost", "exclude": [""]}, "replaces no Linear: all are excluded"),
        ({"name": "lost", "rank": 1.5}, "layer: rank = 1.5: give a whole number"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(tiny_data, tmp_path, layer, message):
    with pytest.raises(ConfigError, match=message) as refused:
        run(tiny_config(tiny_data, tmp_path / "out", layer=layer))
    assert "\n" not in str(refused.value)


def test_every_key_of_a_layer_is_part_of_the_result():
    base = {"name": "lost", "rank": 8}
    changes = {
        "rank": 9, "density": 0.2, "gamma": 0.5, "act": "none", "score": "random", "values": "comp", "window": 3,
        "sigma": "in", "multiple": 8, "init_gain": "dense", "include": ["mlp"], "exclude": ["attn"],
    }  # fmt: skip
    prints = {key: fingerprint(RunConfig(layer={**base, key: value}), "") for key, value in changes.items()}
    prints |= {layer: fingerprint(RunConfig(layer={"name": layer, "rank": 8}), "") for layer in ("lost", "cola")}
    prints["dense"] = fingerprint(RunConfig(), "")
    assert set(changes) >= set(RunConfig(layer=base).layer.hyperparameters())
    assert len(set(prints.values())) == len(prints)
