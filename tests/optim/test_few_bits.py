"""Every method on weights that are kept in few bits: 16 low bits are fp32, and what is kept does not depend on how."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tests.tools import gang
from tests.tools.methods import GAP, MAKERS, SHAPES, every_method, gradient, parameters, same, through_a_file, train
from tests.tools.scale import batch, distance, make
from thriftlab.optim import AdamW, SignSGD, predicted_state_bytes, split_groups, state_bytes
from thriftlab.optim.core import few_bits
from thriftlab.optim.core.method import downhill
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
def test_bytes_resume_and_one_by_one(make):
    dtype = "bf16+8"
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
def test_pieces_are_the_whole(monkeypatch, kind):
    dtype, shape = "bf16+8", (70, 61)  # six pieces of 640, and less
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
        assert optimizer.state[params["a"]].get("weight.step") == (3 if rounding == "random" else None)
    assert not same(ends[0], ends[1]) and same(ends[2], ends[3]) and not same(ends[0], ends[2])
    assert set(ends[0]) == set(SHAPES)


def test_a_gradient_in_another_layout_is_not_rounded():
    weight = torch.nn.Parameter(torch.zeros(3, 5).T)
    optimizer = AdamW([("w", weight)])
    optimizer.keep_weights("bf16+8")
    assert weight.stride() == (1, 5)
    grad = torch.randn(5, 3)
    assert torch.equal(downhill(weight.detach(), grad, maximize=True), -grad)


@pytest.mark.parametrize("tables", ["ember", "8bit", "adamw"])
def test_tables_by_their_own_rule_in_pieces_too(monkeypatch, tables):
    ends = []
    for piece, bits in ((768, "bf16+16"), (10**6, "bf16+16"), (0, "fp32")):
        monkeypatch.setattr(few_bits, "PIECE", piece)
        weight = torch.nn.Parameter(torch.randn(70, 61, generator=torch.Generator().manual_seed(0)) * 0.02)
        group = {"params": [weight], "names": ["w"], "role": "input"}
        optimizer = MAKERS["columns"]([group], tables=tables, state_dtype="bf16")
        if bits != "fp32":
            optimizer.keep_weights(bits)
        for t in range(3):
            weight.grad_dtype = torch.float32
            weight.grad = torch.randn(70, 61, generator=torch.Generator().manual_seed(t + 1))
            optimizer.step()
        state = {key: value.clone() for key, value in optimizer.state[weight].items() if not key.startswith("weight.")}
        ends.append({"w": joined({"w": weight}, optimizer)["w"], **state})
    assert same(ends[0], ends[1]) and same(ends[0], ends[2])


def test_low_bits_of_two_bytes_and_foreign_states_come_through_a_file():
    params, optimizer = kept(MAKERS["adamw"], "bf16+16")
    feed(params, optimizer, range(2))
    same_weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in params.items()}
    copies, resumed = kept(MAKERS["adamw"], "bf16+16", params=same_weights)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert same(everything(params, optimizer), everything(copies, resumed))
    plain = parameters()
    wide = MAKERS["adamw"](plain.items())
    train(plain, wide, range(2))
    other, narrowed = kept(MAKERS["adamw"], "bf16+8")
    narrowed.load_state_dict(through_a_file(wide.state_dict()))  # of a run in fp32: moments, and no low bits
    for name, p in other.items():
        assert torch.equal(narrowed.state[p]["exp_avg"], wide.state[plain[name]]["exp_avg"])
    feed(other, narrowed, range(2, 4))
    assert state_bytes(narrowed) == predicted_state_bytes(narrowed)


# ------------------------------------------------------------------------------------------------------------- FSDP2

FOREIGN = [("adamw", "bf16+8"), ("columns", "bf16"), ("galore", "bf16+8")]


def foreign(name, weights, shard=None):
    """A loop of one's own on a model that is bf16 throughout; what is stepped at the end, whole."""
    model, _ = make(MAKERS[name])
    model.bfloat16()
    for module in [] if shard is None else [*model.layers, model]:
        shard(module)
    optimizer = MAKERS[name](split_groups(model, [r"\.(attn|mlp)\."]))
    optimizer.keep_weights(weights, "random", 3)
    for step in range(5):
        if step == 3:  # through a file of each rank
            saved = through_a_file(optimizer.rank_state_dict())
            optimizer = MAKERS[name](split_groups(model, [r"\.(attn|mlp)\."]))
            optimizer.load_state_dict(saved)
        if shard is None:
            sums = {}
            for rank in range(2):
                model(*batch(step, rank, 2)).sum().backward()
                for key, p in model.named_parameters():
                    sums[key] = sums.get(key, 0) + p.grad.float()
                    p.grad = None
            for key, p in model.named_parameters():
                p.grad = (sums[key] / 2).bfloat16()
        else:
            model(*batch(step, dist.get_rank(), 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {key: p.detach() if shard is None else p.full_tensor().detach() for key, p in model.named_parameters()}
    return {key: tensor.float().numpy() for key, tensor in whole.items()}


def on_ranks():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    found = [foreign(*case, shard=fully_shard) for case in FOREIGN]
    with pytest.raises(ValueError, match="DTensor of fp32; call keep_weights before fully_shard"):
        model, _ = make(MAKERS["adamw"])
        fully_shard(model)
        AdamW(model.named_parameters()).keep_weights("bf16")
    dist.destroy_process_group()
    return found


@pytest.mark.slow
def test_a_foreign_loop_with_fully_shard_is_one_process():
    for found in gang.ranks(2, on_ranks):
        for case, weights in zip(FOREIGN, found, strict=True):
            assert distance(weights, foreign(*case)) == 0, case
