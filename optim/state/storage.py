"""How moments are kept: in fp32, in bf16, or in 8 bits by blocks of 256 (2110.02861); all sums are made in fp32.

A moment is a tensor `state[name]` whose dtype says how it is kept; the 8-bit codes have a `state[name.scale]` beside
them. `load` gives it as numbers, a rule moves those in place, `store` puts them back. fp32 is loaded as itself.

The surprise: a second moment moves by 1 - b2 = 0.1 % of itself in a step, less than half of bf16's spacing, and rounded
to nearest it would never decay. It is rounded up or down at random, right in the mean. The random bits are a hash of
(seed, name, step, entry), so they are the same wherever and in whatever pieces a tensor is stepped.

torchao's 8-bit state is a subclass of Tensor with whole blocks only, its second moments may become 0, and it looks for
its codes in eight rounds; so this is ours.
"""

import functools
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from thriftlab.optim.state.keys import Spec, State, hash63, keyed_seed

StateDtype = Literal["fp32", "bf16", "8bit"]
SECOND_MOMENTS = ("exp_avg_sq",)  # never negative, move slowly, and stand in denominators
BLOCK = 256  # entries of one 8-bit scale


def kept_spec(names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Spec:
    """What is kept of moments of a tensor of this shape and dtype."""
    kept = {"fp32": wide(dtype), "bf16": torch.bfloat16, "8bit": torch.uint8}[group.get("state_dtype", "fp32")]
    spec: Spec = {}
    for name in names:
        spec[name] = (shape, kept)
        if kept == torch.uint8:
            spec[f"{name}.scale"] = ((-(-torch.Size(shape).numel() // BLOCK),), torch.float32)
    return spec


def by_entry(group: dict[str, Any]) -> bool:
    """Whether moments are kept entry by entry; the scale of an 8-bit block makes its entries depend on each other."""
    return group.get("state_dtype") != "8bit"


def make_zero(names: tuple[str, ...], like: Tensor, state: State, group: dict[str, Any]) -> None:
    """Moments of a tensor `like`, all zero; they lie in memory as it does where they are loaded as themselves."""
    for key, (shape, dtype) in kept_spec(names, tuple(like.shape), like.dtype, group).items():
        alike = dtype == like.dtype == wide(dtype) and shape == like.shape
        state[key] = torch.zeros_like(like) if alike else torch.zeros(shape, dtype=dtype, device=like.device)


def convert(state: State, key: str, dtype: torch.dtype) -> None:
    """Keeps a floating tensor, or the codes of a moment, in another dtype."""
    kept = state[key]
    if kept.dtype == dtype or not (kept.is_floating_point() or f"{key}.scale" in state):
        return
    numbers = load(state, key) if kept.dtype == torch.uint8 else kept
    if dtype == torch.uint8:
        codes, state[f"{key}.scale"] = quantise(numbers.reshape(-1), positive=key in SECOND_MOMENTS)
        state[key] = codes.view(kept.shape)
    else:
        state[key] = numbers.to(dtype)
        state.pop(f"{key}.scale", None)


def drop(names: tuple[str, ...], state: State) -> None:
    """Forgets moments."""
    for name in names:
        state.pop(name, None)
        state.pop(f"{name}.scale", None)


def prune(state: State, share: float) -> None:
    """Zeroes this share of the entries of each moment, the smallest; for moments that are kept entry by entry."""
    for moment in (tensor for tensor in state.values() if isinstance(tensor, Tensor) and tensor.ndim):
        sizes = moment.abs()
        if count := round(share * moment.numel()):
            moment.masked_fill_(sizes <= sizes.flatten().sort().values[count - 1], 0)


def rounding_spec(group: dict[str, Any]) -> Spec:
    """The state that random rounding needs: one integer."""
    return {"rounding": ((), torch.int64)} if group.get("state_dtype") == "bf16" else {}


def key_rounding(names: list[str], states: list[State], group: dict[str, Any]) -> None:
    """Gives each tensor the key of its random bits, a function of (seed, name)."""
    for name, state in zip(names, states, strict=True):
        for key in rounding_spec(group):
            if key not in state:
                state[key] = torch.tensor(keyed_seed(group.get("seed", 0), name, 0), device="cpu")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are made in: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def load(state: State, name: str) -> Tensor:
    """A moment in fp32 (or fp64), in its shape."""
    kept = state[name]
    if kept.dtype == torch.uint8:
        return load_piece(state, name, 0, kept.numel()).view(kept.shape)
    return kept.to(wide(kept.dtype))


def store(state: State, name: str, moment: Tensor) -> None:
    """Puts back what `load` gave."""
    store_piece(state, name, moment, 0, moment.numel())


def load_piece(state: State, name: str, start: int, stop: int) -> Tensor:
    """Entries start to stop of a moment, flat; `start` is a multiple of BLOCK."""
    kept = state[name].reshape(-1)[start:stop]
    if kept.dtype != torch.uint8:
        return kept.to(wide(kept.dtype))
    scale = state[f"{name}.scale"][start // BLOCK : -(-stop // BLOCK)]
    levels, _ = tables(name in SECOND_MOMENTS, kept)
    return (
        levels.index_select(0, in_blocks(kept).view(-1).int())
        .view(-1, BLOCK)
        .mul_(scale[:, None])
        .view(-1)[: len(kept)]
    )


def store_piece(state: State, name: str, moment: Tensor, start: int, stop: int) -> None:
    """Puts back what `load_piece` gave."""
    kept = state[name]
    if kept.dtype == wide(kept.dtype):  # what was loaded is what is kept
        return
    flat, moment = kept.view(-1)[start:stop], moment.reshape(-1)
    if kept.dtype == torch.uint8:
        codes, scale = quantise(moment, positive=name in SECOND_MOMENTS)
        flat.copy_(codes)
        state[f"{name}.scale"][start // BLOCK : -(-stop // BLOCK)] = scale
    elif name in SECOND_MOMENTS:
        first = int(state.get("whole.first", 0))  # of a fragment: its place in the whole
        bits = random_bits(state["rounding"], state["step"], first + start, first + stop, kept.device)
        flat.copy_(round_randomly(moment, bits))
    else:
        flat.copy_(moment)


def random_bits(key: Tensor, step: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """16 random bits for each of the entries, int32 [stop - start].

    A finaliser of 32 bits (lowbias32 by C. Wellons) on entry + key, with another key between its rounds. Shifts carry
    the sign along, so one of the 32 bits is lost.
    """
    keys = hash63(key + step.long())
    x = torch.arange(stop - start, dtype=torch.int32, device=device).add_((keys + start).int())
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_xor_((keys >> 31).int())
    x.bitwise_xor_(x >> 15).mul_(-0x7B935975)
    return x.bitwise_right_shift_(16).bitwise_and_(0xFFFF)


def round_randomly(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to one of the two bf16 around it: up with probability (x - below) / (above - below), so right in the mean.

    bf16 is the upper half of fp32: adding 16 random bits to the lower half carries over with just that probability.
    """
    whole = x.float().contiguous().view(torch.int32).clamp(max=0x7FC00000)  # a NaN with other bits would overflow
    return whole.add_(bits).bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16)


def in_blocks(x: Tensor) -> Tensor:
    """[-(-n // BLOCK), BLOCK] of [n], the last block filled up with zeros."""
    return (pad(x, (0, -len(x) % BLOCK)) if len(x) % BLOCK else x).view(-1, BLOCK)


def quantise(x: Tensor, positive: bool) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] of the levels nearest to x / scale; scale fp32 [n / BLOCK] is the largest entry of each block.

    A look-up by the upper half of the quotient's bits; the lower half decides where a border between levels lies
    within such a cell (`_cells`).
    """
    blocks = in_blocks(x.float())
    scale = blocks.abs().amax(1)
    bits = (blocks / torch.where(scale > 0, scale, 1)[:, None]).view(-1).view(torch.int32)
    if not positive:  # so that integers are in the order of the numbers
        bits = bits ^ (bits >> 31 & 0x7FFFFFFF)
    _, cells = tables(positive, x)
    found = cells.index_select(0, (bits >> 16).add_(2**15)).add_(bits & 0xFFFF)
    return found.bitwise_right_shift_(16).to(torch.uint8)[: len(x)], scale


@functools.cache
def _levels(positive: bool) -> list[float]:
    """256 levels in [-1, 1] or (0, 1]: seven decades, each with twice as many, evenly spaced, as the one below it.

    The paper's dynamic map; but 0 is no level of the positive one, as an entry that is small in its block must not
    become a denominator of zero (2309.01507).
    """
    decades = [(10.0 ** (i - 6), 2 ** (i + positive)) for i in range(7)]
    upper = [ten * (0.1 + 0.9 * (j + 0.5) / n) for ten, n in decades for j in range(n)] + [1.0]
    return [1e-7, *upper] if positive else sorted([-level for level in upper[:-1]] + [0.0, *upper])


def codebook(positive: bool, device: torch.device | str) -> Tensor:
    """The levels of the codes, fp32 [256], ascending."""
    return torch.tensor(_levels(positive), device=device)


@functools.cache
def _cells(positive: bool) -> np.ndarray:
    """For each upper half of a number's bits: the code of its first number, and how far its border is from its end.

    int32 [2^16], cells in the order of the numbers: code * 2^16 + 2^16 - 1 - border, or + 0 where there is no border.
    Adding the lower half of a number's bits carries over into the code for those beyond the border. A cell is 2^-7 of
    its numbers wide, narrower than any level, so it has one border at most.
    """
    levels = np.array(_levels(positive), np.float32)
    borders = ((levels[1:] + levels[:-1]) / 2).view(np.int32)
    borders = np.where(borders < 0, borders ^ 0x7FFFFFFF, borders).astype(np.int64)
    first = np.arange(-(2**15), 2**15, dtype=np.int64) << 16
    code = np.searchsorted(borders, first)
    border = np.append(borders, 2**40)[code] - first
    return ((code << 16) + np.where(border < 2**16, 2**16 - 1 - border, 0)).astype(np.int32)


def tables(positive: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """(levels, cells) where `like` is; made once."""
    return _tables(positive, like.device, like.fake_mode if isinstance(like, FakeTensor) else None)


@functools.lru_cache(8)
def _tables(positive: bool, device: torch.device, fake_mode: Any) -> tuple[Tensor, Tensor]:
    return codebook(positive, device), torch.tensor(_cells(positive), device=device)
