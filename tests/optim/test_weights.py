"""Weights in bf16 with 0, 8 or 16 low bits: what is kept of a number, against float64 and bounds derived for it."""

import math

import pytest
import torch

from thriftlab.optim.state.keys import keyed_seed
from thriftlab.optim.state.storage import random_bits
from thriftlab.optim.state.weights import join, noise, split

every_storage = pytest.mark.parametrize("bits", [0, 8, 16])
few = pytest.mark.parametrize("bits", [0, 8])
NAMES = {0: "bf16", 8: "bf16+8", 16: "bf16+16"}


def numbers(pattern):
    """fp32 of patterns, [...] int64."""
    return pattern.to(torch.int32).view(torch.float32)


def spacing(x, bits):
    """Of numbers with 8 + bits bits, at x, float64: 2^(e - 7 - bits), e the exponent of x, at least -126."""
    exponent = torch.frexp(x.abs().double()).exponent.sub(1).clamp(min=-126)
    return torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent - 7 - bits)


def sweep(exponents=(0, 1, 2, 121, 127, 253)):
    """Both signs of some exponents: every lower half of a pattern under the upper halves at which carries differ."""
    upper = torch.tensor([0, 1, 2, 63, 64, 126, 127]) << 16
    mantissas = (upper[:, None] + torch.arange(2**16)).flatten()
    for exponent in exponents:
        yield numbers(mantissas + (exponent << 23))
        yield -numbers(mantissas + (exponent << 23))


def the_same(a, b):
    return all(x is y is None or torch.equal(x.view(y.dtype), y) for x, y in zip(a, b, strict=True))


def as_integers(kept):
    high, low = kept
    return high.view(torch.int16), low


def extremes(x, bits):
    """The noise that rounds most towards zero, and that which rounds most away from it, of magnitudes."""
    return torch.zeros_like(x, dtype=torch.int32), torch.full_like(x, (1 << 16 - bits) - 1, dtype=torch.int32)


@every_storage
def test_what_is_kept_is_near(bits):
    for x in sweep():
        s = spacing(x, bits)
        for r in [None, *extremes(x, bits)] if bits < 16 else [None]:
            high, low = split(x, bits, r)
            kept = join(high, low)
            far = (kept.double() - x.double()).abs()
            assert bool((far <= (s / 2 if r is None else s)).all()) and (bits < 16 or torch.equal(kept, x))
            if x.abs().max() < 2.0**126:  # beyond it what the model sees may be infinite
                assert bool(((high.double() - kept.double()).abs() <= spacing(x, 0) / 2).all())
            for again in [None, *extremes(x, bits)] if bits < 16 else [None]:
                assert the_same(as_integers(split(kept, bits, again)), as_integers((high, low)))


def test_ties_and_borders():
    one, spacing8 = 0x3F800000, 1 << 8
    high, low = split(numbers(torch.tensor([one + 0x8000, one + 0x18000, one - 1, one + spacing8 // 2])), 8)
    assert high.view(torch.int16).tolist() == [0x3F81, 0x3F82, 0x3F80, 0x3F80]  # a cast would make 1.0 of the first
    assert low.tolist() == [-128, -128, 0, 0]
    high, low = split(numbers(torch.tensor([one - 1, one - spacing8, one - 0x8000])), 8)
    assert low.tolist() == [0, -1, -128]  # below a power of two the grid is the finer one
    assert torch.equal(join(high, low)[1:], numbers(torch.tensor([one - spacing8, one - 0x8000])))


@every_storage
def test_special_numbers(bits):
    patterns = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]
    x = numbers(torch.tensor(patterns))
    for r in [None, *extremes(x, bits)] if bits < 16 else [None]:
        high, low = split(x, bits, r)
        for kept in (high.float(), join(high, low)):
            assert torch.equal(kept[:4].view(torch.int32), x[:4].view(torch.int32)) and bool(kept[4:].isnan().all())


@every_storage
def test_memory_layout_stays(bits):
    x = torch.randn(3, 5, 4).permute(2, 0, 1)
    high, low = split(x, bits)
    wide = join(high, low)
    plain = split(x.contiguous(), bits)
    assert torch.equal(high, plain[0]) and high.stride() == wide.stride() == x.stride()
    assert torch.equal(wide, join(*plain))


def state_at(step):
    return {"weight.step": torch.tensor(step)}


def options(bits, rounding="random"):
    return {"weight_dtype": NAMES[bits], "weight_rounding": rounding, "weight_seed": 3}


@few
def test_random_rounding_chooses_a_neighbour_and_is_right_in_the_mean(bits):
    trials = 2**14
    some = [numbers(torch.tensor([0x3C23D70A + 977 * i])) for i in range(20)] + [torch.tensor([2.0**-130])]
    for i, x in enumerate(some):
        copies = x.expand(trials).contiguous()
        r = noise(f"tensor {i}", state_at(0), options(bits), 0, copies)
        kept, s = join(*split(copies, bits, r)).double(), spacing(x, bits)
        assert bool(((kept - x.double()).abs() < s).all())
        p = float((x.double() / s) % 1)
        assert abs(kept.mean() - x.double()) <= 5 * s * math.sqrt(p * (1 - p) / trials) + 1e-300


def test_random_bits_are_a_function_of_seed_name_step_and_entry():
    like, group, state = torch.empty(6, 50), options(8), state_at(7)
    bits = noise("w", state, group, 0, like)
    assert 0 <= int(bits.min()) and int(bits.max()) < 2**8 and len(bits.unique()) > 100
    assert torch.equal(bits, noise("w", state_at(7), group, 0, like))
    pieces = [noise("w", state, group, first, torch.empty(60)) for first in range(0, 300, 60)]
    assert torch.equal(torch.cat(pieces), bits.flatten())
    assert torch.equal(noise("w", state, group, 0, torch.empty(50, 6).T), bits)
    for other in (
        noise("v", state, group, 0, like),
        noise("w", state_at(8), group, 0, like),
        noise("w", state, {**group, "weight_seed": 4}, 0, like),
        random_bits(torch.tensor(keyed_seed(3, "w", 0)), torch.tensor(7), 0, 300, "cpu").view(6, 50) >> 8,  # moments'
    ):
        assert (other == bits).float().mean() < 0.05
    assert noise("w", state, options(16), 0, like) is noise("w", state, options(8, "nearest"), 0, like) is None


def path(bits, rounding, start, steps, move):
    """What is kept of `start` after so many steps of `move(weight, step)`, fp32, and the largest of what it was."""
    state, group, low, high = state_at(0), options(bits, rounding), None, None
    high, low = split(start, bits)
    largest = start.abs()
    for t in range(steps):
        state["weight.step"] += 1
        wide = move(join(high, low), t)
        high, low = split(wide, bits, noise("w", state, group, 0, wide))
        largest = torch.maximum(largest, wide.abs())
    return join(high, low), largest


@few
@pytest.mark.parametrize("rounding", ["nearest", "random"])
def test_the_path_of_many_updates(bits, rounding):
    steps, entries, error = 1000, 4096, 1e-6
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(entries, generator=draw) * 0.02
    start = join(*split(start, bits))
    updates = torch.randn(steps, 1, generator=draw) * 1e-4 + torch.randn(entries, generator=draw) * 1e-5
    end, largest = path(bits, rounding, start, steps, lambda w, t: w + updates[t])
    far = end.double() - (start.double() + updates.double().sum(0))
    s = spacing(largest, bits)
    fp32 = steps * 2**-24 * largest.double()
    if rounding == "nearest":
        assert bool((far.abs() <= steps * s / 2 + fp32).all())
    else:  # a martingale whose steps lie in intervals of length s (Azuma and Hoeffding)
        total = steps * s.square()
        assert bool((far.abs() <= (math.log(2 * entries / error) / 2 * total).sqrt() + fp32).all())
        assert far.mean().abs() <= 5 * math.sqrt(total.mean() / (4 * entries)) + fp32.mean()


@few
def test_what_is_rounded_to_nearest_stalls(bits):
    steps = 400
    s = float(spacing(torch.tensor(1.0), bits))
    one, up = torch.ones(64), 0.49 * s
    nearest, _ = path(bits, "nearest", one, steps, lambda w, t: w + up)
    random, _ = path(bits, "random", one, steps, lambda w, t: w + up)
    assert torch.equal(nearest, one)
    moved = (random.double() - 1).mean() / (steps * up)
    assert abs(moved - 1) <= 5 * math.sqrt(1 / (0.49 * steps * 64))
    decay = 1e-5
    still, _ = path(bits, "nearest", one, steps, lambda w, t: w * (1 - decay))
    falls, _ = path(bits, "random", one, steps, lambda w, t: w * (1 - decay))
    assert bits == 8 or torch.equal(still, one)
    lost = s / 2 * math.sqrt(steps / 64)  # standard deviation of the mean at most
    assert abs(falls.double().mean() - (1 - decay) ** steps) <= 5 * lost
