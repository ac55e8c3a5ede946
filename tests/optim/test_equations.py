"""Every method against a slow float64 reference written from the equations: entry by entry, in Python floats."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests.tools.equations import ReferenceEntries, ReferenceOrder
from thriftlab.optim import AdamW, Frugal, SignSGD
from thriftlab.optim.state.blocks import active_blocks
from thriftlab.optim.state.coordinates import COORDINATES
from thriftlab.optim.state.keys import keyed_seed
from thriftlab.optim.state.subspaces import basis_of

STEPS, GAP = 27, 8  # refreshes before steps 0, 8, 16 and 24
SHAPES = {"a": (6, 8), "b": (8, 5), "bias": (7,), "c": (4, 4), "d": (5, 3), "e": (3, 6), "f": (4, 7)}
MATRICES = [name for name, shape in SHAPES.items() if len(shape) == 2]
HYPER = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)
EXACT = 1e-12  # 27 steps of some 20 operations on numbers below 10, each wrong by at most 1e-16 of its value


def problem(seed: int = 0, shapes=SHAPES):
    """Parameters, and for each step a gradient for each; some gradient entries are exactly zero."""
    rng = np.random.default_rng(seed)
    params = {name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for name, shape in shapes.items()}
    grads = []
    for _ in range(STEPS):
        step = {name: torch.tensor(rng.normal(size=shape)) for name, shape in shapes.items()}
        for g in step.values():
            g.view(-1)[0] = 0.0
        grads.append(step)
    return params, grads


def set_grads(params, grads):
    for name, p in params.items():
        p.grad = grads[name].to(p.dtype)


def assert_equal(params, references):
    for name, reference in references.items():
        want = torch.tensor(reference.w, dtype=torch.float64).view(SHAPES[name])
        assert torch.allclose(params[name], want, rtol=EXACT, atol=EXACT), name


def test_adamw():
    params, grads = problem()
    optimizer = AdamW(params.items(), **HYPER)
    references = {name: ReferenceEntries(p, **HYPER) for name, p in params.items()}
    for reference in references.values():
        reference.refresh(list(range(len(reference.w))))
    for step in grads:
        set_grads(params, step)
        optimizer.step()
        for name, reference in references.items():
            reference.step(step[name])
        assert_equal(params, references)


def test_signsgd():
    params, grads = problem()
    optimizer = SignSGD(params.items(), lr=0.02, weight_decay=0.1)
    references = {name: ReferenceEntries(p, free="sign", **HYPER) for name, p in params.items()}
    for step in grads:
        set_grads(params, step)
        optimizer.step()
        for name, reference in references.items():
            reference.step(step[name])
        assert_equal(params, references)


def run_frugal(params, grads, chosen, references, on_refresh="reset", **hyper):
    """Steps FRUGAL and its references together; chosen(optimizer, name, count) are the flat state-full positions."""
    optimizer = Frugal(params.items(), gap=GAP, on_refresh=on_refresh, **HYPER, **hyper)
    for t, step in enumerate(grads):
        set_grads(params, step)
        optimizer.step()
        for name, reference in references.items():
            if name not in MATRICES:
                if t == 0:
                    reference.refresh(list(range(len(reference.w))))
            elif t % GAP == 0:
                reference.refresh(chosen(optimizer, name, t // GAP), on_refresh)
            reference.step(step[name])
        assert_equal(params, references)
    return optimizer


def make_references(params, rule="adam", free="sign", scale=1.0, free_scale=1.0):
    split = dict(rule=rule, free=free, scale=scale, free_scale=free_scale)
    return {name: ReferenceEntries(p, **HYPER, **(split if name in MATRICES else {})) for name, p in params.items()}


def chosen_entries(optimizer, name, count):
    """The entries that the basis in the state says, spelled out for each subspace."""
    (group,) = optimizer.param_groups
    weight = dict(zip(group["names"], group["params"], strict=True))[name]
    state = optimizer.state[weight]
    positions = torch.arange(weight.numel()).view(weight.shape)
    if group["subspace"] == "coordinates":
        return COORDINATES["coordinates"](group["density"]).where(weight, basis_of(state)).tolist()
    index = state["basis.index"].tolist()
    return (positions[:, index] if group["subspace"] == "columns" else positions[index]).flatten().tolist()


@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("rule", ["adam", "lion", "sgdm"])
@pytest.mark.parametrize("subspace", ["columns", "rows", "coordinates"])
def test_frugal_in_entries(subspace, rule, free):
    params, grads = problem()
    references = make_references(params, rule, free, scale=0.5, free_scale=0.3)
    run_frugal(
        params, grads, chosen_entries, references,
        subspace=subspace, density=0.4, rule=rule, free=free, split_lr_scale=0.5, free_lr_scale=0.3,
    )  # fmt: skip


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
@pytest.mark.parametrize("subspace", ["columns", "rows", "coordinates"])
def test_frugal_carries_moments_over_a_refresh(subspace, on_refresh):
    params, grads = problem()
    run_frugal(params, grads, chosen_entries, make_references(params), on_refresh, subspace=subspace, density=0.5)


@pytest.mark.parametrize("rule", ["adam", "lion", "sgdm"])
@pytest.mark.parametrize("order", ["ascending", "descending", "mirror", "random", "own"])
def test_frugal_in_blocks(order, rule):
    params, grads = problem()
    if order == "own":
        sets = [{"a"}, {"a", "b", "c"}, set(), {"f"}]
        argument = lambda names, count: sorted(sets[count])  # noqa: E731
    elif order == "random":
        argument = "random"
        sets = [set(sorted(MATRICES, key=lambda name: keyed_seed(3, name, count))[:4]) for count in range(4)]
    else:
        argument, cursor = order, ReferenceOrder(order, MATRICES, 4)
        sets = [cursor.next() for _ in range(4)]

    def chosen(optimizer, name, count):
        return list(range(math.prod(SHAPES[name]))) if name in sets[count] else []

    references = make_references(params, rule, "sign", scale=0.5, free_scale=0.3)
    optimizer = run_frugal(
        params, grads, chosen, references,
        subspace="blocks", density=0.6, order=argument, rule=rule, seed=3, split_lr_scale=0.5, free_lr_scale=0.3,
    )  # fmt: skip
    stateful = {name for name in MATRICES if any(t.ndim for t in optimizer.state[params[name]].values())}
    assert stateful == sets[3], "state-free matrices have no moments"


@pytest.mark.parametrize("on_refresh", ["keep", "project"])
def test_blocks_that_stay_active_keep_their_moments_and_others_start_anew(on_refresh):
    params, grads = problem()
    sets = [{"a", "b"}, {"b", "c"}, {"b", "d"}, {"a", "b"}]
    references = make_references(params)
    optimizer = Frugal(params.items(), gap=GAP, order=lambda names, count: sets[count], on_refresh=on_refresh, **HYPER)
    for t, step in enumerate(grads):
        set_grads(params, step)
        optimizer.step()
        for name, reference in references.items():
            if t == 0 or (name in MATRICES and t % GAP == 0):
                whole = list(range(len(reference.w)))
                stays = t and name in sets[t // GAP] & sets[t // GAP - 1]
                active = name not in MATRICES or name in sets[t // GAP]
                if not stays:
                    reference.refresh(whole if active else [])
            reference.step(step[name])
        assert_equal(params, references)


@pytest.mark.parametrize("free", ["sign", "sgd", "none"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_frugal_in_a_subspace_of_ones_own(side, free):
    """A rotating orthonormal basis, with the paper's three lines in dense float64 algebra."""
    shape, rank = (7, 5), 2
    rng = np.random.default_rng(5)
    bases = [np.linalg.qr(rng.normal(size=(shape[side == "right"], rank)))[0] for _ in range(4)]

    class Rotating:
        def refresh(self, grad, name, count, generator):
            return {"p": torch.tensor(bases[count])}

        def down(self, grad, basis):
            return basis["p"].T @ grad if side == "left" else grad @ basis["p"]

        def up(self, small, basis):
            return basis["p"] @ small if side == "left" else small @ basis["p"].T

    params, grads = problem(1, {"w": shape})
    w, (b1, b2), lr = params["w"].detach().numpy().copy(), HYPER["betas"], HYPER["lr"]
    scales = dict(split_lr_scale=0.5, free_lr_scale=0.3)
    optimizer = Frugal(params.items(), subspace=Rotating(), gap=GAP, free=free, **scales, **HYPER)
    for t in range(STEPS):
        set_grads(params, grads[t])
        optimizer.step()
        if t % GAP == 0:
            p, m, v, k = bases[t // GAP], 0.0, 0.0, 0
        g, k = grads[t]["w"].numpy(), k + 1
        r = p.T @ g if side == "left" else g @ p
        m, v = b1 * m + (1 - b1) * r, b2 * v + (1 - b2) * r * r
        n = m / (1 - b1**k) / (np.sqrt(v / (1 - b2**k)) + HYPER["eps"])
        up = (lambda x: p @ x) if side == "left" else (lambda x: x @ p.T)  # noqa: B023
        residual = g - up(r)
        rest = {"sign": np.sign(residual), "sgd": residual, "none": 0.0}[free]
        w = (1 - lr * HYPER["weight_decay"]) * w - lr * 0.5 * (up(n) + 0.3 * rest)
        assert np.allclose(params["w"].detach().numpy(), w, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("subspace", ["blocks", "columns", "rows", "coordinates"])
@pytest.mark.parametrize(("density", "peer"), [(1.0, AdamW), (0.0, SignSGD)])
def test_frugal_at_its_two_ends_is_adamw_and_signsgd_to_the_bit(subspace, density, peer):
    ours, grads = problem()
    theirs, _ = problem()
    frugal = Frugal([ours[name] for name in MATRICES], lr=0.02, subspace=subspace, density=density, gap=1000)
    other = peer([theirs[name] for name in MATRICES], lr=0.02)
    for step in grads:
        for params, optimizer in ((ours, frugal), (theirs, other)):
            set_grads(params, step)
            optimizer.step()
    assert all(torch.equal(ours[name], theirs[name]) for name in MATRICES)


def test_orders_are_functions_of_names_and_count():
    names = [f"n{i}" for i in range(9)]
    for order, density, count in itertools.product(["ascending", "descending"], [0.0, 0.3, 1.0], range(20)):
        cursor = ReferenceOrder(order, names, round(density * 9))
        for _ in range(count):
            cursor.next()
        assert active_blocks(names, density, order, 0, count) == cursor.next()
    random = [active_blocks(names, 0.3, "random", 0, count) for count in range(200)]
    assert all(len(chosen) == 3 for chosen in random)
    assert random == [active_blocks(names[::-1], 0.3, "random", 0, count) for count in range(200)]
    times = [sum(name in chosen for chosen in random) for name in names]
    assert max(abs(n - 200 / 3) for n in times) < 5 * math.sqrt(200 * 1 / 3 * 2 / 3), "not uniform"
    assert active_blocks(["x", "y"], 0.25, "random", 0, 0) == set(), "half to even, as the reference"
    with pytest.raises(ValueError, match="takes blocks in pairs; density=0.3 of 9 blocks is 3"):
        active_blocks(names, 0.3, "mirror", 0, 0)
    with pytest.raises(ValueError, match="not names of the group"):
        active_blocks(names, 0.3, lambda names, count: ["m"], 0, 0)
