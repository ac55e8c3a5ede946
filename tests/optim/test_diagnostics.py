"""What a method tells at a refresh is in metrics.jsonl at that step, and a plain step waits for nothing."""

import pytest
import torch

from tests.tools.tiny import tiny_config
from thriftlab.optim import Frugal, GaLore
from thriftlab.optim.core.split import SplitOptimizer
from thriftlab.train.loop import run
from thriftlab.train.records import tracking
from thriftlab.train.records.record import read_metrics

SHAPES = {"a": (8, 6), "b": (6, 8), "bias": (4,)}


def problem(device="cpu"):
    draw = torch.Generator().manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape, generator=draw).to(device)) for name, shape in SHAPES.items()}
    for p in params.values():
        p.grad = torch.randn(p.shape, generator=draw).to(device)
    return params


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("stagger", [False, True])
def test_what_is_fresh_is_told_from_the_counters_alone(device, stagger):
    """On the meta device nothing could be read."""
    params = problem(device)
    optimizer = GaLore(params.items(), rank=2, gap=4, subspace="gauss", stagger=stagger)
    drawn = []
    refresh = optimizer.refresh
    optimizer.refresh = lambda name, *rest: (drawn.append(name), refresh(name, *rest))
    for _ in range(13):
        drawn.clear()
        optimizer.step()
        assert sorted(optimizer.diagnostics(fresh=True)) == sorted(drawn)
    assert sorted(optimizer.diagnostics()) == ["a", "b"]


def refreshes(data, out, /, **sections):
    run(tiny_config(data, out, **sections))
    return {line["step"]: line["refresh"] for line in read_metrics(out / "metrics.jsonl") if "refresh" in line}


def test_they_are_in_the_metrics_and_in_the_mirrors(tiny_data, tmp_path, monkeypatch):
    """Mean and maximum over the 14 matrices, at the steps with a refresh, however seldom the loss is logged."""
    told, mirrored = [], []
    diagnostics = SplitOptimizer.diagnostics

    def listen(self, fresh=False):
        found = diagnostics(self, fresh)
        told.extend([[{key: float(v) for key, v in values.items()} for values in found.values()]] if found else [])
        return found

    class Mirror:
        def log(self, values, tokens):
            mirrored.append(values)

        def finish(self): ...

    monkeypatch.setattr(SplitOptimizer, "diagnostics", listen)
    monkeypatch.setattr("thriftlab.train.log.tracker", lambda *_: tracking.Tracker([Mirror()]))
    found = refreshes(tiny_data, tmp_path / "out", optim={"name": "fira", "rank": 4, "gap": 3}, log={"every": 100})
    assert list(found) == [1, 4, 7] and found[1]["overlap"] == {"mean": 0, "max": 0}
    for line, values in zip(found.values(), told, strict=True):
        assert line["tensors"] == len(values) == 14 and set(line) == {"tensors", "residual", "overlap", "limiter"}
        for key in ("residual", "overlap", "limiter"):
            assert line[key]["max"] == pytest.approx(max(v[key] for v in values))
            assert line[key]["mean"] == pytest.approx(sum(v[key] for v in values) / 14)
        assert 0 < line["residual"]["mean"] < line["residual"]["max"] <= 1 and line["limiter"]["max"] >= 1
    assert [values["refresh/residual/max"] for values in mirrored if "refresh/residual/max" in values] == [
        line["residual"]["max"] for line in found.values()
    ]


def test_methods_without_a_subspace_tell_nothing(tiny_data, tmp_path):
    for name in ("adamw", "muon", "frugal"):
        assert refreshes(tiny_data, tmp_path / name, optim={"name": name}) == {}


def test_a_step_that_was_skipped_tells_nothing(tiny_data, tmp_path, monkeypatch):
    from thriftlab.train.model import GPT

    forward, calls = GPT.forward, []

    def spoiled(self, *arguments):
        calls.append(torch.is_grad_enabled())
        return forward(self, *arguments) * (torch.nan if calls.count(True) == 2 else 1)

    monkeypatch.setattr(GPT, "forward", spoiled)
    optim, train = {"name": "galore", "rank": 4, "gap": 3}, {"micro_batch_size": 8}
    assert list(refreshes(tiny_data, tmp_path / "out", optim=optim, train=train)) == [1, 5, 8]


@pytest.mark.parametrize("subspace", ["columns", "rows", "coordinates"])
def test_residual_and_overlap_of_chosen_entries(subspace):
    """The energy of the gradient's other entries, and the share of the new entries that were chosen before."""
    w = torch.nn.Parameter(torch.zeros(12, 10))
    w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
    optimizer = Frugal([("w", w)], subspace=subspace, density=0.4, gap=1, free="none", lr=1.0)
    chosen = []
    for _ in range(2):
        w.data.zero_()
        optimizer.step()
        chosen.append(w.data != 0)  # Adam moves just these
    told = optimizer.diagnostics()["w"]
    old, new = chosen
    assert float(told["residual"]) == pytest.approx(float((w.grad[~new] ** 2).sum() / (w.grad**2).sum()), abs=1e-5)
    assert float(told["overlap"]) == pytest.approx(float((old & new).sum() / new.sum()), abs=1e-6)
