"""The state of any torch optimizer, through the disk and back: bit for bit, by name."""

import copy

import pytest
import torch
from torch import nn

from thriftlab.data.errors import CheckpointError
from thriftlab.optim import METHODS
from thriftlab.train.backends.optim_state import pack_optimizer, state_trees, unpack_optimizer
from thriftlab.train.checkpoints.reader import latest
from thriftlab.train.checkpoints.writer import Writer

TORCH = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), amsgrad=True),
    "adamw, lr tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2)),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
}
OURS = {name: lambda p, method=method: method(p, lr=1e-2) for name, method in METHODS.items()}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))


def named(model: nn.Module) -> list[dict]:
    names, params = zip(*model.named_parameters(), strict=True)
    return [{"params": list(params), "names": list(names)}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        dtype = next(model.parameters()).dtype
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=draw).to(dtype)).square().sum().backward()
        optimizer.step()


def through_the_disk(folder, model, optimizer) -> tuple[dict, dict, dict]:
    tensors, rest = pack_optimizer(optimizer)
    writer = Writer(folder, keep=1, background=False)
    writer.save(1, {"model": model.state_dict(), "optim": tensors}, {"optim": rest})
    found = latest(folder)
    return found.tensors["model"], found.tensors["optim"], found.meta["optim"]


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert_equal(dict(enumerate(a)), dict(enumerate(b)), where)
    else:
        assert a == b, where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", [*TORCH, *OURS])
def test_resumed_is_the_unbroken_run_bit_for_bit(tmp_path, method, dtype):
    make = {**TORCH, **OURS}[method]
    model = make_model().to(dtype)
    optimizer = make(named(model))
    train(model, optimizer, range(4))
    weights, tensors, rest = through_the_disk(tmp_path, model, optimizer)

    resumed = make_model().to(dtype)
    resumed.load_state_dict(weights)
    other = make(named(resumed))
    for group in other.param_groups:
        group["lr"] = torch.tensor(0.7) if isinstance(group["lr"], torch.Tensor) else 0.7
    unpack_optimizer(other, tensors, rest)
    assert_equal(other.state_dict(), optimizer.state_dict())

    train(model, optimizer, range(4, 8))
    train(resumed, other, range(4, 8))
    assert_equal(dict(resumed.state_dict()), dict(model.state_dict()))
    assert_equal(other.state_dict(), optimizer.state_dict())
    assert_equal(tensors, latest(tmp_path).tensors["optim"], "training wrote into the checkpoint")


def test_the_order_of_parameters_and_groups_may_change():
    model = make_model()
    first, last = (dict([pair]) for pair in model.named_parameters())
    groups = [{"params": list(g.values()), "names": list(g), "lr": lr} for g, lr in ((first, 0.1), (last, 0.2))]
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, range(3))
    other = torch.optim.AdamW([{**group, "lr": 1.0} for group in copy.copy(groups)[::-1]])
    unpack_optimizer(other, *pack_optimizer(optimizer))
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1]
    for parameter in model.parameters():
        assert_equal(other.state[parameter], optimizer.state[parameter])

    backwards = {"params": list(model.parameters())[::-1], "names": [*last, *first]}
    both, reordered = torch.optim.SGD(named(model), momentum=0.9), torch.optim.SGD([backwards], momentum=0.9)
    train(model, both, range(2))
    unpack_optimizer(reordered, *pack_optimizer(both))
    for parameter in model.parameters():
        assert_equal(reordered.state[parameter], both.state[parameter])


class Odd(torch.optim.Optimizer):
    """State of every kind: nested, integer, boolean, plain numbers, one tensor shared by all parameters."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0, "betas": (0.5, 0.5), "dtype": torch.bfloat16, "bound": float("inf")})
        shared = torch.tensor(5)
        for index, parameter in enumerate(p for group in self.param_groups for p in group["params"]):
            self.state[parameter] = {
                "indices": torch.tensor([2**40 + index]),
                "moment": torch.tensor([1 / 3], dtype=torch.float64),
                "flags": torch.tensor([True, False]),
                "basis": {"left": torch.ones(2) / 3, "rest": [torch.zeros(0), 1.5, (True, None)]},
                "calls": 2**70 + index,
                "side": "left",
                "growth": float("inf"),
                "shared": shared,
            }


def test_state_of_every_kind_keeps_its_type_under_bf16_parameters(tmp_path):
    model = make_model().bfloat16()
    optimizer = Odd(named(model))
    _, tensors, rest = through_the_disk(tmp_path, model, optimizer)
    other = Odd(named(model))
    other.state.clear()
    unpack_optimizer(other, tensors, rest)
    assert_equal(other.state_dict(), optimizer.state_dict())
    first, second = other.state.values()
    assert first["shared"] is second["shared"]


def test_without_names_positions_serve():
    model = make_model()
    optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()])
    train(model, optimizer, range(2))
    tensors, rest = pack_optimizer(optimizer)
    assert {key.partition("/")[0] for key in tensors} == {"0", "1"} and "1/exp_avg" in tensors
    assert rest["state"] == {}  # the names of the tensors say it all
    other = torch.optim.Adam([{"params": [p]} for p in model.parameters()])
    unpack_optimizer(other, tensors, rest)
    assert_equal(other.state_dict(), optimizer.state_dict())


def test_a_state_without_and_with_a_tree_is_read_the_same_and_only_where_it_is_owned():
    """One process used to write a tree of every parameter, several ranks none."""
    model = make_model()
    optimizer = torch.optim.Adam(named(model))
    train(model, optimizer, range(2))
    tensors, rest = pack_optimizer(optimizer)
    trees = state_trees(tensors, {})
    assert trees["2.weight"]["exp_avg"] == {"__tensor__": "2.weight/exp_avg"}
    for written in ({}, trees, {"2.weight": {}}):
        other = torch.optim.Adam(named(model))
        unpack_optimizer(other, tensors, {**rest, "state": written})
        assert_equal(other.state_dict(), optimizer.state_dict())
        mine = {key: tensor for key, tensor in tensors.items() if key.startswith("0.")}  # others are not asked for
        half = torch.optim.Adam(named(model))
        unpack_optimizer(half, mine, {**rest, "state": written}, owns=lambda name: name == "0.weight")
        assert list(half.state_dict()["state"]) == [0]


@pytest.mark.parametrize("method", OURS)
def test_the_names_of_tensors_say_all_of_our_methods(method):
    model = make_model()
    optimizer = OURS[method](named(model))
    train(model, optimizer, range(3))
    assert not any(pack_optimizer(optimizer)[1]["state"].values())


def test_other_parameters_are_refused_with_their_names():
    model = make_model()
    packed = pack_optimizer(torch.optim.SGD(named(model)))
    with pytest.raises(CheckpointError, match=r"missing \['0.weight', '2.weight'\], new \['0', '1'\]"):
        unpack_optimizer(torch.optim.SGD(model.parameters()), *packed)
    split = [{"params": [p], "names": [n]} for n, p in model.named_parameters()]
    with pytest.raises(CheckpointError, match="the same parameters in other groups"):
        unpack_optimizer(torch.optim.SGD(split), *packed)
    twice = [{"params": list(model.parameters()), "names": ["a", "a"]}]
    with pytest.raises(CheckpointError, match="one unique name"):
        pack_optimizer(torch.optim.SGD(twice))
