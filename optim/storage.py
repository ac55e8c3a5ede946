"""How moments are kept: in fp32, in bf16, or in 8 bits by blocks of 256 (2110.02861); all sums are made in fp32.

A moment is a tensor `state[name]` whose dtype says how it is kept; the 8-bit codes have a `state[name.scale]` beside
them. `load` gives it as numbers, a rule moves those in place, `store` puts them back. fp32 is loaded as itself.

The surprise: a second moment moves by 1 - b2 = 0.1 % of itself in a step, less than half of bf16's spacing, and rounded
to nearest it would never decay. It is rounded up or down at random, right in the mean. The random bits are a hash of
(seed, name, step, entry), so they are the same wherever and in whatever pieces a tensor is stepped.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from thriftlab.optim.base import Spec, State, keyed_seed
from thriftlab.optim.subspace import hash63

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


def drop(names: tuple[str, ...], state: State) -> None:
    """Forgets moments."""
    for name in names:
        state.pop(name, None)
        state.pop(f"{name}.scale", None)


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
    return codebook(name in SECOND_MOMENTS, kept.device)[kept.int()] * scale.repeat_interleave(BLOCK)[: stop - start]


def store_piece(state: State, name: str, moment: Tensor, start: int, stop: int) -> None:
    """Puts back what `load_piece` gave."""
    kept = state[name]
    if kept.dtype == wide(kept.dtype):  # what was loaded is what is kept
        return
    flat, moment = kept.view(-1)[start:stop], moment.reshape(-1)
    if kept.dtype == torch.uint8:
        codes, scale = quantise(moment, codebook(name in SECOND_MOMENTS, kept.device))
        flat.copy_(codes)
        state[f"{name}.scale"][start // BLOCK : -(-stop // BLOCK)] = scale
    elif name in SECOND_MOMENTS:
        first = int(state.get("whole.first", 0))  # of a fragment: its place in the whole
        bits = random_bits(state["rounding"], state["step"], first + start, first + stop, kept.device)
        flat.copy_(round_randomly(moment, bits))
    else:
        flat.copy_(moment)


def random_bits(key: Tensor, step: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    """16 random bits for each of the entries, int32 [stop - start]."""
    entries = torch.arange(start, stop, device=device)
    return (hash63(entries + hash63(key + step.long())) & 0xFFFF).to(torch.int32)


def round_randomly(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 to one of the two bf16 around it: up with probability (x - below) / (above - below), so right in the mean.

    bf16 is the upper half of fp32: adding 16 random bits to the lower half carries over with just that probability.
    """
    whole = x.float().contiguous().view(torch.int32)
    rounded = ((whole + bits) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def quantise(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [n] of the levels nearest to x / scale; scale fp32 [n / BLOCK] is the largest entry of each block."""
    blocks = torch.nn.functional.pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1)
    ratio = blocks / torch.where(scale > 0, scale, 1).unsqueeze(1)
    codes = torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return codes.view(-1)[: len(x)].to(torch.uint8), scale


@functools.cache
def _levels(positive: bool) -> list[float]:
    """256 levels in [-1, 1] or (0, 1]: seven decades, each with twice as many, evenly spaced, as the one below it.

    The paper's dynamic map; but 0 is no level of the positive one, as an entry that is small in its block must not
    become a denominator of zero (2309.01507).
    """
    decades = [(10.0 ** (i - 6), 2 ** (i + positive)) for i in range(7)]
    upper = [ten * (0.1 + 0.9 * (j + 0.5) / n) for ten, n in decades for j in range(n)] + [1.0]
    return [1e-7, *upper] if positive else sorted([-level for level in upper[:-1]] + [0.0, *upper])


def codebook(positive: bool, device: torch.device) -> Tensor:
    """The levels of the codes, fp32 [256], ascending."""
    return torch.tensor(_levels(positive), device=device)
