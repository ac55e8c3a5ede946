"""An optimizer's step in one pass: AdamW, FRUGAL (blocks, rows, columns) and signs, of any number of tensors at once.

    M <- M + (1 - b1) (G - M)        V <- b2 V + (1 - b2) G^2
    W <- (1 - lr wd) W - lr / (1 - b1^k) M / (sqrt(V) / sqrt(1 - b2^k) + eps)        where there are moments
    W <- (1 - lr wd) W - free_lr sign(G)                                             elsewhere

Every number is read once and written once. Weights lie in fp32, or in bf16 with 0, 8 or 16 low bits beside it; moments
in fp32, bf16 or 8 bits; gradients in fp32 or bf16. All is computed in fp32.

A launch has a table T with a row for each tensor: addresses and sizes. `begin_step` goes first, one lane for each
tensor: it counts the step and turns the counters into numbers, H, and keys of random rounding, KEYS. Then the programs
of `step_entries` or `step_tiles` take one item each of a list ITEMS: (tensor, block, kind). With APPLIED = 0 nothing is
written, and no host has to know.

The surprise: the bits are the same on every device, under every version of triton and in its interpreter, as long as
fusion is off: rounding is done here (few_bits.py), and quotients and roots are the exactly rounded ones. And what
happens to an entry depends on the entry alone, so fragments give the bits of the whole.
"""

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from thriftlab.kernels.few_bits import BOOK, encode, hash63, pattern, power, random16
from thriftlab.kernels.floats import narrowed, widened
from thriftlab.kernels.variant import Variant

# Columns of T: addresses; sizes; where the weight's and the moments' first entries lie in those of the whole tensor;
# addresses of counters, 0 where there is none; seeds of random rounding.
W, LOW, G, M, V, M_SCALE, V_SCALE, INDEX = map(tl.constexpr, range(8))
SIZE, COLUMNS, CHOSEN, FIRST_W, FIRST_V = map(tl.constexpr, range(8, 13))
STEP, START, ROUNDS, SEED_W, SEED_V = map(tl.constexpr, range(13, 18))
FIELDS = tl.constexpr(18)
LENGTH, ROOT = tl.constexpr(0), tl.constexpr(1)  # columns of H: lr / (1 - b1^k), 1 / sqrt(1 - b2^k)
KEY_W, KEY_V = tl.constexpr(0), tl.constexpr(1)  # columns of KEYS
NUMBERS = tl.constexpr(4)  # in a row of H, for which 16 bytes are the least

FP32, BF16, BITS8 = map(tl.constexpr, range(3))  # how moments and gradients are kept
NONE, SIGN, SGD = map(tl.constexpr, range(3))  # the state-free rule
ALL, ROWS, COLS = map(tl.constexpr, range(3))  # which entries of a weight have moments
ADAM, FREE, BOTH = map(tl.constexpr, range(3))  # the kind of an item, and of all items of a launch
CODE_BLOCK = tl.constexpr(256)  # entries that share an 8-bit scale


# ------------------------------------------------------------------------------------------------- counters and keys


@triton.jit
def count(counter, applied, dtype: tl.constexpr):
    """`applied` steps more in the counters with these addresses; the number before, 0 where there is none."""
    place = counter.to(tl.pointer_type(dtype))
    before = tl.load(place, mask=counter != 0, other=0)
    tl.store(place, before + applied, mask=counter != 0)
    return before.to(tl.int64)


@triton.jit(do_not_specialize=["tensors"])
def begin_step(
    T, H, KEYS, APPLIED, tensors, lr: tl.float64, beta1: tl.float64, beta2: tl.float64,
    PLAIN: tl.constexpr, EARLY_EPS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Counts, and what follows from the counts.

    With PLAIN the counter is fp32, as torch's. With EARLY_EPS eps is added to sqrt(V) before the bias is corrected. The
    moments of AdamW, and of no other, are rounded by the number of steps before this one.
    """
    t = tl.program_id(0) * LANES + tl.arange(0, LANES)
    here = t < tensors
    row = T + t * FIELDS
    applied = (tl.load(APPLIED) != 0).to(tl.int64)
    step, start = tl.load(row + STEP, mask=here, other=0), tl.load(row + START, mask=here, other=0)
    before = count(step, applied, tl.float32 if PLAIN else tl.int64)
    age = before + 1 - tl.load(start.to(tl.pointer_type(tl.int64)), mask=start != 0, other=0)
    length = tl.full((LANES,), lr, tl.float64) / (1 - power(tl.full((LANES,), beta1, tl.float64), age))
    root = 1 / tl.sqrt(1 - power(tl.full((LANES,), beta2, tl.float64), age))
    if EARLY_EPS:
        length, root = length / root, tl.full((LANES,), 1.0, tl.float64)
    tl.store(H + t * NUMBERS + LENGTH, length.to(tl.float32), mask=here)
    tl.store(H + t * NUMBERS + ROOT, root.to(tl.float32), mask=here)

    rounds = count(tl.load(row + ROUNDS, mask=here, other=0), applied, tl.int64) + 1
    rounds_v = before if PLAIN and not EARLY_EPS else before + 1
    seed_w, seed_v = tl.load(row + SEED_W, mask=here, other=0), tl.load(row + SEED_V, mask=here, other=0)
    tl.store(KEYS + t * 2 + KEY_W, hash63(seed_w + rounds), mask=here)
    tl.store(KEYS + t * 2 + KEY_V, hash63(seed_v + rounds_v), mask=here)


@triton.jit
def address(T, t, field: tl.constexpr, dtype: tl.constexpr, ALIGN: tl.constexpr):
    """Where a tensor lies: a promise that it is a multiple of ALIGN bytes makes loads and stores 128 bits wide."""
    return tl.multiple_of(tl.load(T + t * FIELDS + field).to(tl.pointer_type(dtype)), ALIGN)


@triton.jit
def load_weight(T, t, at, mask, LOW_BITS: tl.constexpr, ALIGN: tl.constexpr):
    """LOW_BITS: -1 of an fp32 weight; 0, 8, 16 of one in bf16 (optim/state/weights.py)."""
    if LOW_BITS < 0:
        return tl.load(address(T, t, W, tl.float32, ALIGN) + at, mask=mask, other=0.0)
    bits = tl.load(address(T, t, W, tl.int16, ALIGN) + at, mask=mask, other=0).to(tl.int32)
    if LOW_BITS == 8:
        bits = (bits << 8) + tl.load(address(T, t, LOW, tl.int8, ALIGN) + at, mask=mask, other=0).to(tl.int32)
    elif LOW_BITS == 16:
        bits = (bits << 16) + tl.load(address(T, t, LOW, tl.int16, ALIGN) + at, mask=mask, other=0).to(tl.int32)
    return (bits << (16 - LOW_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def store_weight(T, t, KEYS, at, mask, w, LOW_BITS: tl.constexpr, RANDOM: tl.constexpr, ALIGN: tl.constexpr):
    if LOW_BITS < 0:
        tl.store(address(T, t, W, tl.float32, ALIGN) + at, w, mask=mask)
    else:
        kept = pattern(w)
        if LOW_BITS < 16:
            if RANDOM:
                kept += random16(tl.load(KEYS + t * 2 + KEY_W), tl.load(T + t * FIELDS + FIRST_W) + at) >> LOW_BITS
            else:
                kept += (1 << (15 - LOW_BITS)) - 1 + ((kept >> (16 - LOW_BITS)) & 1)
            kept = kept >> (16 - LOW_BITS)
        high = kept
        if LOW_BITS == 8:
            high = (kept + 128) >> 8
            tl.store(address(T, t, LOW, tl.int8, ALIGN) + at, (kept - (high << 8)).to(tl.int8), mask=mask)
        elif LOW_BITS == 16:
            high = (kept + 32768) >> 16
            tl.store(address(T, t, LOW, tl.int16, ALIGN) + at, (kept - (high << 16)).to(tl.int16), mask=mask)
        tl.store(address(T, t, W, tl.int16, ALIGN) + at, high.to(tl.int16), mask=mask)


@triton.jit
def load_gradient(T, t, SCALE, at, mask, GRAD: tl.constexpr, ALIGN: tl.constexpr):
    if GRAD == FP32:
        g = tl.load(address(T, t, G, tl.float32, ALIGN) + at, mask=mask, other=0.0)
    else:
        g = widened(tl.load(address(T, t, G, tl.int16, ALIGN) + at, mask=mask, other=0))
    return g * tl.load(SCALE)


@triton.jit
def load_moment(
    T, t, field: tl.constexpr, scales: tl.constexpr, at, block, mask, BOOKS,
    KEPT: tl.constexpr, SIGNED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    if KEPT == FP32:
        return tl.load(address(T, t, field, tl.float32, ALIGN) + at, mask=mask, other=0.0)
    elif KEPT == BF16:
        return widened(tl.load(address(T, t, field, tl.int16, ALIGN) + at, mask=mask, other=0))
    else:
        code = tl.load(address(T, t, field, tl.uint8, ALIGN) + at, mask=mask, other=0).to(tl.int32)
        some = tl.max(mask.to(tl.int32), axis=1, keep_dims=True) > 0
        scale = tl.load(address(T, t, scales, tl.float32, 4) + block, mask=some, other=0.0)
        return tl.load(BOOKS + (0 if SIGNED else BOOK) + code) * scale


@triton.jit
def store_moment(
    T, t, KEYS, field: tl.constexpr, scales: tl.constexpr, at, block, mask, x, BOOKS,
    KEPT: tl.constexpr, SIGNED: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The second moment, which has no sign, is rounded to bf16 at random; to 8 bits both go to the nearest level."""
    if KEPT == FP32:
        tl.store(address(T, t, field, tl.float32, ALIGN) + at, x, mask=mask)
    elif KEPT == BF16:
        if SIGNED:
            bits = narrowed(x, tl.int16)
        else:
            noise = random16(tl.load(KEYS + t * 2 + KEY_V), tl.load(T + t * FIELDS + FIRST_V) + at)
            bits = ((pattern(x) + noise) >> 16).to(tl.int16)
        tl.store(address(T, t, field, tl.int16, ALIGN) + at, bits, mask=mask)
    else:
        x = tl.where(mask, x, 0.0)
        broken = tl.max((x != x).to(tl.int32), axis=1, keep_dims=True) > 0  # tl.max overlooks NaN
        scale = tl.where(broken, float("nan"), tl.max(tl.abs(x), axis=1, keep_dims=True))
        quotient = tl.div_rn(x, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(x))
        code = encode(quotient, BOOKS + (0 if SIGNED else BOOK), SIGNED)
        tl.store(address(T, t, field, tl.uint8, ALIGN) + at, code.to(tl.uint8), mask=mask)
        some = tl.max(mask.to(tl.int32), axis=1, keep_dims=True) > 0
        tl.store(address(T, t, scales, tl.float32, 4) + block, scale, mask=some)


@triton.jit
def adam(H, t, m, v, g, beta2, rest1, rest2, eps):
    """The moments, moved, and the step that they make. `rest` is 1 - beta, rounded once."""
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    length, root = tl.load(H + t * NUMBERS + LENGTH), tl.load(H + t * NUMBERS + ROOT)
    return m, v, tl.div_rn(length * m, tl.sqrt_rn(v) * root + eps)


@triton.jit
def free(g, free_lr, RULE: tl.constexpr):
    """The step of an entry without moments."""
    if RULE == SIGN:
        return free_lr * tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g))  # sign(0) = 0, and a NaN stays one
    elif RULE == SGD:
        return free_lr * g
    else:
        return tl.zeros_like(g)


@triton.jit
def step_entries(
    T, H, KEYS, ITEMS, BOOKS, SCALE, APPLIED, decay, beta2, rest1, rest2, eps, free_lr,
    LOW_BITS: tl.constexpr, RANDOM: tl.constexpr, GRAD: tl.constexpr, KEPT: tl.constexpr, WHERE: tl.constexpr,
    RULE: tl.constexpr, KINDS: tl.constexpr, ALIGN: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Tensors as flat rows of entries. An item of kind ADAM is a block of moments, wherever in the weight they belong;
    one of kind FREE is a block of the weight, of which those with moments are left alone."""
    if tl.load(APPLIED) == 0:
        return
    i = tl.program_id(0)
    t = tl.load(ITEMS + 4 * i).to(tl.int64)
    first = tl.load(ITEMS + 4 * i + 1).to(tl.int64) * (ENTRIES // CODE_BLOCK)
    block = first + tl.arange(0, ENTRIES // CODE_BLOCK)[:, None]
    entry = block * CODE_BLOCK + tl.arange(0, CODE_BLOCK)[None, :]
    size = tl.multiple_of(tl.load(T + t * FIELDS + SIZE), ALIGN)
    columns, chosen = tl.load(T + t * FIELDS + COLUMNS), tl.load(T + t * FIELDS + CHOSEN)
    index = address(T, t, INDEX, tl.int32, 4)  # of the chosen rows or columns; behind them, of each, its place or -1
    kind = KINDS if KINDS < BOTH else tl.load(ITEMS + 4 * i + 2)
    if kind == ADAM:
        at = entry
        if WHERE == ROWS:
            size = chosen * columns
            line = tl.load(index + entry // columns, mask=entry < size, other=0).to(tl.int64)
            at = line * columns + entry % columns
        elif WHERE == COLS:
            size = size // columns * chosen
            wide = tl.maximum(chosen, 1)
            at = entry // wide * columns + tl.load(index + entry % wide, mask=entry < size, other=0)
        mask = entry < size
        g = load_gradient(T, t, SCALE, at, mask, GRAD, ALIGN)
        w = load_weight(T, t, at, mask, LOW_BITS, ALIGN)
        m = load_moment(T, t, M, M_SCALE, entry, block, mask, BOOKS, KEPT, True, ALIGN)
        v = load_moment(T, t, V, V_SCALE, entry, block, mask, BOOKS, KEPT, False, ALIGN)
        m, v, step = adam(H, t, m, v, g, beta2, rest1, rest2, eps)
        store_weight(T, t, KEYS, at, mask, w * decay - step, LOW_BITS, RANDOM, ALIGN)
        store_moment(T, t, KEYS, M, M_SCALE, entry, block, mask, m, BOOKS, KEPT, True, ALIGN)
        store_moment(T, t, KEYS, V, V_SCALE, entry, block, mask, v, BOOKS, KEPT, False, ALIGN)
    else:
        mask = entry < size
        if WHERE != ALL:
            line = entry // columns if WHERE == ROWS else entry % columns
            mask = mask & (tl.load(index + chosen + line, mask=mask, other=0) < 0)
        g = load_gradient(T, t, SCALE, entry, mask, GRAD, ALIGN)
        w = load_weight(T, t, entry, mask, LOW_BITS, ALIGN)
        store_weight(T, t, KEYS, entry, mask, w * decay - free(g, free_lr, RULE), LOW_BITS, RANDOM, ALIGN)


@triton.jit
def step_tiles(
    T, H, KEYS, ITEMS, BOOKS, SCALE, APPLIED, decay, beta2, rest1, rest2, eps, free_lr,
    LOW_BITS: tl.constexpr, RANDOM: tl.constexpr, GRAD: tl.constexpr, KEPT: tl.constexpr, WHERE: tl.constexpr,
    RULE: tl.constexpr, ALIGN: tl.constexpr, DOWN: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Matrices with chosen rows or columns, in one pass over weight and gradient: a tile of [DOWN, ACROSS] entries,
    with the moments of those that have any. Moments in 8 bits only of rows whose length is a multiple of 256 = ACROSS,
    so that a row of a tile is a block with one scale; all others take `step_entries`."""
    if tl.load(APPLIED) == 0:
        return
    i = tl.program_id(0)
    t = tl.load(ITEMS + 4 * i).to(tl.int64)
    tile = tl.load(ITEMS + 4 * i + 1)
    columns, chosen = tl.multiple_of(tl.load(T + t * FIELDS + COLUMNS), ALIGN), tl.load(T + t * FIELDS + CHOSEN)
    rows = tl.load(T + t * FIELDS + SIZE) // columns
    tiles = tl.cdiv(columns, ACROSS).to(tl.int32)  # side by side
    row = ((tile // tiles).to(tl.int64) * DOWN + tl.arange(0, DOWN))[:, None]
    column = ((tile % tiles).to(tl.int64) * ACROSS + tl.arange(0, ACROSS))[None, :]
    place = address(T, t, INDEX, tl.int32, 4) + chosen  # of each row or column among the chosen, or -1
    if WHERE == COLS:
        slot = tl.load(place + column, mask=column < columns, other=-1)
        entry = row * chosen + slot
    else:
        slot = tl.load(place + row, mask=row < rows, other=-1)
        entry = slot * columns + column
    block = (slot * columns + tile % tiles * ACROSS) // CODE_BLOCK
    at = row * columns + column
    mask = (row < rows) & (column < columns)
    own = mask & (slot >= 0)
    BESIDE: tl.constexpr = 4 if WHERE == COLS else ALIGN  # moments of chosen columns are gathered
    g = load_gradient(T, t, SCALE, at, mask, GRAD, ALIGN)
    w = load_weight(T, t, at, mask, LOW_BITS, ALIGN)
    m = load_moment(T, t, M, M_SCALE, entry, block, own, BOOKS, KEPT, True, BESIDE)
    v = load_moment(T, t, V, V_SCALE, entry, block, own, BOOKS, KEPT, False, BESIDE)
    m, v, step = adam(H, t, m, v, g, beta2, rest1, rest2, eps)
    step = tl.where(own, step, free(g, free_lr, RULE))
    store_weight(T, t, KEYS, at, mask, w * decay - step, LOW_BITS, RANDOM, ALIGN)
    store_moment(T, t, KEYS, M, M_SCALE, entry, block, own, m, BOOKS, KEPT, True, BESIDE)
    store_moment(T, t, KEYS, V, V_SCALE, entry, block, own, v, BOOKS, KEPT, False, BESIDE)


# -------------------------------------------------------------------------------------------------------- the gate

ADDRESSES = {"T": "*i64", "H": "*fp32", "KEYS": "*i64", "ITEMS": "*i32", "BOOKS": "*fp32", "SCALE": "*fp32"}
SCALARS = dict.fromkeys(("decay", "beta2", "rest1", "rest2", "eps", "free_lr"), "fp32")
STORED: dict[str, dict[str, Any]] = {  # weights, gradients and moments
    "fp32": dict(LOW_BITS=-1, RANDOM=False, GRAD=0, KEPT=0),
    "fp32, 8-bit moments": dict(LOW_BITS=-1, RANDOM=False, GRAD=0, KEPT=2),
    "bf16, bf16 moments": dict(LOW_BITS=0, RANDOM=True, GRAD=1, KEPT=1),
    "bf16+8, bf16 moments": dict(LOW_BITS=8, RANDOM=True, GRAD=1, KEPT=1),
    "bf16+8, 8-bit moments": dict(LOW_BITS=8, RANDOM=True, GRAD=1, KEPT=2),
    "bf16+16": dict(LOW_BITS=16, RANDOM=False, GRAD=1, KEPT=0),
}


def variants() -> Iterator[Variant]:
    given = {**ADDRESSES, "APPLIED": "*fp32", **SCALARS}

    def made(name: str, stored: str, kernel: Any, narrow: bool = False, **how: int) -> Variant:
        return Variant(f"{name}, {stored}", kernel, {**given, **STORED[stored], **how}, exact=True, narrow=narrow)

    flat = dict(kernel=step_entries, WHERE=0, RULE=1, KINDS=0, ALIGN=16, ENTRIES=1024)
    tiles = dict(kernel=step_tiles, RULE=1, ALIGN=16, DOWN=4, ACROSS=256)
    for stored in STORED:
        yield made("adam", stored, **flat)
    for stored in ("fp32", "bf16+8, 8-bit moments"):
        yield made("adam, anywhere", stored, **{**flat, "ALIGN": 1}, narrow=stored != "fp32")
        yield made("signs", stored, **{**flat, "KINDS": 1})
    yield made("blocks", "fp32", **{**flat, "KINDS": 2})
    for where, name in ((1, "rows"), (2, "columns")):
        yield made(name, "fp32, 8-bit moments", **{**flat, "WHERE": where, "KINDS": 2}, narrow=True)
        yield made(name, "fp32", **tiles, WHERE=where)
        yield made(name, "bf16+8, bf16 moments", **tiles, WHERE=where, narrow=name == "columns")
    yield made("columns, anywhere", "fp32", **{**tiles, "ALIGN": 1}, WHERE=2)
    yield made("rows", "bf16+8, 8-bit moments", **tiles, WHERE=1)
    begin: dict[str, Any] = {"T": "*i64", "H": "*fp32", "KEYS": "*i64", "APPLIED": "*fp32", "tensors": "i32"}
    begin |= {**dict.fromkeys(("lr", "beta1", "beta2"), "fp64"), "EARLY_EPS": False, "LANES": 128}
    for plain, name in ((True, "fp32"), (False, "int64")):
        yield Variant(f"begin, {name} counters", begin_step, {**begin, "PLAIN": plain}, exact=True)
