"""Every method on weights that are kept in few bits: 16 low bits are fp32, and what is kept does not depend on how."""

import itertools

import pytest
import torch

from tests.tools.methods import GAP, MAKERS, SHAPES, every_method, gradient, parameters, same, through_a_file, train
from thriftlab.optim import AdamW, SignSGD, predicted_state_bytes, state_bytes
from thriftlab.optim.core import few_bits
from thriftlab.optim.state.weights import join, split

STEPS = 2 * GAP + 2


def kept(make, dtype, rounding="random", params=None, **hyper):
    params = params or parameters()
    optimizer = make(params.items(), **hyper)
    optimizer.keep_weights(dtype, rounding, seed=5)
    return params, optimizer


def feed(params, optimizer, steps):
    for t in steps:
        for name, p in params.items():
            if p.grad_dtype != torch.float32:
                p.grad_dtype = torch.float32
            p.grad = gradient(name, t)
        optimizer.step()


def joined(params, optimizer):
    return {
        name: join(p.detach(), optimizer.state.get(p, {}).get("weight.low"))
        if p.dtype == torch.bfloat16
        else p.detach()
        for name, p in params.items()
    }


def everything(params, optimizer):
    """Weights and states, with NaN equal to itself."""
    found = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{name}/{key}"] = value.clone().nan_to_num() if value.is_floating_point() else value.clone()
    return found


@every_method
def test_sixteen_low_bits_are_fp32(make):
    plain = parameters()
    ruler = make(plain.items())
    train(plain, ruler, range(STEPS))
    params, optimizer = kept(make, "bf16+16")
    assert {name for name, p in params.items() if p.dtype == torch.float32} == {"bias"}
    feed(params, optimizer, range(STEPS))
    assert same(joined(params, optimizer), {name: p.detach() for name, p in plain.items()})


@every_method
@pytest.mark.parametrize("dtype", ["bf16", "bf16+8"])
def test_bytes_resume_and_one_by_one(make, dtype):
    params, optimizer = kept(make, dtype)
    feed(params, optimizer, range(3))
    assert state_bytes(optimizer) == predicted_state_bytes(optimizer)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    resumed = make(copies.items())
    resumed.keep_weights(dtype, "random", seed=5)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(everything(params, optimizer), everything(copies, resumed))
    feed(params, optimizer, range(3, STEPS))
    for t in range(3, STEPS):  # tensor by tensor
        for name, p in copies.items():
            p.grad_dtype, p.grad = torch.float32, gradient(name, t)
        for group in resumed.param_groups:
            for name, p in zip(group["names"], group["params"], strict=True):
                resumed.step_only([name], [p], group)
    assert same(everything(params, optimizer), everything(copies, resumed))


@pytest.mark.parametrize("dtype", ["bf16", "bf16+8", "bf16+16"])
def test_what_the_model_sees_is_the_split_of_the_first_weights(dtype):
    first = {name: p.detach().clone() for name, p in parameters().items()}
    params, optimizer = kept(MAKERS["adamw"], dtype)
    bits = {"bf16": 0, "bf16+8": 8, "bf16+16": 16}[dtype]
    for name, p in params.items():
        if p.ndim > 1:
            high, low = split(first[name], bits)
            assert torch.equal(p, high) and (low is None or torch.equal(optimizer.state[p]["weight.low"], low))
        else:
            assert torch.equal(p, first[name]) and p not in optimizer.state


@pytest.mark.parametrize("dtype", ["bf16", "bf16+8"])
def test_a_tensor_that_no_rule_moves_keeps_its_bits(dtype):
    params, optimizer = kept(MAKERS["badam"], dtype)
    before = joined(params, optimizer)
    feed(params, optimizer, range(1))
    moved = {name for name, weight in joined(params, optimizer).items() if not torch.equal(weight, before[name])}
    idle = {name for name, p in params.items() if p.ndim == 2 and "exp_avg" not in optimizer.state[p]}
    assert idle and not moved & idle and moved


@pytest.mark.parametrize("kind", ["fp32", "bf16", "8bit", None])
@pytest.mark.parametrize("dtype", ["bf16", "bf16+8"])
def test_pieces_are_the_whole(monkeypatch, kind, dtype):
    shape = (70, 61)  # seven pieces of 640, and less
    ends = []
    for piece in (768, 10**6):
        monkeypatch.setattr(few_bits, "PIECE", piece)
        weight = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02)
        make = AdamW([("w", weight)], weight_decay=0.1, state_dtype=kind) if kind else SignSGD([("w", weight)])
        make.keep_weights(dtype, "random", 1)
        for t in range(4):
            weight.grad_dtype = torch.float32
            weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t + 1))
            make.step()
        assert state_bytes(make) == predicted_state_bytes(make)
        ends.append(everything({"w": weight}, make))
    assert same(*ends)


def test_no_whole_copy_of_a_table_exists():
    from thriftlab.launch.timing import cpu_peak

    weight = torch.nn.Parameter(torch.zeros(2**14, 64))
    optimizer = AdamW([("embed", weight)], state_dtype="8bit")
    optimizer.keep_weights("bf16+8")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert cpu_peak(optimizer.step) <= 48 * few_bits.PIECE < 8 * weight.numel()


def test_bf16_gradients_are_scaled_in_fp32():
    scale, ends = torch.tensor(0.0123456789, dtype=torch.float64), []
    for narrow in (False, True):
        params, optimizer = kept(MAKERS["adamw"], "bf16+16")
        for name, p in params.items():
            grad = gradient(name, 0).bfloat16()
            p.grad_dtype = torch.bfloat16 if narrow else torch.float32
            p.grad = grad if narrow else grad.float()
        optimizer.step(scale=scale)
        ends.append(everything(params, optimizer))
    assert same(*ends)


def test_what_was_bf16_before_begins_without_low_bits():
    params, optimizer = kept(MAKERS["adamw"], "bf16+8", params=parameters(torch.bfloat16))
    assert all("weight.low" not in optimizer.state.get(p, {}) for p in params.values())
    feed(params, optimizer, range(2))
    assert all(optimizer.state[p]["weight.low"].any() for p in params.values() if p.ndim > 1)
    assert state_bytes(optimizer) == predicted_state_bytes(optimizer)


def test_rounding_and_seed_decide_the_bits():
    ends = []
    for rounding, seed in itertools.product(("random", "nearest"), (1, 2)):
        params = parameters()
        optimizer = MAKERS["adamw"](params.items())
        optimizer.keep_weights("bf16", rounding, seed)
        feed(params, optimizer, range(3))
        ends.append(joined(params, optimizer))
        assert ("weight.step" in optimizer.state[params["a"]]) == (rounding == "random")
    assert not same(ends[0], ends[1]) and same(ends[2], ends[3]) and not same(ends[0], ends[2])
    assert set(ends[0]) == set(SHAPES)
