"""Layer-wise updates: the normal update bit for bit, no two gradients at a time, and refused where they would lie."""

import weakref

import pytest
import torch

from tests.tools import gang
from tests.tools.runs import LAYERWISE, NORMAL, assert_same, stop_at, traces
from tests.tools.tiny import tiny_config
from thriftlab.data.errors import ConfigError, UserError
from thriftlab.data.loader import Batch
from thriftlab.launch.bench import peak_allocation
from thriftlab.optim import METHODS, split_groups
from thriftlab.train.backends import make_backend
from thriftlab.train.loop import run
from thriftlab.train.model import GPT, ModelConfig
from thriftlab.train.step import train_step

ROWS, STEPS = 6, 7


KINDS = [
    ("adamw", {}),
    ("adamw", {"state_dtype": "bf16"}),
    ("signsgd", {}),
    ("signsgd", {"tables": "ember"}),
    ("frugal", {"gap": 3, "order": "random"}),
    ("frugal", {"gap": 3, "balance": "bytes", "unit": "layer", "density": 0.5}),
    ("frugal", {"gap": 3, "subspace": "columns", "rule": "lion"}),
    ("frugal", {"gap": 3, "subspace": "svd", "on_refresh": "project", "stagger": True}),
    ("badam", {"gap": 2, "density": 0.5}),
    ("galore", {"gap": 3, "rank": 4}),
    ("fira", {"gap": 3, "rank": 4}),
    ("subtrack", {"gap": 3, "rank": 4}),
    ("apollo", {"gap": 3, "rank": 4}),
    ("muon", {}),
    ("normuon", {}),
    ("scale", {}),
    ("rmnp", {}),
    ("rmnp", {"tables": "own"}),
    ("sinkgd", {}),
    ("adam_mini", {"head_dim": 8}),
    ("stable_spam", {"gap": 3}),
    ("soap", {"gap": 3}),
    ("conda", {"gap": 3}),
    ("dion2", {}),
]


def build(name, hyper, layerwise, **sizes):
    model = GPT(
        ModelConfig(**{**dict(preset=None, dim=16, layers=2, heads=2, hidden=24, vocab_size=17, tied=True), **sizes})
    )
    model.init_weights(0)
    backend = make_backend("single")
    method = METHODS[name]
    backend.prepare(
        model,
        method(split_groups(model, include=[r"\.(attn|mlp)\."], roles=method.roles or "tables" in hyper), **hyper),
    )
    if layerwise:
        backend.update_in_backward()
    return backend


def step(backend, count, micro_batch_size, rows=ROWS):
    tokens = torch.randint(17, (rows, 13), generator=torch.Generator().manual_seed(count))
    batch = Batch(tokens, torch.zeros(rows), torch.arange(rows))
    return train_step(backend, batch, None, micro_batch_size, "fp32", None)


def train(backend, micro_batch_size):
    results = [step(backend, count, micro_batch_size) for count in range(STEPS)]
    named = [(n, p) for g in backend.optimizer.param_groups for n, p in zip(g["names"], g["params"], strict=True)]
    weights = {name: p.detach() for name, p in named}
    return results, weights, {name: backend.optimizer.state[p] for name, p in named}


def test_every_method_is_tried():
    assert {name for name, _ in KINDS} >= {
        name for name, cls in METHODS.items() if cls.__module__.startswith("thriftlab.")
    }


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [ROWS, 2])
@pytest.mark.parametrize(("name", "hyper"), KINDS, ids=str)
def test_bitwise_the_normal_update(name, hyper, micro_batch_size):
    normal, other = (train(build(name, hyper, on), micro_batch_size) for on in (False, True))
    assert other[0] == normal[0] and all(result.applied for result in other[0])
    assert all(torch.equal(other[1][key], weight) for key, weight in normal[1].items())
    for key, state in normal[2].items():
        assert other[2][key].keys() == state.keys()
        assert all(torch.equal(other[2][key][name], tensor) for name, tensor in state.items()), key


@pytest.mark.parametrize("tied", [True, False])
def test_one_gradient_at_a_time(tied):
    """With all rows in one micro-batch. Whoever kept a gradient alive beside p.grad would be seen, too."""
    backend = build("adamw", {}, layerwise=True, tied=tied)
    alive, most, update = weakref.WeakSet(), [], backend.optimizer.update

    def watch(names, weights, grads, states, group):
        alive.update(p.grad for p in weights)
        most.append(len(alive))
        assert sum(p.grad is not None for p in backend.model.parameters()) == 1
        update(names, weights, grads, states, group)

    backend.optimizer.update = watch
    step(backend, 0, ROWS)
    assert most == [1] * len(list(backend.model.parameters()))
    assert not alive and all(p.grad is None for p in backend.model.parameters())


def test_the_memory_of_the_gradients_is_saved():
    """Of 13 tokens, so that activations are small beside it."""
    peaks = {}
    for layerwise in (False, True):
        backend = build("signsgd", {}, layerwise, layers=12, dim=128, heads=2, hidden=256)
        peaks[layerwise] = peak_allocation(lambda backend=backend: step(backend, 0, 1, rows=1))
    grads = sum(p.nbytes for p in backend.model.parameters())
    assert peaks[False] > grads
    assert peaks[True] < grads / 3


def test_gradients_add_up_until_the_last_micro_batch():
    """One that only the first micro-batch has is used as well."""
    results = {}
    for layerwise in (False, True):
        backend = build("adamw", {}, layerwise)
        model, calls = backend.model, []
        extra = next(p for name, p in model.named_parameters() if name.endswith("norm.weight"))
        extra.requires_grad_(False)
        forward = model.forward

        def sometimes(*arguments, extra=extra, calls=calls, forward=forward):
            calls.append(extra.requires_grad_(not calls))
            return forward(*arguments)

        extra.requires_grad_(True)
        model.forward = sometimes
        step(backend, 0, 2)
        results[layerwise] = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(results[True][name], p) for name, p in results[False].items())


def test_a_gradient_that_is_not_finite_ends_the_run_and_names_the_way_out(tiny_data, tmp_path, monkeypatch):
    config = tiny_config(tiny_data, tmp_path / "out", train=LAYERWISE)
    forward = GPT.forward

    def spoiled(self, tokens, *arguments):
        out = forward(self, tokens, *arguments)
        if torch.is_grad_enabled() and len(calls := self.__dict__.setdefault("calls", [])) == 4:
            out = out * torch.nan
        if torch.is_grad_enabled():
            calls.append(1)
        return out

    monkeypatch.setattr(GPT, "forward", spoiled)
    with pytest.raises(UserError, match="train.layerwise=false train.max_skipped_steps=10"):
        run(config)
    monkeypatch.undo()
    record = run(tiny_config(tiny_data, tmp_path / "out", train={**NORMAL, "max_skipped_steps": 10}))
    assert record["budget"]["steps"] == 8 and record["skipped_steps"] == 0


def test_a_run_is_the_normal_run_and_resumes_bitwise(tiny_data, tmp_path):
    optim = {"name": "frugal", "gap": 3, "order": "random"}
    run(tiny_config(tiny_data, tmp_path / "normal", optim=optim, train=NORMAL))
    config = tiny_config(tiny_data, tmp_path / "layerwise", optim=optim, train=LAYERWISE)
    for count in (1, 5):
        stop_at(config, count)
    run(config)
    assert_same(traces(tmp_path / "layerwise"), traces(tmp_path / "normal"))


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [({"clip": 1.0}, "set train.clip=null"), ({"max_skipped_steps": 10}, "set train.max_skipped_steps=1"),
     ({"compile": True}, "set train.compile=false")],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tiny_data, tmp_path, changed, remedy):
    with pytest.raises(ValueError, match=f"layerwise=true .*{remedy}"):
        tiny_config(tiny_data, tmp_path, train={**LAYERWISE, **changed})


def refusal(data, out):
    try:
        run(tiny_config(data, out, train=LAYERWISE))
    except ConfigError as error:
        return str(error)


def test_several_processes_are_refused(tiny_data, tmp_path):
    for said in gang.ranks(2, refusal, tiny_data, tmp_path / "out"):
        assert "train.layerwise = true needs backend.name=single" in said and "train.layerwise=false" in said
