"""Numbers in few bits, in a Triton kernel: random rounding and the 8-bit codes of moments; counters and their keys.

The formulas are those of optim/state/storage.py, to the bit.
"""

import triton
import triton.language as tl

BORDERS, DECADES, DENSITIES, BOOK = map(tl.constexpr, (256, 512, 520, 1024))  # places in a codebook, behind its levels


@triton.jit
def power(base, exponent):
    """base^exponent in fp64, by squaring: the same bits everywhere."""
    result = tl.full(exponent.shape, 1.0, tl.float64)
    for _ in range(40):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def shifted(x, bits: tl.constexpr):
    """x >> bits, filled up with zeros; >> of an int64 carries its sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def hash63(x):
    """The finaliser of splitmix64, without the sign."""
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    return (x ^ shifted(x, 31)) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def pattern(x):
    """The bits of fp32 numbers; of all NaNs those of one, as others would be rounded into numbers."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))


@triton.jit
def random16(key, entry):
    """16 bits, a function of (key, entry): lowbias32 by C. Wellons, as in optim/state/storage.py."""
    x = (key + entry).to(tl.int32)
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ (key >> 31).to(tl.int32)
    x = (x ^ (x >> 15)) * -0x7B935975
    return (x >> 16) & 0xFFFF


@triton.jit
def encode(x, book, SIGNED: tl.constexpr):
    """The codes of the levels nearest to x, in [-1, 1].

    `book` holds 256 levels, ascending; then -inf and the borders between them; then where each decade begins, and how
    many levels it has for a unit. Levels are evenly spaced within a decade, and each has twice as many as the one
    below. So the exponent tells the decade but for one comparison, arithmetic the place in it, roughly, and one look at
    a border between two levels makes that exact.
    """
    size = tl.abs(x)
    above = ((size.to(tl.int32, bitcast=True) >> 23) * 1233 >> 12) - 31  # floor(log10 2^exponent) + 8
    above = tl.minimum(tl.maximum(above, 0), 7)
    decade = above - 1 + (size >= tl.load(book + DECADES + above)).to(tl.int32)
    decade = tl.minimum(tl.maximum(decade, 0), 6)
    levels = 1 << (decade + (0 if SIGNED else 1))
    place = size * tl.load(book + DENSITIES + decade) - levels.to(tl.float32) * 0.11111111  # of 0.1 in [0.1, 1)
    place = tl.where(place > 0, place, 0.0)  # also of NaN, which tl.maximum may keep: then it would be a wild address
    place = tl.minimum((place + 0.5).to(tl.int32), levels)
    if SIGNED:
        near = tl.where(x < 0, 128 - levels - place, 127 + levels + place)
    else:
        near = levels - 1 + place
    return near - (x <= tl.load(book + BORDERS + near)).to(tl.int32)
