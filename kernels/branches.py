"""What LOST (2508.02668) does to its two branches between the products, in one pass each.

    join_branches   [act(h) | x_I | 0]                 forward, and again in backward
    fold            [gamma B | (1 - gamma) S | 0]      the weights that these are multiplied with
    part_branches_  act'(h) * grad                     of the gradient of the first, in place
    add_channels_   grad_x[:, I] += grad               of the gradient of the second

The first two are one kernel: two matrices side by side, a function of the left one, chosen columns of the right one,
and zeros up to a width that suits the products. A program takes a tile of [ROWS, COLUMNS] of the result; entry by entry
a lane asks one of the two matrices, as its column says.

The surprise: the last two are not one kernel, though they read one matrix. Between them lies the product that makes
grad_x. To write the channels first, and have the product add to them, would write and read all of grad_x once more.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from thriftlab.kernels.floats import narrowed, stored, widened
from thriftlab.kernels.variant import Variant

ALIGN = tl.constexpr(8)  # columns of what is multiplied: tensor cores and vector units waste the rest of an uneven row
TILE = 1024  # entries of a program
SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)  # of the normal distribution, 1 / sqrt(2 pi)


def join_branches(x: Tensor, h: Tensor, index: Tensor, act: str) -> Tensor:
    """[act(h) | x_I | 0], of h's dtype.

    Args:
        x: [tokens, in].
        h: [tokens, rank].
        index: [channels] int64.
        act: silu, gelu, relu2 or none.
    """
    return torch.ops.thriftlab.join_branches(x, h, index, act)


def fold(lr_out: Tensor, sp_weight: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    """[gamma B | (1 - gamma) S | 0] of [out, rank] and [out, channels]."""
    return torch.ops.thriftlab.fold(lr_out, sp_weight, gamma, dtype)


def part_branches_(grad: Tensor, h: Tensor, act: str) -> Tensor:
    """The gradient of h, [tokens, rank], in place of that of act(h) in the first columns of `grad`."""
    torch.ops.thriftlab.part_branches_(grad, h, act)
    return grad[:, : h.shape[1]]


def add_channels_(grad_x: Tensor, grad: Tensor, index: Tensor) -> Tensor:
    """grad_x[:, index] += grad, for [tokens, in], [tokens, channels] and [channels] int64, distinct."""
    torch.ops.thriftlab.add_channels_(grad_x, grad, index)
    return grad_x


# ---------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def act_of(h, ACT: tl.constexpr):
    if ACT == "silu":
        return h / (1.0 + tl.exp(-h))
    elif ACT == "gelu":
        return h * (0.5 + 0.5 * tl.erf(h * SQRT_HALF))
    elif ACT == "relu2":
        return tl.where(h < 0, 0.0, h * h)  # not h > 0: nan stays nan
    else:
        return h


@triton.jit
def slope_of(h, ACT: tl.constexpr):
    """act'(h)"""
    if ACT == "silu":
        share = 1.0 / (1.0 + tl.exp(-h))
        return share * (1.0 + h * (1.0 - share))
    elif ACT == "gelu":
        return 0.5 + 0.5 * tl.erf(h * SQRT_HALF) + h * DENSITY_AT_0 * tl.exp(-0.5 * h * h)
    elif ACT == "relu2":
        return tl.where(h < 0, 0.0, 2.0 * h)
    else:
        return tl.full(h.shape, 1.0, tl.float32)


@triton.jit
def tile(rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row, column, and whether there is such a row, of every lane."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return row, tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :], row < rows


@triton.jit
def join(
    left, right, index, joined, rows, rank, channels, width, left_stride, right_stride, left_scale, right_scale,
    ACT: tl.constexpr, CHOSEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, here = tile(rows, ROWS, COLUMNS)
    width = width // ALIGN * ALIGN  # as it was: so the compiler knows that it may store 8 entries at once
    in_left = column < rank
    of_left = tl.load(left + row * left_stride + column, mask=here & in_left, other=0)
    in_right = (column >= rank) & (column < rank + channels)
    source = column - rank
    if CHOSEN:
        source = tl.load(index + source, mask=in_right, other=0)
    of_right = tl.load(right + row * right_stride + source, mask=here & in_right, other=0)  # and 0 behind them
    value = tl.where(in_left, act_of(widened(of_left), ACT) * left_scale, widened(of_right) * right_scale)
    tl.store(joined + row * width + column, narrowed(value, joined.dtype.element_ty), mask=here & (column < width))


@triton.jit
def part(
    grad, h, rows, rank, grad_stride, h_stride,
    ACT: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, here = tile(rows, ROWS, COLUMNS)
    mask = here & (column < rank)
    at = grad + row * (grad_stride // UNIT * UNIT) + column  # UNIT divides it: the compiler may take 8 at once
    slope = slope_of(widened(tl.load(h + row * h_stride + column, mask=mask, other=0)), ACT)
    value = widened(tl.load(at, mask=mask, other=0)) * slope
    tl.store(at, narrowed(value, grad.dtype.element_ty), mask=mask)


@triton.jit
def add_columns(
    total, added, index, rows, channels, total_stride, added_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row, column, here = tile(rows, ROWS, COLUMNS)
    mask = here & (column < channels)
    at = total + row * total_stride + tl.load(index + column, mask=column < channels, other=0)
    value = widened(tl.load(added + row * added_stride + column, mask=mask, other=0))
    value += widened(tl.load(at, mask=mask, other=0))
    tl.store(at, narrowed(value, total.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------- launches


def tiled(kernel, rows: int, columns: int, *arguments, **constants) -> None:
    """A launch over tiles of a matrix of so many rows and columns."""
    if rows and columns:
        across = min(TILE, triton.next_power_of_2(columns))
        grid = (triton.cdiv(rows, TILE // across), triton.cdiv(columns, across))
        kernel[grid](*arguments, **constants, ROWS=TILE // across, COLUMNS=across)


def empty_joined(left: Tensor, right_columns: int, dtype: torch.dtype) -> Tensor:
    columns = left.shape[1] + right_columns
    return left.new_empty(len(left), columns + -columns % ALIGN.value, dtype=dtype)


@torch.library.custom_op("thriftlab::join_branches", mutates_args=())
def launch_join(x: Tensor, h: Tensor, index: Tensor, act: str) -> Tensor:
    joined = empty_joined(h, len(index), h.dtype)
    tiled(
        join, *joined.shape, stored(h), stored(x), index, stored(joined), len(h), h.shape[1], len(index),
        joined.shape[1], h.stride(0), x.stride(0), 1.0, 1.0, ACT=act, CHOSEN=True,
    )  # fmt: skip
    return joined


@launch_join.register_fake
def _(x: Tensor, h: Tensor, index: Tensor, act: str) -> Tensor:
    return empty_joined(h, len(index), h.dtype)


@torch.library.custom_op("thriftlab::fold", mutates_args=())
def launch_fold(lr_out: Tensor, sp_weight: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    (out, rank), channels = lr_out.shape, sp_weight.shape[1]
    joined = empty_joined(lr_out, channels, dtype)
    tiled(
        join, *joined.shape, stored(lr_out), stored(sp_weight), None, stored(joined), out, rank, channels,
        joined.shape[1], lr_out.stride(0), sp_weight.stride(0), gamma, 1 - gamma, ACT="none", CHOSEN=False,
    )  # fmt: skip
    return joined


@launch_fold.register_fake
def _(lr_out: Tensor, sp_weight: Tensor, gamma: float, dtype: torch.dtype) -> Tensor:
    return empty_joined(lr_out, sp_weight.shape[1], dtype)


@torch.library.custom_op("thriftlab::part_branches_", mutates_args=("grad",))
def launch_part_(grad: Tensor, h: Tensor, act: str) -> None:
    unit = math.gcd(grad.stride(0), ALIGN.value)
    tiled(part, *h.shape, stored(grad), stored(h), *h.shape, grad.stride(0), h.stride(0), ACT=act, UNIT=unit)


@launch_part_.register_fake
def _(grad: Tensor, h: Tensor, act: str) -> None:
    return None


@torch.library.custom_op("thriftlab::add_channels_", mutates_args=("grad_x",))
def launch_add_(grad_x: Tensor, grad: Tensor, index: Tensor) -> None:
    tiled(
        add_columns, *grad.shape, stored(grad_x), stored(grad), index, *grad.shape, grad_x.stride(0), grad.stride(0)
    )  # fmt: skip


@launch_add_.register_fake
def _(grad_x: Tensor, grad: Tensor, index: Tensor) -> None:
    return None


# ---------------------------------------------------------------------------------------------------- the gate


def variants() -> Iterator[Variant]:
    """For gate.py: a rank of some hundreds and a few channels; weights are fp32, the products bf16 or fp32."""
    tile = {"ROWS": 4, "COLUMNS": 256}
    sizes = dict.fromkeys(("rows", "rank", "channels", "width", "left_stride", "right_stride"), "i32")
    even = ("rank", "left_stride", "right_stride")
    for dtype, pointer in {"bf16": "*i16", "fp32": "*fp32"}.items():
        joined = {**sizes, "index": "*i64", "joined": pointer, "left_scale": "fp32", "right_scale": "fp32", **tile}
        folded = {**joined, "left": "*fp32", "right": "*fp32", "ACT": "none", "CHOSEN": False}
        yield Variant(f"fold, {dtype}", join, folded, multiples=even, narrow=True)
        for act in ("silu", "gelu", "relu2") if dtype == "bf16" else ("silu",):
            found = {**joined, "left": pointer, "right": pointer, "ACT": act, "CHOSEN": True}
            yield Variant(f"join, {act}, {dtype}", join, found, multiples=even, narrow=True)
            strides = {"rows": "i32", "rank": "i32", "grad_stride": "i32", "h_stride": "i32"}
            found = {"grad": pointer, "h": pointer, **strides, "ACT": act, "UNIT": 8, **tile}
            yield Variant(f"part, {act}, {dtype}", part, found, multiples=("rank", "h_stride"))
        strides = dict.fromkeys(("rows", "channels", "total_stride", "added_stride"), "i32")
        found = {"total": pointer, "added": pointer, "index": "*i64", **strides, "ROWS": 128, "COLUMNS": 8}
        yield Variant(f"add channels, {dtype}", add_columns, found, multiples=("total_stride",), narrow=True)
