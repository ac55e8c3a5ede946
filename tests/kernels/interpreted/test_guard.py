"""The guard catches what it says, and lets pass what is right."""

import pytest
import torch
import triton
import triton.language as tl

from tests.tools.triton_guard import GuardError, guard

N = 100


@triton.jit
def double(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def without_mask(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at), mask=at < n)


@triton.jit
def store_without_mask(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0))


@triton.jit
def before_the_first(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at - 1, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def total(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < n)))


@triton.jit
def overlapping(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK - 1) + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def neighbour(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(y + at + 1, mask=at + 1 < n, other=0.0), mask=at < n)


@triton.jit
def read_back(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)
    tl.store(x + at, tl.load(y + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def twice(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at // 2, tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


@triton.jit
def halves(x, y, n, BLOCK: tl.constexpr):
    """Programs write the low and the high half of the same fp32."""
    at = tl.arange(0, BLOCK)
    low = y.to(tl.pointer_type(tl.int16)) + 2 * at + tl.program_id(0) % 2
    tl.store(low, at.to(tl.int16), mask=(at < n) & (tl.program_id(0) < 2))
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=(at < n) & (tl.program_id(0) == 2))


@triton.jit
def promising(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.multiple_of(n, 8))


@triton.jit
def atomic(x, y, n, BLOCK: tl.constexpr):
    tl.atomic_add(y, 1.0)


@triton.jit
def by_table(table, n, BLOCK: tl.constexpr):
    """double() of two tensors whose addresses are in a table."""
    x, y = (tl.load(table + 0), tl.load(table + 1))
    x, y = x.to(tl.pointer_type(tl.float32)), y.to(tl.pointer_type(tl.float32))
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n, other=0.0), mask=at < n)


def launch(kernel, programs=4, block=32):
    x, y = torch.arange(N, dtype=torch.float32), torch.zeros(N)
    with guard() as launches:
        kernel[(programs,)](x, y, N, BLOCK=block)
    return x, y, launches


def test_a_right_kernel_passes_and_its_launch_is_named():
    x, y, launches = launch(double)
    assert torch.equal(y, 2 * x)
    assert launches == ["double"]


@pytest.mark.parametrize(
    ("kernel", "says"),
    [
        (without_mask, "load out of bounds in program 3"),
        (store_without_mask, "store out of bounds in program 3"),
        (before_the_first, "load out of bounds in program 0"),
        (overlapping, "two programs write"),
        (neighbour, "reads what another writes"),
        (read_back, "reads back"),
        (twice, "twice"),
        (halves, "two programs write"),
        (promising, "100 is promised to be a multiple of 8"),
        (atomic, "atomic"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_kernel_is_refused(kernel, says):
    with pytest.raises(GuardError, match=says):
        launch(kernel)


def test_a_lane_without_other_is_nan():
    assert launch(total, programs=1, block=128)[1][0].isnan()


def test_pointers_of_a_table_reach_the_tensors_that_are_named():
    x, y = torch.arange(N, dtype=torch.float32), torch.zeros(N)
    table = torch.tensor([x.data_ptr(), y.data_ptr()])
    with guard(x, y):
        by_table[(4,)](table, N, BLOCK=32)
    assert torch.equal(y, 2 * x)
    with pytest.raises(GuardError, match="out of bounds"), guard(x):
        by_table[(4,)](table, N, BLOCK=32)
    with pytest.raises(GuardError, match="out of bounds"), guard(x[:-1], y):
        by_table[(4,)](table, N, BLOCK=32)


def test_what_was_before_is_back_when_a_guard_ends():
    x = torch.arange(N, dtype=torch.float32)
    with pytest.raises(GuardError), guard():
        without_mask[(4,)](x, torch.zeros(N), N, BLOCK=32)
    y = torch.zeros(128)
    store_without_mask[(4,)](x, y, N, BLOCK=32)
    assert torch.equal(y[:N], x)
