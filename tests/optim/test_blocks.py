"""Blocks of matrices: whole layers, balanced bytes, and BAdam, which is made of them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.equations import ReferenceEntries
from thriftlab.optim import BAdam, Frugal
from thriftlab.optim.state.blocks import active_blocks, layers

NAMES = [f"layers.{i}.{part}.weight" for i in range(8) for part in ("attn.q", "attn.o", "mlp.up")]
SIZES = [16, 16, 40] * 8


def test_layers_are_what_is_alike_up_to_the_first_number():
    names = ["embed.w", "layers.0.attn.1.w", "layers.0.mlp.w", "layers.1.mlp.w", "h.10.a", "h.1.a", "0.w", "0.b", "3"]
    assert layers(names) == [["embed.w"], names[1:3], [names[3]], ["h.10.a"], ["h.1.a"], names[6:8], ["3"]]


@pytest.mark.parametrize("order", ["random", "ascending", "descending", "mirror"])
def test_a_layer_is_active_as_a_whole(order):
    for count in range(6):
        chosen = active_blocks(NAMES, 0.25, order, 0, count, unit="layer")
        numbers = {name.split(".")[1] for name in chosen}
        assert len(numbers) == 2 and len(chosen) == 6
        if order == "descending":
            assert numbers == {str((7 - 2 * count - i) % 8) for i in range(2)}
        if order == "mirror":
            assert numbers == {str(count % 4), str(7 - count % 4)}
        if order == "random":
            assert chosen == active_blocks(NAMES[::-1], 0.25, order, 0, count, unit="layer")


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20), st.floats(0, 1),
    st.sampled_from(["random", "ascending", "descending"]), st.integers(0, 30),
)  # fmt: skip
def test_balanced_bytes_are_the_density_up_to_one_block(sizes, density, order, count):
    names = [f"n{i}" for i in range(len(sizes))]
    size = dict(zip(names, sizes, strict=True))
    chosen = active_blocks(names, density, order, 0, count, balance="bytes", sizes=sizes)
    assert abs(sum(size[name] for name in chosen) - density * sum(sizes)) <= max(sizes) * (1 + 1e-9)


def test_the_largest_share_of_bytes_shrinks_where_they_are_balanced():
    def share(balance):
        for count in range(100):
            chosen = active_blocks(NAMES, 0.25, "random", 0, count, balance=balance, sizes=SIZES)
            yield sum(size for name, size in zip(NAMES, SIZES, strict=True) if name in chosen) / sum(SIZES)

    assert max(share("bytes")) <= 0.25 + 20 / sum(SIZES) < 0.3 < max(share("count"))


@pytest.mark.parametrize("balance", ["count", "bytes"])
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_every_block_comes_equally_often(order, balance):
    times = dict.fromkeys(NAMES, 0)
    for count in range(40):  # at a quarter: ten times round
        for name in active_blocks(NAMES, 0.25, order, 0, count, balance=balance, sizes=SIZES):
            times[name] += 1
    assert set(times.values()) == {10}


def test_frugal_takes_units_and_balance():
    params = {name: torch.nn.Parameter(torch.ones(4, n // 4)) for name, n in zip(NAMES, SIZES, strict=True)}
    for hyper, active in (
        ({"density": 0.1}, 2), ({"density": 0.1, "balance": "bytes"}, 3),
        ({"unit": "layer"}, 6), ({"unit": "layer", "balance": "bytes"}, 6),
    ):  # fmt: skip
        optimizer = Frugal(params.items(), order="ascending", **hyper)
        for p in params.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        stateful = {name for name, p in params.items() if "exp_avg" in optimizer.state[p]}
        assert stateful == set(NAMES[:active]), hyper


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_badam_is_adam_on_one_layer_and_rest_for_the_others(weight_decay):
    rng, gap = np.random.default_rng(0), 5
    shapes = {"embed": (6,), "l.0.a": (3, 4), "l.0.b": (2, 3), "l.1.a": (3, 4), "l.2.a": (4, 2), "l.2.b": (2, 2)}
    hyper = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=weight_decay)
    params = {name: torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for name, shape in shapes.items()}
    references = {name: ReferenceEntries(p, **hyper) for name, p in params.items()}
    optimizer = BAdam(params.items(), density=1 / 3, gap=gap, **hyper)
    references["embed"].refresh(list(range(6)))
    for t in range(4 * gap):
        active = "l." + "2102"[t // gap]
        for name, p in params.items():
            p.grad = torch.tensor(rng.normal(size=shapes[name]))
            if t % gap == 0 and name.startswith(active):
                references[name].refresh(list(range(math.prod(shapes[name]))))
            if name.startswith((active, "embed")):
                references[name].step(p.grad)
        optimizer.step()
        for name, p in params.items():
            want = torch.tensor(references[name].w, dtype=torch.float64).view(shapes[name])
            assert torch.allclose(p, want, rtol=1e-12, atol=1e-12), (t, name)
            assert ("exp_avg" in optimizer.state[p]) == name.startswith((active, "embed"))
