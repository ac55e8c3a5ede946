"""The fused step in triton's interpreter: to the bit against a slow step in numpy, with every launch guarded.

The reference is written from the equations, with one rounding to fp32 where the kernel has one; numpy's root is the
exactly rounded one, torch's on a CPU is not. How moments are kept is the project's own torch code, which has tests
of its own. Then the project's optimizers, by kernels and by plain torch.
"""

import functools
import itertools
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.tools.triton_guard import guard
from thriftlab.kernels import few_bits, fused_step
from thriftlab.optim import AdamW, BAdam, Fira, Frugal, GaLore, SignSGD
from thriftlab.optim.core.fragments import Fragment
from thriftlab.optim.core.fused import Plan, books
from thriftlab.optim.state.keys import hash63, keyed_seed
from thriftlab.optim.state.storage import codebook, load, quantise, random_bits, round_randomly

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
ODD = [(1,), (37,), (5, 259), (0, 4), (3, 256)]
EVEN = [(16, 48), (2, 1040)]
f32 = np.float32


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Kernels are taken, and each launch of a plan is guarded; the names of those that there were."""
    found, step = [], Plan.step

    @functools.wraps(step)
    def guarded(plan, weights, grads, *others):
        mine = [values[i] for values in (weights, grads) for i in plan.places]
        with guard(*mine, *plan.held, *plan.indices) as some:
            step(plan, weights, grads, *others)
        found.extend(some)

    monkeypatch.setenv("THRIFTLAB_KERNELS", "triton")
    monkeypatch.setattr(Plan, "step", guarded)
    return found


# ---------------------------------------------------------------------------------------------------- one tensor


def stored(x: torch.Tensor, low_bits: int, noise=None):
    """High and low bits of fp32 numbers: the split as it is defined, on Python's integers of any size."""
    bits = x.view(torch.int32).long()
    drop = 16 - low_bits
    if drop:
        half = (1 << (drop - 1)) - 1 + (bits >> drop & 1)
        bits = bits + (half if noise is None else noise.long()) >> drop
    high = bits if not low_bits else bits + (1 << (low_bits - 1)) >> low_bits
    low = {8: torch.int8, 16: torch.int16}.get(low_bits)
    return high.to(torch.int16).view(torch.bfloat16), low and (bits - (high << low_bits)).to(low)


def joined(high: torch.Tensor, low: torch.Tensor | None, low_bits: int):
    bits = high.view(torch.int16).long()
    bits = (bits << low_bits) + (0 if low is None else low.long()) << 16 - low_bits
    return bits.to(torch.int32).view(torch.float32)


def adam(w, g, m, v, age):
    """One step of flat numpy arrays, every product and sum rounded to fp32."""
    b1, b2 = BETAS
    m = m + f32(1 - b1) * (g - m)
    v = f32(b2) * v + f32(1 - b2) * g * g
    length, root = f32(LR / (1 - b1**age)), f32(1 / np.sqrt(1 - b2**age))
    return w * f32(1 - LR * DECAY) - length * m / (np.sqrt(v) * root + f32(EPS)), m, v


def put_moment(state, key, x, rounds):
    """A moment as it is kept, from numbers."""
    kept = state[key]
    if kept.dtype == torch.uint8:
        state[key], state[f"{key}.scale"] = quantise(x, positive=key == "exp_avg_sq")
    elif kept.dtype == torch.bfloat16 and key == "exp_avg_sq":
        bits = random_bits(state["rounding"], torch.tensor(rounds), 0, len(x), x.device)
        state[key] = round_randomly(x, bits)
    else:
        state[key] = x.to(kept.dtype)


def bits_of(x):
    return x.reshape(-1).view(torch.int16) if x.dtype == torch.bfloat16 else x.reshape(-1)


def same(found, expected, what):
    assert torch.equal(bits_of(found).nan_to_num(7.0), bits_of(expected).nan_to_num(7.0)), what


KEPT = ("fp32", "bf16", "8bit")
WEIGHTS = [("fp32", "nearest", torch.float32), ("bf16", "random", torch.bfloat16), ("bf16", "nearest", torch.float32),
           ("bf16+8", "random", torch.bfloat16), ("bf16+8", "nearest", torch.float32),
           ("bf16+16", "nearest", torch.bfloat16)]  # fmt: skip
LOW = {"fp32": -1, "bf16": 0, "bf16+8": 8, "bf16+16": 16}


def case(shapes, kept, weight, rounding, gradient, seed=0):
    """Names, weights, gradients, states and the group of tensors in the midst of a run."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda shape: torch.randn(shape, generator=g)  # noqa: E731
    names, weights, grads, states, wide = [], [], [], [], []
    for i, shape in enumerate(shapes):
        w, n = draw(shape) * 0.02, int(np.prod(shape))
        grad = (draw(shape) * 10.0 ** torch.randint(-4, 1, shape, generator=g)).to(gradient)
        grad.view(-1)[: n // 9] = 0
        moments = {"exp_avg": draw(n) * 1e-2, "exp_avg_sq": draw(n) ** 2 * 1e-4}
        state = {"step": torch.tensor(float(3 + i)), "rounding": torch.tensor(keyed_seed(0, f"t{i}", 0))}
        for key, moment in moments.items():
            state[key] = torch.empty(
                0, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[kept]
            )
            put_moment(state, key, moment, 1)
            state[key] = state[key].view(shape)
        if kept != "bf16":
            del state["rounding"]
        if (low_bits := LOW[weight]) >= 0:
            high, low = stored(w, low_bits)
            w, state["weight.step"] = joined(high, low, low_bits), torch.tensor(5 + i)
            state |= {} if low is None else {"weight.low": low}
            if rounding == "nearest" or low_bits == 16:
                del state["weight.step"]
        names.append(f"t{i}")
        weights.append(high if low_bits >= 0 else w.clone())
        grads.append(grad)
        states.append(state)
        wide.append(w)
    group = dict(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, seed=0, maximize=False, names=names, params=weights,
                 state_dtype=kept)  # fmt: skip
    if weight != "fp32":
        group |= dict(weight_dtype=weight, weight_rounding=rounding, weight_seed=0)
    return names, weights, grads, states, group, wide


def copies(values):
    return [{k: x.clone() for k, x in v.items()} if isinstance(v, dict) else v.clone() for v in values]


def everything(weights, states):
    return [*weights, *(x for state in states for x in state.values())]


@pytest.mark.parametrize("shapes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("weight, rounding, gradient", WEIGHTS)
@pytest.mark.parametrize("kept", KEPT)
def test_adamw_is_the_equation_to_the_bit(launches, kept, weight, rounding, gradient, shapes):
    names, weights, grads, states, group, wide = case(shapes, kept, weight, rounding, gradient)
    before = copies(states)
    expected = []
    for i, state in enumerate(before):
        m, v = (load(state, key).reshape(-1).numpy() for key in ("exp_avg", "exp_avg_sq"))
        age = int(state["step"]) + 1
        g = grads[i].float().reshape(-1).numpy() * f32(0.5)
        w, m, v = (torch.from_numpy(np.asarray(x)) for x in adam(wide[i].reshape(-1).numpy(), g, m, v, age))
        put_moment(state, "exp_avg", m, age - 1), put_moment(state, "exp_avg_sq", v, age - 1)
        noise = None
        if "weight.step" in state:
            key = torch.tensor(keyed_seed(0, f"{names[i]}/weight", 0))
            noise = random_bits(key, state["weight.step"] + 1, 0, len(w), w.device) >> LOW[weight]
        expected.append((state, (w, None) if LOW[weight] < 0 else stored(w, LOW[weight], noise)))
    optimizer = AdamW([torch.zeros(1, requires_grad=True)])
    full = [i for i, w in enumerate(weights) if w.numel()]
    args = ([values[i] for i in full] for values in (names, weights, grads, states))
    optimizer.apply(*args, group, scale=torch.tensor(0.5))
    assert launches[0] == "begin_step" and set(launches[1:]) == {"step_entries"}
    assert len(launches) == (2 if shapes is EVEN else 3)  # what is even at least begins and ends so
    for i in full:
        state, (high, low) = expected[i]
        same(weights[i], high, f"weight {i}")
        for key in [key for key in ("exp_avg", "exp_avg_sq", "exp_avg.scale", "exp_avg_sq.scale") if key in state]:
            same(states[i][key], state[key], f"{key} {i}")
        if low is not None:
            same(states[i]["weight.low"], low, f"low {i}")
        assert states[i]["step"] == state["step"] + 1
        assert "weight.step" not in state or states[i]["weight.step"] == state["weight.step"] + 1


# ---------------------------------------------------------------------------------------------------- codes


@triton.jit
def codes_of(x, out, book, SIGNED: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + at, few_bits.encode(tl.load(x + at), book + (0 if SIGNED else few_bits.BOOK), SIGNED))


@pytest.mark.parametrize("positive", [False, True])
def test_codes_are_those_of_quantise_at_every_border_and_between(positive):
    levels = codebook(positive, "cpu")
    borders = (levels[1:] + levels[:-1]) / 2
    near = [
        torch.from_numpy(x.numpy().view(np.int32) + d).view(torch.float32)
        for x in (borders, levels)
        for d in range(-3, 4)
    ]
    some = [torch.rand(5000, generator=torch.Generator().manual_seed(1)) ** p for p in (1, 4, 12)]
    x = torch.cat([*near, *some, 10.0 ** -torch.arange(9.0), torch.tensor([0.0, -0.0, 1.0, 1e-40])])
    x = x[~x.isnan()].abs().clamp(max=1)
    x = x if positive else torch.cat([x, -x])
    x = torch.cat([x, torch.zeros(-len(x) % 4096)])
    found = torch.zeros(len(x), dtype=torch.int32)
    with guard():
        codes_of[(len(x) // 4096,)](x, found, books(x.device, None), SIGNED=not positive, N=4096)
    blocks = torch.cat([x[:, None], torch.ones(len(x), 1), torch.zeros(len(x), 254)], 1)
    assert torch.equal(found, quantise(blocks.flatten(), positive)[0].view(-1, 256)[:, 0].int())


@triton.jit
def keys_of(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, few_bits.hash63(tl.load(x + at)))


def test_keys_are_those_of_torch():
    x = torch.randint(-(2**63), 2**63 - 1, (1024,), generator=torch.Generator().manual_seed(0))
    found = torch.zeros_like(x)
    keys_of[(1,)](x, found, N=1024)
    assert torch.equal(found, hash63(x))


# ------------------------------------------------------------------------------------------- skips, NaN, fragments


@pytest.mark.parametrize("by", ["skip", "applied"])
def test_a_refused_step_leaves_every_bit(launches, by):
    for kept, (weight, rounding, gradient) in zip(KEPT, WEIGHTS[::2], strict=True):
        names, weights, grads, states, group, _ = case(EVEN, kept, weight, rounding, gradient)
        before = copies(weights), copies(states)
        words = {"skip": torch.ones(())} if by == "skip" else {}
        group |= {"applied": torch.zeros(())} if by == "applied" else {}
        AdamW([torch.zeros(1, requires_grad=True)]).apply(names, weights, grads, states, group, **words)
        assert launches
        for now, old in zip(everything(weights, states), everything(*before), strict=True):
            same(now, old, kept)


def test_a_nan_spoils_its_own_entry_and_block():
    names, weights, grads, states, group, _ = case([(2, 512)], "8bit", "fp32", "nearest", torch.float32)
    grads[0][0, 300] = torch.nan
    AdamW([torch.zeros(1, requires_grad=True)]).apply(names, weights, grads, states, group)
    for key in ("exp_avg", "exp_avg_sq"):
        assert states[0][f"{key}.scale"].isnan().tolist() == [False, True, False, False]
    assert weights[0].isnan().nonzero().tolist() == [[0, 300]]


CUTS = [(0, 704), (704, 705), (705, 1024), (1024, 2048)]


@pytest.mark.parametrize("kept, weight", [("fp32", "fp32"), ("bf16", "bf16+8"), ("bf16", "bf16")])
def test_fragments_are_the_whole(launches, kept, weight):
    names, weights, grads, states, group, _ = case([(8, 256)], kept, weight, "random", torch.float32)
    found = []
    for cuts in ([(0, 2048)], CUTS):
        mine = [{k: x.clone() for k, x in states[0].items()} for _ in cuts]
        for (a, b), state in zip(cuts, mine, strict=True):
            state.update({k: x.view(-1)[a:b].clone() for k, x in state.items() if x.ndim})
            state.update({"whole.first": torch.tensor(a), "whole.size": torch.tensor(2048)})
        pieces = [weights[0].view(-1)[a:b].clone() for a, b in cuts]
        slopes = [grads[0].view(-1)[a:b].clone() for a, b in cuts]
        for _ in range(2):
            fragments = [Fragment("t0", (8, 256), a, b) for a, b in cuts]
            AdamW([torch.zeros(1, requires_grad=True)]).apply_fragments(fragments, pieces, slopes, mine, group)
        keys = [k for k, x in mine[0].items() if x.ndim]
        found.append([torch.cat(pieces), *(torch.cat([state[k] for state in mine]) for k in keys)])
    for whole, cut in zip(*found, strict=True):
        same(cut, whole, "fragments")


# ------------------------------------------------------------------------------------------- the project's optimizers


def run(monkeypatch, way, make, shapes, steps=4, refuse=(), **options):
    """Weights and states after a few steps, some of them refused."""
    monkeypatch.setenv("THRIFTLAB_KERNELS", way)
    g = torch.Generator().manual_seed(3)
    ps = [torch.nn.Parameter(torch.randn(shape, generator=g) * 0.02) for shape in shapes]
    optimizer = make([(f"t{i}", p) for i, p in enumerate(ps)], lr=LR, weight_decay=DECAY, **options)
    for step in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step(applied=torch.tensor(0.0 if step in refuse else 1.0), scale=torch.tensor(0.5))
    return [p.detach() for p in ps], [optimizer.state.get(p, {}) for p in ps]


MIXED = [(16, 48), (5, 259), (40,), (2, 512)]
OPTIMIZERS = {
    "adamw": (AdamW, {}),
    "signs": (SignSGD, {}),
    "blocks": (Frugal, dict(density=0.5, gap=3, free_lr_scale=0.3)),
    "blocks, sgd": (Frugal, dict(density=0.5, gap=3, free="sgd", split_lr_scale=0.7)),
    "columns": (Frugal, dict(subspace="columns", gap=3)),
    "columns, nothing": (Frugal, dict(subspace="columns", gap=3, free="none")),
    "rows": (Frugal, dict(subspace="rows", gap=3, density=0.4)),
    "rows, sgd": (Frugal, dict(subspace="rows", gap=4, free="sgd", stagger=True)),
    "badam": (BAdam, dict(gap=3, density=0.5, unit="tensor")),
    "galore": (GaLore, dict(rank=4, gap=3)),
    "fira": (Fira, dict(rank=4, gap=3)),
}


BOUNDS = {"galore": 2e-5, "fira": 2e-5}  # whose matrices take the kernels of norm_rows.py


@pytest.mark.parametrize(
    "name, kept", [*((name, "fp32") for name in OPTIMIZERS), *itertools.product(("adamw", "columns", "rows"), KEPT[1:])]
)
def test_optimizers_step_as_plain_torch_does(monkeypatch, launches, name, kept):
    make, options = OPTIMIZERS[name]
    options = options if name == "signs" else {**options, "state_dtype": kept}
    plain, states = run(monkeypatch, "torch", make, MIXED, refuse=(2,), **options)
    assert not launches
    fused, theirs = run(monkeypatch, "triton", make, MIXED, refuse=(2,), **options)
    assert launches
    for p, q in zip(plain, fused, strict=True):
        bound = 0 if name == "signs" else BOUNDS.get(name, 4e-6) if kept == "fp32" else 2e-3
        assert ((p - q).abs() <= bound * (1e-3 + p.abs())).all()
    for state, other in zip(states, theirs, strict=True):
        assert state.keys() == other.keys()
        assert all(state[key] == other[key] for key in ("step", "start") if key in state)


def test_a_second_run_gives_the_same_bits(monkeypatch):
    for make, options in (OPTIMIZERS["columns"], OPTIMIZERS["blocks"]):
        first, second = (run(monkeypatch, "triton", make, MIXED, state_dtype="bf16", **options)[0] for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_what_changes_between_steps_is_seen(monkeypatch):
    """Other gradients, a moved weight, loaded state, another learning rate or rule: each plan is made for what is."""
    weights = []
    for way in ("torch", "triton"):
        monkeypatch.setenv("THRIFTLAB_KERNELS", way)
        g = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(16, 32, generator=g))
        optimizer = Frugal([("t0", p)], lr=LR, subspace="columns", gap=100)
        for change in range(8):
            p.grad = torch.randn(p.shape, generator=g)
            if change == 2:
                p.data = p.data.clone()
            elif change == 3:
                optimizer.load_state_dict(optimizer.state_dict())
            elif change == 4:
                optimizer.param_groups[0].update(lr=2 * LR, betas=(0.5, 0.5))
            elif change == 5:
                optimizer.param_groups[0]["free"] = "sgd"
            elif change == 6:
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"] * 2
            elif change == 7:
                p.grad = p.grad.t().contiguous().t()
            optimizer.step()
        weights.append(p.detach())
    assert torch.allclose(*weights, rtol=1e-5, atol=1e-6)


def calls_of(step) -> int:
    """How many functions of Python are called."""
    found = []
    sys.setprofile(lambda frame, event, arg: found.append(frame.f_code.co_name) if event == "call" else None)
    try:
        step()
    finally:
        sys.setprofile(None)
    return len(found)


@pytest.mark.parametrize("make, options", [(AdamW, dict(state_dtype="8bit")), (Frugal, dict(subspace="rows", gap=100))])
def test_no_function_of_python_is_called_for_each_tensor(monkeypatch, make, options):
    for kernel in ("begin_step", "step_entries", "step_tiles"):
        monkeypatch.setattr(fused_step, kernel, {(n,): lambda *args, **words: None for n in range(10_000)})
    monkeypatch.setattr(Plan, "step", Plan.step.__wrapped__)
    found = []
    for tensors in (10, 300):
        ps = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in range(tensors)]
        optimizer = make([(f"t{i}", p) for i, p in enumerate(ps)], **options)
        for p in ps:
            p.grad = torch.zeros(8, 16)
        optimizer.step()
        group, states = optimizer.param_groups[0], [optimizer.state[p] for p in ps]
        call = group["names"], ps, [p.grad for p in ps], states, group
        optimizer.apply(*call)
        found.append(calls_of(functools.partial(optimizer.apply, *call)))
    assert found[0] == found[1] < 100
