"""`applied`, a number on the device that says whether a step counts: 0 leaves every bit, 1 is the step as it is."""

import pytest
import torch

from tests.tools.methods import GAP, MAKERS, every_method, gradient, parameters, same, through_a_file
from thriftlab.optim import Frugal, GaLore, Method
from thriftlab.optim.core import method as core
from thriftlab.optim.state.lists import kept_unless

BAD = {2, GAP, GAP + 1, 2 * GAP - 1, 2 * GAP}  # steps with NaN gradients: plain ones, and those where a refresh is due
STEPS = range(3 * GAP + 2)
DTYPES = {"fp32": {}, "bf16": {"state_dtype": "bf16"}, "8bit": {"state_dtype": "8bit"}}


def made(make, **hyper):
    params = parameters()
    with torch.no_grad():
        params["a"][0, :3] = -0.0  # to which adding zero would show
        params["bias"][0] = -0.0
    return params, make(list(params.items()), weight_decay=0.1, **hyper)


def feed(params, step, bad=False):
    for name, p in params.items():
        p.grad = torch.full_like(p, torch.nan) if bad else gradient(name, step)


def everything(params, optimizer):
    found = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        state = optimizer.state.get(p, {})
        found.update({f"{name}/{key}": t.clone() for key, t in state.items() if isinstance(t, torch.Tensor)})
    return {key: t.reshape(-1).view(torch.uint8) for key, t in found.items()}


def refused_and_left_out(make, **hyper):
    """Twice the same run: with NaN gradients that are refused, and without these steps."""
    runs = []
    for refuses in (True, False):
        params, optimizer = made(make, **hyper)
        for step in STEPS:
            if step in BAD and not refuses:
                continue
            feed(params, step, bad=step in BAD)
            before = everything(params, optimizer)
            optimizer.step(applied=torch.tensor(float(step not in BAD)))
            if step in BAD:
                assert same(before, everything(params, optimizer)), f"step {step} was refused and left a trace"
        runs.append(everything(params, optimizer))
    return runs


@every_method
def test_a_refused_step_leaves_every_bit_and_does_not_count(make):
    refused, left_out = refused_and_left_out(make)
    assert same(refused, left_out)


@pytest.mark.parametrize("kept", [hyper for hyper in DTYPES.values() if hyper], ids=["bf16", "8bit"])
@pytest.mark.parametrize(
    "name",
    ["adamw", "columns", "galore", "fira", "muon", "scale", "rmnp, all", "sinkgd", "adam mini", "normuon",
     "stable_spam", "subtrack", "soap", "conda", "dion2"],
)  # fmt: skip
def test_so_does_state_in_few_bits(name, kept):
    refused, left_out = refused_and_left_out(MAKERS[name], **kept)
    assert same(refused, left_out)


@every_method
def test_an_applied_step_is_the_step_without_the_word(make):
    """To rounding: constants that follow from counters are computed from tensors. Refreshes come at the same steps."""
    ends = []
    for told in (dict(applied=torch.tensor(1.0)), {}):
        params, optimizer = made(make)
        for step in STEPS:
            feed(params, step)
            optimizer.step(**told)
        ends.append((params, optimizer))
    (params, optimizer), (others, other) = ends
    for name, p in params.items():
        assert torch.allclose(p, others[name], rtol=0, atol=2e-5), name
        mine, theirs = (o.state.get(q, {}) for o, q in ((optimizer, p), (other, others[name])))
        assert mine.keys() == theirs.keys()
        for key in mine:
            if not mine[key].is_floating_point() or not mine[key].ndim:
                assert torch.allclose(mine[key].double(), theirs[key].double(), atol=1e-4), (name, key)


def test_a_first_step_that_is_refused_begins_no_state():
    for make in MAKERS.values():
        params, optimizer = made(make)
        feed(params, 0, bad=True)
        optimizer.step(applied=torch.tensor(0.0))
        assert not optimizer.state


@pytest.mark.parametrize(
    "name",
    [
        "adamw",
        "signsgd",
        "muon",
        "normuon",
        "scale",
        "rmnp",
        "sinkgd",
        "swan",
        "adam mini",
        "columns",
        "galore",
        "fira",
        "subtrack",
        "apollo",
        "blocks",
        "soap",
        "conda",
        "dion2",
        "stable_spam",
        "stable_spam, reference",
        "lion, all",
        "muon, ember",
        "signsgd, 8bit",
    ],  # fmt: skip
)
def test_a_plain_step_does_not_read_it(name, monkeypatch):
    """On no path of Python; tests/optim/test_launches.py looks at all operations."""
    refreshed = "gap" in MAKERS[name](list(parameters().items())).defaults
    params, optimizer = made(MAKERS[name], **({"gap": 100} if refreshed else {}))
    feed(params, 0)
    applied = torch.tensor(1.0)
    for _ in range(2):  # from where on the host knows what it needs
        optimizer.step(applied=applied)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("a read"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: pytest.fail("a read"))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a read"))
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: pytest.fail("a read"))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: pytest.fail("a read"))
    optimizer.step(applied=applied)


def test_the_host_goes_on_where_a_file_was_written():
    """Counters that the host does not know are asked for; then refreshes come at their steps."""
    make = MAKERS["columns"]
    whole, optimizer = made(make)
    parts, first = made(make)
    for step in STEPS:
        bad = step in BAD
        feed(whole, step, bad)
        optimizer.step(applied=torch.tensor(float(not bad)))
        if step == GAP - 1:
            saved = through_a_file(first.state_dict())
            first = make(list(parts.items()), weight_decay=0.1)
            first.load_state_dict(saved)
        feed(parts, step, bad)
        first.step(applied=torch.tensor(float(not bad)))
    assert same(everything(whole, optimizer), everything(parts, first))


class Momentum(Method):
    """One's own: it knows nothing of `applied`."""

    def update(self, names, weights, grads, states, group):
        for weight, grad, state in zip(weights, grads, states, strict=True):
            momentum = state.setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(grad, 0.1)
            weight.sub_(momentum.sign(), alpha=group["lr"])

    def spec(self, shape, dtype, **overrides):
        return {"momentum": (shape, dtype)}


def test_a_method_that_does_not_know_it_is_not_called():
    refused, left_out = refused_and_left_out(lambda params, weight_decay: Momentum(params, lr=0.1))
    assert same(refused, left_out)


def test_a_refresh_is_told_by_counters_not_by_calls():
    """Refused steps do not bring a refresh nearer; one that comes late is not missed."""
    p = torch.nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    optimizer = Frugal([("a", p)], subspace="columns", gap=3, density=0.5)
    drawn = []
    for step, applied in enumerate([1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1]):
        p.grad = gradient("a", step)
        optimizer.step(applied=torch.tensor(float(applied)))
        drawn.append((int(optimizer.state[p]["step"]), int(optimizer.state[p]["start"])))
    assert drawn == [(1, 0), (1, 0), (2, 0), (2, 0), (3, 0), (4, 3), (4, 3), (4, 3), (5, 3), (6, 3), (7, 6)]


def test_layers_of_one_tensor_are_stepped_with_it_too():
    params, optimizer = made(MAKERS["galore"])
    assert isinstance(optimizer, GaLore) and core.METHODS["galore"] is GaLore
    for step, applied in enumerate((1.0, 0.0, 1.0)):
        feed(params, step, bad=not applied)
        for group in optimizer.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                optimizer.step_only([name], [p], group, applied=torch.tensor(applied))
    others, other = made(MAKERS["galore"])
    for step in (0, 2):
        feed(others, step)
        other.step(applied=torch.tensor(1.0))
    assert same(everything(params, optimizer), everything(others, other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 33, 1003])
def test_what_is_put_back_has_every_bit(dtype, size):
    """Of any layout, zeros of both signs and infinities too; where the step counts, what was written stays."""
    tensors = [
        torch.arange(2.0 * size).sub_(3).to(dtype),
        torch.ones(size, 2).to(dtype).t(),
        torch.zeros(size, 4)[:, 1:3].to(dtype),
    ]
    if dtype.is_floating_point:
        tensors[0][-2:] = torch.tensor([-0.0, float("inf")])
        tensors[0][0] = tensors[1][0, -1] = -0.0

    def bits():
        return [torch.cat([t.reshape(-1)]).view(torch.uint8) for t in tensors]

    before = bits()
    for applied in (0.0, 1.0):
        with kept_unless(torch.tensor(applied), tensors):
            for t in tensors:
                t.fill_(torch.nan if dtype.is_floating_point else 9)
        same = list(map(torch.equal, bits(), before))
        assert all(same) if not applied else not any(same)


@pytest.mark.parametrize("name", ["galore", "fira", "frugal, svd", "subtrack"])
def test_a_gradient_that_is_not_finite_spans_no_subspace_though_the_step_is_applied(name):
    """That of one matrix; the others take up theirs. As without the word."""
    found = []
    for told in (dict(applied=torch.tensor(1.0)), {}):
        params, optimizer = made(MAKERS[name], **({"stagger": False} if name == "frugal, svd" else {}))
        for step in range(GAP + 1):
            feed(params, step)
            if step == GAP:
                old = {key: optimizer.state[params[key]]["basis.vectors"].clone() for key in ("a", "b")}
                params["a"].grad[0, 0] = torch.nan
            optimizer.step(**told)
        new = {key: optimizer.state[params[key]]["basis.vectors"] for key in old}
        assert torch.equal(new["a"], old["a"]) and not torch.equal(new["b"], old["b"])
        found.append(new["b"])
    assert torch.allclose(*found, rtol=0, atol=1e-6)
