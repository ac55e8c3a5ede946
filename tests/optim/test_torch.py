"""The methods as citizens of torch.optim: foreign loops, schedulers, closures, groups, fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tools.methods import GAP, MAKERS, SHAPES, every_method, gradient, parameters, same, train
from thriftlab.optim import METHODS, AdamW, Frugal, Method, predicted_state_bytes, state_bytes


def test_every_registered_method_is_tested_here():
    assert {type(make(parameters().values())) for make in MAKERS.values()} == set(METHODS.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(dtype, weight_decay):
    """For bf16 weights: torch's step of fp32 copies, whose moments stay in fp32, rounded after each step."""
    ours, theirs = parameters(dtype), {name: p.detach().float() for name, p in parameters(dtype).items()}
    hyper = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-4, weight_decay=weight_decay)
    optimizer, peer = AdamW(ours.values(), **hyper), torch.optim.AdamW(theirs.values(), fused=True, **hyper)
    for t in range(10):
        train(ours, optimizer, [t])
        for name, p in theirs.items():
            p.grad = gradient(name, t).to(dtype).float()
        peer.step()
        with torch.no_grad():
            for p in theirs.values():
                p.copy_(p.to(dtype))
        assert all(torch.equal(ours[name].float(), theirs[name]) for name in SHAPES)


@every_method
def test_memory_layout_does_not_matter(make):
    """Transposed weights, strided gradients and a view of a larger tensor step as contiguous ones do."""
    plain, odd = parameters(), parameters()
    odd["a"] = torch.nn.Parameter(odd["a"].detach().t().contiguous().t())
    odd["c"] = torch.nn.Parameter(torch.zeros(4, 9)[:, ::2][:, :4].copy_(odd["c"].detach()))
    optimizers = make(plain.items()), make(odd.items())
    for t in range(6):
        for name in SHAPES:
            plain[name].grad = gradient(name, t)
            odd[name].grad = gradient(name, t)
        odd["b"].grad = odd["b"].grad.t().contiguous().t()
        for optimizer in optimizers:
            optimizer.step()
    for name in SHAPES:
        assert torch.allclose(plain[name], odd[name], rtol=0, atol=1e-6), name
    assert torch.equal(plain["b"], odd["b"]), "the gradient's layout is not the weight's, which decides"


@every_method
def test_closures_see_gradients_and_their_result_is_returned(make):
    params = parameters()
    optimizer = make(params.values())

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params.values())
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert not params["a"].grad.eq(0).all()
    optimizer.step(closure)  # SOAP's first step only begins its bases
    assert optimizer.step(closure) < first


@every_method
def test_schedulers_and_a_learning_rate_that_is_a_tensor(make):
    params, others = parameters(), parameters()
    a = make(params.values())
    b = make(others.values(), lr=torch.tensor(0.01, dtype=torch.float64))
    scheduler = torch.optim.lr_scheduler.LambdaLR(a, lambda t: 1 / (t + 1))
    for t in range(6):
        b.param_groups[0]["lr"].fill_(0.01 / (t + 1))
        train(params, a, [t])
        train(others, b, [t])
        scheduler.step()
    assert all(torch.allclose(params[name], others[name], rtol=0, atol=1e-6) for name in SHAPES)
    assert not same(parameters(), params)


@every_method
def test_parameters_without_gradients_stay_and_have_no_state(make):
    params, all_along = parameters(), parameters()
    optimizer, other = make(params.items()), make(all_along.items())
    for t in range(10):
        params["b"].grad = gradient("b", t)
        optimizer.step()
    train(all_along, other, range(10))
    assert all(torch.equal(params[name], parameters()[name]) for name in SHAPES if name != "b")
    assert not any(optimizer.state.get(p) for name, p in params.items() if name != "b")
    assert torch.equal(params["b"], all_along["b"])


@every_method
def test_maximize_climbs(make):
    down, up = parameters(), parameters()
    a, b = make(down.values()), make(up.values(), maximize=True)
    for t in range(6):
        for name in SHAPES:
            down[name].grad, up[name].grad = -gradient(name, t), gradient(name, t)
        a.step()
        b.step()
    assert same(down, up)


@every_method
def test_groups_added_later_and_with_their_own_hyper_parameters(make):
    params = parameters()
    optimizer = make([params["a"], params["bias"]])
    train(params, optimizer, range(2))
    optimizer.add_param_group({"params": params["b"], "lr": 0.5})
    assert [group["names"] for group in optimizer.param_groups] == [["0", "1"], ["2"]]
    before = params["b"].detach().clone()
    train(params, optimizer, [2, 3])  # SOAP's first step of a matrix only begins
    assert (params["b"] - before).abs().max() > 0.05
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [params["c"]], "lr": -1})
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [params["a"]]})
    with pytest.raises(ValueError, match="one name.*'0'"):
        optimizer.add_param_group({"params": [params["c"]], "names": ["0"]})
    assert len(optimizer.param_groups) == 2


def test_what_is_not_a_list_of_parameters_is_refused():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="order"):
        AdamW([{"params": {a, b}}])
    with pytest.raises(ValueError, match="twice"):
        AdamW([a, a])
    with pytest.raises(ValueError, match="2 parameters and 1 names"):
        AdamW([{"params": [a, b], "names": ["a"]}])
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse=False"):
        AdamW(embedding.parameters()).step()
    with pytest.raises(ValueError, match="takes blocks in pairs"):
        Frugal([torch.nn.Parameter(torch.zeros(2, 2))], density=1.0, order="mirror")
    with pytest.raises(ValueError, match="stagger"):
        Frugal([torch.nn.Parameter(torch.zeros(2, 2))], stagger=True)


def test_the_callers_group_is_not_changed():
    group = {"params": [torch.nn.Parameter(torch.zeros(2))]}
    AdamW([group])
    assert list(group) == ["params"]


@pytest.mark.slow
@every_method
def test_a_step_runs_on_fake_and_meta_tensors(make):
    """No value is read on the host, refreshes included, so the planner can run the real step."""
    with FakeTensorMode():
        params = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()}
        if make is not MAKERS["own"]:  # which reads its own basis
            optimizer = make(params.items())
            for _ in range(GAP + 2):
                for p in params.values():
                    p.grad = torch.empty_like(p)
                optimizer.step()
            assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
    if make is not MAKERS["own"]:
        with torch.device("meta"):
            params = {name: torch.nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()}
            optimizer = make(params.items())
            for _ in range(GAP + 2):
                for p in params.values():
                    p.grad = torch.empty_like(p)
                optimizer.step()


def test_a_method_is_twenty_lines_in_a_file_of_ones_own():
    class Momentum(Method, name="test-momentum"):
        def __init__(self, params, lr=0.1):
            super().__init__(params, lr=lr)

        def update(self, names, weights, grads, states, group):
            for weight, grad, state in zip(weights, grads, states, strict=True):
                buffer = state.setdefault("buffer", torch.zeros_like(weight))
                weight.sub_(buffer.mul_(0.9).add_(grad), alpha=group["lr"])

        def spec(self, shape, dtype, **overrides):
            return {"buffer": (shape, dtype)}

    try:
        ours, theirs = parameters(), parameters()
        peer = torch.optim.SGD(theirs.values(), lr=0.1, momentum=0.9)
        optimizer = METHODS["test-momentum"](ours.items())
        assert same(train(ours, optimizer, range(5)), train(theirs, peer, range(5)))
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
        climb = parameters()
        train(climb, METHODS["test-momentum"]([{"params": list(climb.values()), "maximize": True}]), [0])
        down = parameters()
        train(down, METHODS["test-momentum"](down.values()), [0])
        assert torch.allclose(climb["a"] + down["a"], 2 * parameters()["a"]), "maximize needs no word of the author"
        with pytest.raises(ValueError, match="already a method 'test-momentum'"):
            type("Other", (Method,), {}, name="test-momentum")
    finally:
        del METHODS["test-momentum"]
