"""State and randomness: files and back to the bit, by name, in its own dtype, of the declared size, keyed by name."""

import copy

import pytest
import torch

from tests.tools.methods import (
    GAP,
    MAKERS,
    SHAPES,
    Halves,
    every_method,
    gradient,
    parameters,
    same,
    through_a_file,
    train,
)
from thriftlab.optim import AdamW, Frugal, SignSGD, predicted_state_bytes, state_bytes


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
    assert positional.param_groups[0]["names"] == saved["param_groups"][0]["names"]  # randomness is keyed by them
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


def test_the_seed_the_name_and_the_count_choose_the_subspace():
    def index(seed, name, count=0):
        p = torch.nn.Parameter(torch.zeros(4, 50))
        p.grad = torch.ones_like(p)
        optimizer = Frugal([(name, p)], subspace="columns", seed=seed, gap=1)
        for _ in range(count + 1):
            optimizer.step()
        return tuple(optimizer.state[p]["basis.index"].tolist())

    assert index(0, "a") == index(0, "a")
    assert len({index(0, "a"), index(0, "b"), index(1, "a"), index(0, "a", 1)}) == 4


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
