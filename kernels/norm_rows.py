"""The passes of GaLore, Fira and APOLLO over their matrices, one launch for any number of matrices.

    norms       |G| of every channel
    adam_small  Adam on R, the gradient in r dimensions, with |N| and |R| of every channel
    scale_add   W <- keep W + f G, with a factor f for every channel

A channel is a row of a matrix or a column of it: an index of the side that R = down(G) keeps. The products, down and
up, are cuBLAS's.

A launch gets a table with one row for each matrix, of addresses and sizes, and a list with one item for each program:
(matrix, block of channels, which side). A program takes a tile of [channels, steps along a channel] and walks along its
channels, so nothing is summed by two programs and every sum has one order.

The surprise: rows and columns are one code. Only the place of an entry differs, and the compiler sees by itself on
which side of the tile entries are neighbours in memory; so SHORT and LONG are swapped, for LONG to lie there.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from thriftlab.kernels.variant import Variant

FIRST, SECOND, THIRD, FOURTH, FIFTH, SIXTH, CHANNELS, LENGTH = map(tl.constexpr, range(8))  # columns of the table
FIELDS = tl.constexpr(8)
COLUMNS, ROWS = tl.constexpr(0), tl.constexpr(1)  # what a channel is
TILE = {"SHORT": 16, "LONG": 64}


@triton.jit
def matrix(T, t, field: tl.constexpr, ALIGN: tl.constexpr):
    """The address of a tensor, in bytes a multiple of ALIGN."""
    return tl.multiple_of(tl.load(T + t * FIELDS + field).to(tl.pointer_type(tl.float32)), ALIGN)


@triton.jit
def sizes_of(T, t, SIDE: tl.constexpr, ALIGN: tl.constexpr):
    """How many channels there are, and how long each is; of rows that begin at multiples of ALIGN bytes."""
    channels, length = tl.load(T + t * FIELDS + CHANNELS), tl.load(T + t * FIELDS + LENGTH)
    if SIDE == ROWS:
        return channels, tl.multiple_of(length, ALIGN // 4)
    else:
        return tl.multiple_of(channels, ALIGN // 4), length


@triton.jit
def place(channel, step, channels, length, SIDE: tl.constexpr):
    """Where an entry lies."""
    return channel * length + step if SIDE == ROWS else step * channels + channel


@triton.jit
def norms_of(T, t, block, SIDE: tl.constexpr, ALIGN: tl.constexpr, MANY: tl.constexpr, STEPS: tl.constexpr):
    channels, length = sizes_of(T, t, SIDE, ALIGN)
    channel = block * MANY + tl.arange(0, MANY)[:, None]
    squares = tl.zeros((MANY, STEPS), tl.float32)
    for start in range(0, length, STEPS):
        step = start + tl.arange(0, STEPS)[None, :]
        at = place(channel, step, channels, length, SIDE)
        g = tl.load(matrix(T, t, FIRST, ALIGN) + at, mask=(channel < channels) & (step < length), other=0.0)
        squares += g * g
    norm = tl.sqrt(tl.sum(squares, axis=1, keep_dims=True))
    tl.store(matrix(T, t, SECOND, 4) + channel, norm, mask=channel < channels)


@triton.jit
def norms_kernel(T, ITEMS, ALIGN: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr):
    i = tl.program_id(0)
    t, block, side = tl.load(ITEMS + 4 * i).to(tl.int64), tl.load(ITEMS + 4 * i + 1), tl.load(ITEMS + 4 * i + 2)
    if side == ROWS:
        norms_of(T, t, block, ROWS, ALIGN, SHORT, LONG)
    else:
        norms_of(T, t, block, COLUMNS, ALIGN, LONG, SHORT)


@triton.jit
def adam_of(
    T, CORRECTIONS, t, block, beta2, rest1, rest2, eps,
    STORE: tl.constexpr, SIZES: tl.constexpr, SIDE: tl.constexpr, ALIGN: tl.constexpr,
    MANY: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """M <- b1 M + (1-b1) R;  V <- b2 V + (1-b2) R^2;  N = correction M / (sqrt(V) + eps)"""
    channels, length = sizes_of(T, t, SIDE, ALIGN)
    channel = block * MANY + tl.arange(0, MANY)[:, None]
    correction = tl.load(CORRECTIONS + t)
    squares_n, squares_r = tl.zeros((MANY, STEPS), tl.float32), tl.zeros((MANY, STEPS), tl.float32)
    for start in range(0, length, STEPS):
        step = start + tl.arange(0, STEPS)[None, :]
        at = place(channel, step, channels, length, SIDE)
        mask = (channel < channels) & (step < length)
        r = tl.load(matrix(T, t, FIRST, ALIGN) + at, mask=mask, other=0.0)
        m = tl.load(matrix(T, t, SECOND, ALIGN) + at, mask=mask, other=0.0)
        v = tl.load(matrix(T, t, THIRD, ALIGN) + at, mask=mask, other=0.0)
        m += rest1 * (r - m)
        v = beta2 * v + rest2 * r * r
        n = correction * m / (tl.sqrt(v) + eps)
        tl.store(matrix(T, t, SECOND, ALIGN) + at, m, mask=mask)
        tl.store(matrix(T, t, THIRD, ALIGN) + at, v, mask=mask)
        if STORE:
            tl.store(matrix(T, t, FOURTH, ALIGN) + at, n, mask=mask)
        if SIZES:
            squares_n += tl.where(mask, n * n, 0.0)  # with eps = 0 there is 0 / 0 beyond the end
            squares_r += r * r
    if SIZES:
        norm_n = tl.sqrt(tl.sum(squares_n, axis=1, keep_dims=True))
        norm_r = tl.sqrt(tl.sum(squares_r, axis=1, keep_dims=True))
        tl.store(matrix(T, t, FIFTH, 4) + channel, norm_n, mask=channel < channels)
        tl.store(matrix(T, t, SIXTH, 4) + channel, norm_r, mask=channel < channels)


@triton.jit
def adam_kernel(
    T, ITEMS, CORRECTIONS, beta2, rest1, rest2, eps,
    STORE: tl.constexpr, SIZES: tl.constexpr, ALIGN: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    t, block, side = tl.load(ITEMS + 4 * i).to(tl.int64), tl.load(ITEMS + 4 * i + 1), tl.load(ITEMS + 4 * i + 2)
    if side == ROWS:
        adam_of(T, CORRECTIONS, t, block, beta2, rest1, rest2, eps, STORE, SIZES, ROWS, ALIGN, SHORT, LONG)
    else:
        adam_of(T, CORRECTIONS, t, block, beta2, rest1, rest2, eps, STORE, SIZES, COLUMNS, ALIGN, LONG, SHORT)


@triton.jit
def scale_add_to(T, t, block, keep, SIDE: tl.constexpr, ALIGN: tl.constexpr, MANY: tl.constexpr, STEPS: tl.constexpr):
    channels, length = sizes_of(T, t, SIDE, ALIGN)
    along = tl.cdiv(length, STEPS).to(tl.int32)  # tiles
    channel = (block // along).to(tl.int64) * MANY + tl.arange(0, MANY)[:, None]
    step = (block % along).to(tl.int64) * STEPS + tl.arange(0, STEPS)[None, :]
    at = place(channel, step, channels, length, SIDE)
    mask = (channel < channels) & (step < length)
    w = tl.load(matrix(T, t, FIRST, ALIGN) + at, mask=mask, other=0.0)
    g = tl.load(matrix(T, t, SECOND, ALIGN) + at, mask=mask, other=0.0)
    factor = tl.load(matrix(T, t, THIRD, 4) + channel, mask=channel < channels, other=0.0)
    tl.store(matrix(T, t, FIRST, ALIGN) + at, keep * w + factor * g, mask=mask)


@triton.jit
def scale_add_kernel(T, ITEMS, keep, ALIGN: tl.constexpr, SHORT: tl.constexpr, LONG: tl.constexpr):
    i = tl.program_id(0)
    t, block, side = tl.load(ITEMS + 4 * i).to(tl.int64), tl.load(ITEMS + 4 * i + 1), tl.load(ITEMS + 4 * i + 2)
    if side == ROWS:
        scale_add_to(T, t, block, keep, ROWS, ALIGN, SHORT, LONG)
    else:
        scale_add_to(T, t, block, keep, COLUMNS, ALIGN, LONG, SHORT)


def norms(matrices: list[Tensor], rows: list[bool]) -> list[Tensor]:
    """|G| of each row, [m, 1], where `rows` says so, and else of each column, [1, n]."""
    found = of_channels(matrices, rows)
    launch(norms_kernel, [matrices], [found], rows)
    return found


def adam_small(
    smalls: list[Tensor], firsts: list[Tensor], seconds: list[Tensor], corrections: Tensor,
    betas: tuple[float, float], eps: float, rows: list[bool], directions: bool = True, sizes: bool = True,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Moves the moments and gives (N, |N|, |R|): N if `directions` are asked for, norms of channels if `sizes` are.

    Args:
        corrections: sqrt(1 - b2^k) / (1 - b1^k), fp32 [matrices].
    """
    normalized = [torch.empty_like(small) for small in smalls] if directions else []
    norms_n, norms_r = (of_channels(smalls, rows) if sizes else [] for _ in range(2))
    numbers = (betas[1], 1 - betas[0], 1 - betas[1], eps)
    matrices, channels = [smalls, firsts, seconds, normalized], [norms_n, norms_r]
    launch(adam_kernel, matrices, channels, rows, corrections, *numbers, STORE=directions, SIZES=sizes)
    return normalized, norms_n, norms_r


def scale_add(
    weights: list[Tensor], grads: list[Tensor], factors: list[Tensor], rows: list[bool], keep: float = 1.0
) -> None:
    """W <- keep W + f G, in place; f has the shape that `norms` gives."""
    launch(scale_add_kernel, [weights, grads], [factors], rows, keep, tiles=True)


def of_channels(matrices: list[Tensor], rows: list[bool]) -> list[Tensor]:
    """Room for a number for each channel  # [m, 1] or [1, n]"""
    shapes = [(m.shape[0], 1) if by_row else (1, m.shape[1]) for m, by_row in zip(matrices, rows, strict=True)]
    sizes = list(map(math.prod, shapes))
    parts = matrices[0].new_empty(sum(sizes)).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def launch(
    kernel: Any, matrices: list[list[Tensor]], channels: list[list[Tensor]], rows: list[bool], *given: Any,
    tiles: bool = False, **options: bool,
) -> None:  # fmt: skip
    """One launch for all whose rows begin at multiples of 16 bytes, and one for the others.

    Args:
        matrices, channels: for the columns of the table, a tensor for each matrix; none where it is not asked for.
        tiles: whether a program has one tile, and not a walk along its channels.
    """
    firsts, count = matrices[0], len(matrices)
    shapes = tuple((tuple(matrix.shape), by_row) for matrix, by_row in zip(firsts, rows, strict=True))
    fields = np.zeros((len(firsts), FIELDS.value), np.int64)
    for column, tensors in enumerate([*matrices, *channels]):
        if tensors:
            fields[:, column] = [tensor.data_ptr() for tensor in tensors]
    fields[:, CHANNELS.value :] = [shape if by_row else shape[::-1] for shape, by_row in shapes]
    even = (fields[:, :count] % 16 == 0).all(1) & np.array([shape[1] % 4 == 0 for shape, _ in shapes])
    device = firsts[0].device
    table = sent(fields, device)
    for align, chosen in ((16, even), (4, ~even)):
        programs = items(shapes, tuple(chosen.tolist()), tiles, device, getattr(firsts[0], "fake_mode", None))
        if len(programs):
            kernel[(len(programs),)](table, programs, *given, ALIGN=align, **TILE, **options)


@functools.lru_cache(64)
def items(
    shapes: tuple[tuple[tuple[int, int], bool], ...], chosen: tuple[bool, ...], tiles: bool, device: torch.device,
    fake_mode: Any,
) -> Tensor:  # fmt: skip
    """The programs of a launch: matrix, block, side  # int32 [programs, 4]"""
    found = [np.zeros((0, 4), np.int32)]
    for t, (shape, by_row) in enumerate(shapes):
        many, steps = (TILE["SHORT"], TILE["LONG"]) if by_row else (TILE["LONG"], TILE["SHORT"])
        channels, length = shape if by_row else shape[::-1]
        blocks = chosen[t] * -(-channels // many) * (-(-length // steps) if tiles else 1)
        found.append(np.full((blocks, 4), (t, 0, by_row, 0), np.int32))
        found[-1][:, 1] = np.arange(blocks)
    return sent(np.concatenate(found), device)


def sent(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on the device; the host does not wait for it."""
    here = torch.from_numpy(array)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here


def variants() -> Iterator[Variant]:
    common = {"T": "*i64", "ITEMS": "*i32", **TILE}
    adam = {**common, "CORRECTIONS": "*fp32", "beta2": "fp32", "rest1": "fp32", "rest2": "fp32", "eps": "fp32"}
    whats = {"N and norms": (True, True), "N": (True, False), "norms": (False, True)}
    for align, told in ((16, ""), (4, ", rows that begin anywhere")):
        yield Variant(f"norms{told}", norms_kernel, {**common, "ALIGN": align})
        yield Variant(f"scale_add{told}", scale_add_kernel, {**common, "keep": "fp32", "ALIGN": align})
        for what in whats if align == 16 else ["N and norms"]:
            store, sizes = whats[what]
            arguments = {**adam, "STORE": store, "SIZES": sizes, "ALIGN": align}
            yield Variant(f"adam_small, {what}{told}", adam_kernel, arguments)
