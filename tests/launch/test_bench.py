"""The benchmark of the optimizers: what it counts is what there is."""

import json

import pytest
import torch

from thriftlab.launch import bench, cli, peers
from thriftlab.optim import METHODS


@pytest.mark.slow
def test_one_round_of_every_method_on_small_shapes(tmp_path, capsys):
    assert cli.main(["bench", "optim", "--preset", "nano", "rounds=2", "--out", str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "b.json").read_text())
    rows = {row["label"]: row for row in result["rows"]}
    assert set(rows) >= {"torch AdamW foreach", "torch AdamW fused", peers.FLOOR, *peers.FLOORS, *peers.variants()}
    assert {name for name, _ in peers.variants().values()} == set(METHODS)
    for label, row in rows.items():
        assert f"| {label} |" in printed
        assert len(row["plain_seconds"]) == len(row["ratios"]) == 2
        assert row["spec_bytes"] in (None, row["state_bytes"]), "measured state is the declared state"
    assert set(rows["torch AdamW foreach"]["ratios"]) == {1.0}
    assert rows["adamw"]["state_bytes"] == rows["torch AdamW foreach"]["state_bytes"]
    assert all(f"{name}: left out" in printed for name in peers.PEERS if name not in rows), "a peer may be missing"


@pytest.mark.slow
def test_a_step_of_two_methods_on_made_up_text(tmp_path, capsys):
    words = [
        "rounds=2",
        "train.batch_size=2",
        "data.sequence_length=16",
        "model.layers=1",
        "out=" + str(tmp_path / "s.json"),
    ]
    assert cli.main(["bench", "step", "adamw", "lost+signsgd", *words]) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "s.json").read_text())
    assert [row["method"] for row in result["rows"]] == ["adamw", "lost+signsgd"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["transient_bytes"] > 0
        assert (row["tokens"], row["mfu"]) == (32, None) and f"| {row['method']} |" in printed
    first, second = (row["state_bytes"] for row in result["rows"])
    assert first > second, "signSGD keeps nothing"
    assert set(tmp_path.iterdir()) == {tmp_path / "s.json"}


def test_the_methods_are_timed_on_the_device_of_their_tensors(monkeypatch):
    """As on a GPU, with stand-ins for its clock and allocator."""
    monkeypatch.setattr(bench, "timer", lambda device: lambda call: call() or 0.125)
    monkeypatch.setattr(bench, "peak_allocation", lambda call, device: call() or 7)
    groups = bench.tensors(bench.ModelConfig(preset="nano"))
    timing = bench.Timing("adamw", METHODS["adamw"](groups, lr=1e-6))
    timing.take_turn(refresh=False)
    assert timing.numbers([0.25])["ratios"] == [0.5] and timing.transient_bytes == 7


def test_each_storage_of_weights_is_a_row(monkeypatch):
    monkeypatch.setattr(bench, "timer", lambda device: lambda call: call() or 0.125)
    monkeypatch.setattr(bench, "peak_allocation", lambda call, device: call() or 7)
    options = bench.OptimBench(methods="signsgd", weights="fp32,bf16+8", preset="nano")
    timings = {timing.label: timing for timing in bench.make_timings(options, torch.device("cpu"))}
    assert [label for label in timings if "signsgd" in label] == ["signsgd", "signsgd weights=bf16+8"]
    kept = timings["signsgd weights=bf16+8"]
    params = [p for group in kept.optimizer.param_groups for p in group["params"]]
    assert {(p.dtype, p.grad.dtype) for p in params if p.ndim > 1} == {(torch.bfloat16, torch.float32)}
    assert kept.state_bytes == kept.spec_bytes == sum(p.numel() for p in params if p.ndim > 1)


def test_the_transient_memory_of_a_call_is_its_peak():
    def call():
        first = torch.ones(1000)
        second = first + 1
        del first
        return second * 2

    assert 8000 <= bench.peak_allocation(call) <= 8064  # and the scalars of the sums
    assert bench.peak_allocation(lambda: None) == 0


def test_held_bytes_look_into_objects_and_count_a_storage_once():
    class Projector:
        def __init__(self, basis):
            self.basis, self.rank = basis, 2

    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p])
    whole = torch.zeros(10, 10)
    optimizer.state[p] = {"projector": Projector(whole[:2]), "again": whole[3], "step": torch.tensor(1.0), "n": 3}
    assert peers.held_bytes(optimizer) == 400


@pytest.mark.parametrize(("words", "message"), [
    (["bench"], "thriftlab bench optim"),
    (["bench", "data"], "thriftlab bench optim"),
    (["bench", "step"], "name"),
    (["bench", "step", "adamw", "rounds=0"], "integer >= 1"),
    (["bench", "step", "adamw", "seeds=5"], "seeds: has no effect on the time of a step"),
    (["bench", "step", "adamw", "backend.device=cuda"], "build without CUDA"),
    (["bench", "optim", "device=cuda"], "build without CUDA"),
    (["bench", "optim", "--methods", "adamw,nadam"], "unknown nadam; there are adam_mini, adamw, apollo"),
    (["bench", "optim", "out=."], "out: . is a folder; name a file in it"),
    (["bench", "optim", "rounds=0"], "integer >= 1"),
    (["bench", "optim", "preset=nan"], "it takes nano | micro"),
])  # fmt: skip
def test_mistakes(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err
