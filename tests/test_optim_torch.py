"""The methods as citizens of torch.optim: foreign loops, schedulers, closures, checkpoints, fake tensors."""

import copy
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from thriftlab.optim import METHODS, AdamW, Frugal, Method, SignSGD, predicted_state_bytes, state_bytes

SHAPES = {"a": (6, 8), "b": (8, 6), "bias": (8,), "c": (4, 4), "d": (5, 3), "wide": (2, 3, 4)}
GAP = 4


class Halves:
    """A subspace of one's own: the mean of each pair of columns, and an int32 index to carry along."""

    def refresh(self, grad, name, count, generator):
        flip = torch.randperm(grad.shape[1] // 2, generator=generator).to(torch.int32)
        return {"flip": flip, "odd": torch.tensor([grad.shape[1] % 2], dtype=torch.uint8)}

    def down(self, grad, basis):
        n = len(basis["flip"])
        return (grad[:, : 2 * n : 2] + grad[:, 1 : 2 * n : 2])[:, basis["flip"].long()] / 2**0.5

    def up(self, small, basis):
        pairs = torch.zeros_like(small)
        pairs[:, basis["flip"].long()] = small
        whole = pairs.repeat_interleave(2, dim=1) / 2**0.5
        return torch.nn.functional.pad(whole, (0, int(basis["odd"])))


def frugal(params, **hyper):
    return Frugal(params, **{"lr": 0.01, "gap": GAP, **hyper})


MAKERS = {
    "adamw": lambda params, **k: AdamW(params, **{"lr": 0.01, **k}),
    "signsgd": lambda params, **k: SignSGD(params, **{"lr": 0.01, **k}),
    "blocks": lambda params, **k: frugal(params, **{"density": 0.5, **k}),
    "random blocks": lambda params, **k: frugal(params, order="random", **k),
    "columns": lambda params, **k: frugal(params, subspace="columns", **k),
    "rows, keep": lambda params, **k: frugal(params, subspace="rows", on_refresh="keep", density=0.5, **k),
    "coordinates, project": lambda params, **k: frugal(params, subspace="coordinates", on_refresh="project", **k),
    "lion": lambda params, **k: frugal(params, subspace="columns", rule="lion", free="sgd", density=0.5, **k),
    "own": lambda params, **k: frugal(params, subspace=Halves(), **k),
}
every_method = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def parameters(dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype)) for name, shape in SHAPES.items()
    }


def gradient(name, step):
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(step * 100 + list(SHAPES).index(name)))


def train(params, optimizer, steps):
    for t in steps:
        for name, p in params.items():
            p.grad = gradient(name, t).to(p.dtype)
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_every_registered_method_is_tested_here():
    assert {type(make(parameters().values())) for make in MAKERS.values()} == set(METHODS.values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs(dtype, weight_decay):
    ours, theirs = parameters(dtype), parameters(dtype)
    hyper = dict(lr=0.01, betas=(0.8, 0.9), eps=1e-4, weight_decay=weight_decay)
    peer = torch.optim.AdamW(theirs.values(), fused=True, **hyper)
    assert same(train(ours, AdamW(ours.values(), **hyper), range(10)), train(theirs, peer, range(10)))


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
def test_resume_is_bitwise_at_any_step(make):
    """Through weights_only files, with another global generator, for steps on and off the refresh."""
    whole_params = parameters()
    torch.manual_seed(1)
    want = train(whole_params, make(whole_params.values()), range(11))
    for stop in range(11):
        params = parameters()
        optimizer = make(params.values())
        train(params, optimizer, range(stop))
        torch.manual_seed(stop)
        fresh = make(params.values())
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert same(want, train(params, fresh, range(stop, 11))), stop


@every_method
def test_state_is_tensors_and_loads_with_its_own_dtype(make):
    params = parameters(torch.bfloat16)
    optimizer = make(params.values())
    train(params, optimizer, range(6))
    fresh = make(params.values())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for p in params.values():
        old, new = optimizer.state[p], fresh.state[p]
        assert same(old, new)
        assert all(old[key].dtype == new[key].dtype for key in old)
    fresh.load_state_dict(optimizer.state_dict())
    for p in params.values():
        pairs = [(value, fresh.state[p][key]) for key, value in optimizer.state[p].items() if value.numel()]
        assert all(a.data_ptr() != b.data_ptr() for a, b in pairs), "two optimizers would share their state"


def test_a_moment_in_another_dtype_stays_in_it():
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params.values())
    train(params, optimizer, range(2))
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.full((6, 8), 1 + 2**-20)
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params["a"]]["exp_avg"], torch.full((6, 8), 1 + 2**-20))


@every_method
def test_named_state_loads_by_name(make):
    params = parameters()
    stop = GAP + 3  # the rest has no refresh, at which ordered blocks would follow the order of the names
    params = parameters()
    optimizer = make(params.items())
    halfway = train(params, optimizer, range(stop))
    saved = through_a_file(optimizer.state_dict())
    want = train(params, optimizer, [stop])
    reverse = {name: torch.nn.Parameter(halfway[name]) for name in reversed(SHAPES)}
    other = make(reverse.items())
    other.load_state_dict(saved)
    assert other.param_groups[0]["names"] == list(reverse)
    assert same(want, train(reverse, other, [stop]))


def test_state_of_other_parameters_is_refused_by_name():
    params = parameters()
    saved = AdamW(params.items()).state_dict()
    params["stranger"] = params.pop("a")
    with pytest.raises(ValueError, match="'a'"):
        AdamW(params.items()).load_state_dict(saved)
    positional = AdamW(list(params.values()))
    positional.load_state_dict(saved)
    assert positional.param_groups[0]["names"] == list("012345")
    with pytest.raises(ValueError, match="size"):
        AdamW(list(params.values())[:3]).load_state_dict(saved)
    with pytest.raises(ValueError, match="1 parameter groups, this optimizer has 6"):
        AdamW([{"params": [p]} for p in params.values()]).load_state_dict(saved)


@every_method
def test_randomness_is_private_and_keyed_by_name(make):
    """Neither reads nor moves the global generator; the order of parameters does not matter (but to ordered blocks)."""
    params, others = parameters(), dict(reversed(parameters().items()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    got = train(params, make(params.items()), range(10))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    if make is not MAKERS["blocks"]:
        assert same(got, dict(reversed(train(others, make(others.items()), range(10)).items())))


def test_the_seed_and_the_name_choose_the_subspace():
    def index(seed, name):
        p = torch.nn.Parameter(torch.zeros(4, 50))
        p.grad = torch.ones_like(p)
        optimizer = Frugal([(name, p)], subspace="columns", seed=seed)
        optimizer.step()
        return tuple(optimizer.state[p]["basis.index"].tolist())

    assert index(0, "a") == index(0, "a")
    assert len({index(0, "a"), index(0, "b"), index(1, "a")}) == 3


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
    train(params, optimizer, [2])
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
    with pytest.raises(ValueError, match="project"):
        Frugal([torch.nn.Parameter(torch.zeros(2, 2))], subspace=Halves(), on_refresh="project")


def test_the_callers_group_is_not_changed():
    group = {"params": [torch.nn.Parameter(torch.zeros(2))]}
    AdamW([group])
    assert list(group) == ["params"]


@every_method
def test_copies_and_objects_in_groups(make):
    params = parameters()
    optimizer = make(params.values())
    train(params, optimizer, range(3))
    both = copy.deepcopy((params, optimizer))
    assert same(train(params, optimizer, range(3, 9)), train(*both, range(3, 9)))


def test_own_objects_survive_loading_and_are_named_in_the_file():
    params, own = parameters(), Halves()
    optimizer = Frugal(params.values(), subspace=own, order=sorted_names)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["subspace"] == "Halves" and saved["param_groups"][0]["order"] == "function"
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["subspace"] is own and optimizer.param_groups[0]["order"] is sorted_names
    with pytest.raises(ValueError, match="subspace='Halves'"):
        Frugal(params.values()).load_state_dict(saved)


def sorted_names(names, count):
    return sorted(names)[:1]


@every_method
def test_update_is_a_function_of_its_arguments(make):
    """Whoever holds a matrix, its gradient and its state may step it: here one by one, in another order, elsewhere."""
    params = parameters()
    optimizer = make(params.items())
    (group,) = optimizer.param_groups
    mine = {name: p.detach().clone() for name, p in params.items()}
    states = {name: {} for name in mine}
    for t in range(10):
        train(params, optimizer, [t])
        for name in reversed(mine):
            optimizer.update([name], [mine[name]], [gradient(name, t)], [states[name]], group)
    assert same(mine, params)
    assert all(same(states[name], optimizer.state[p]) for name, p in params.items())


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_as_declared(make, dtype):
    params = parameters(dtype)
    params["frozen"] = torch.nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    optimizer = make(params.items())
    declared = predicted_state_bytes(optimizer)
    del params["frozen"]
    for t in range(10):
        train(params, optimizer, [t])
        if t == 0:
            assert state_bytes(optimizer) == declared, "known before the first step"
        assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
        for name, p in params.items():
            spec = optimizer.expected_spec(name, p, optimizer.param_groups[0])
            state = optimizer.state[p]
            assert spec == {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
            for value in state.values():
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_specs_are_the_papers_formulas():
    m, n, rho, b = 40, 24, 0.25, 4

    def size(spec):
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in spec.values() if shape)

    def frugal(**hyper):
        return size(Frugal(p, density=rho, **hyper).spec((m, n), torch.float32))

    p = [torch.nn.Parameter(torch.zeros(2))]
    assert size(AdamW(p).spec((m, n), torch.float32)) == 2 * m * n * b
    assert SignSGD(p).spec((m, n), torch.float32) == {}
    assert frugal(subspace="blocks") == 2 * m * n * b
    assert frugal(subspace="columns") == 2 * m * 6 * b + 4 * 6
    assert frugal(subspace="rows") == 2 * 10 * n * b + 4 * 10
    assert frugal(subspace="coordinates") == 2 * 240 * b
    assert frugal(subspace="rows", rule="lion") == 10 * n * b + 4 * 10


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
        def __init__(self, params, lr=0.1, maximize=False):
            super().__init__(params, lr=lr, maximize=maximize)

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
        with pytest.raises(ValueError, match="already a method 'test-momentum'"):
            type("Other", (Method,), {}, name="test-momentum")
    finally:
        del METHODS["test-momentum"]
