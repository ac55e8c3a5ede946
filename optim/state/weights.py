"""How weights are kept: in bf16, which the model sees, with 0, 8 or 16 low bits beside it, which only a step reads.

One split of the pattern of an fp32 number, with b low bits; r decides how what is not kept is rounded:

    kept = (bits + r) >> (16 - b)       nearest: ties to even; random: r in [0, 2^(16 - b)); b = 16 keeps all
    high = (kept + 2^(b - 1)) >> b      kept, rounded to nearest, ties away from zero
    low  = kept - (high << b)           in [-2^(b - 1), 2^(b - 1)): int8 or int16
    join = ((high << b) + low) << (16 - b)

Patterns are in the order of magnitudes, so a border between exponents is no case of its own. bf16 alone, rounded at
random, is 2010.06192's; bf16 with 8 bits has the 24 of FlashOptim (2602.23349); with 16 it is fp32.

The surprise: `high` is made by this formula and never by a cast, for a tie of a cast goes to even, and 2^(b - 1) has no
code in `low`. And nearest is not the safe choice: what is below half a spacing never moves a weight, above all decay.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from thriftlab.optim.state.counters import begin_counting
from thriftlab.optim.state.keys import Spec, State, keyed_seed
from thriftlab.optim.state.storage import random_bits

WeightDtype = Literal["fp32", "bf16", "bf16+8", "bf16+16"]
Rounding = Literal["random", "nearest"]
LOW_BITS = {"bf16": 0, "bf16+8": 8, "bf16+16": 16}
LOW, STEP = "weight.low", "weight.step"  # keys of a state: the low bits, and how often they were rounded at random
NAN = 0x7FC00000


def low_dtype(bits: int) -> torch.dtype:
    return {8: torch.int8, 16: torch.int16}[bits]


def split(weight: Tensor, bits: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """fp32 -> what the model sees, bf16, and `bits` low bits of each entry, None of 0.

    Args:
        noise: int32, in [0, 2^(16 - bits)), to round at random; None: to nearest.
    """
    pattern, dropped = weight.view(torch.int32), 16 - bits
    kept = torch.where(weight.isnan(), NAN, pattern)  # other patterns of a NaN would carry over into numbers
    if dropped:
        nearest = (1 << dropped - 1) - 1
        kept = kept.add_(kept >> dropped & 1).add_(nearest) if noise is None else kept.add_(noise)
        kept = kept.bitwise_right_shift_(dropped)
    if not bits:
        return kept.to(torch.int16).view(torch.bfloat16), None
    high = (kept + (1 << bits - 1)).bitwise_right_shift_(bits)
    low = kept.sub_(high << bits).to(low_dtype(bits))
    return high.to(torch.int16).view(torch.bfloat16), low


def join(high: Tensor, low: Tensor | None) -> Tensor:
    """The fp32 number that `split` kept."""
    pattern = high.view(torch.int16).to(torch.int32)
    bits = 0 if low is None else 8 * low.itemsize
    if low is not None:
        pattern = pattern.bitwise_left_shift_(bits).add_(low)
    return pattern.bitwise_left_shift_(16 - bits).view(torch.float32)


# In an optimizer: what is kept of a weight is its parameter, bf16, and its state.


def few_bits(weight: Tensor, group: dict[str, Any]) -> bool:
    """Whether a weight is kept in few bits; without `weight_dtype` in its group a bf16 weight is stepped as it is."""
    return weight.dtype == torch.bfloat16 and "weight_dtype" in group


def dtype_of_step(weight: Tensor, group: dict[str, Any]) -> torch.dtype:
    """That of the weight which a rule sees, and for which it declares its state."""
    return torch.float32 if few_bits(weight, group) else weight.dtype


def low_spec(shape: tuple[int, ...], dtype: torch.dtype, group: dict[str, Any]) -> Spec:
    """The state that a weight of this shape and dtype has beside what its rule keeps."""
    if dtype != torch.bfloat16 or "weight_dtype" not in group:
        return {}
    bits = LOW_BITS[group["weight_dtype"]]
    low: Spec = {LOW: (shape, low_dtype(bits))} if bits else {}
    return low | ({STEP: ((), torch.int64)} if rounds_randomly(group) else {})


def begun(state: State) -> bool:
    """Whether a state has anything beside the low bits, which are there before the first step."""
    return any(not key.startswith("weight.") for key in state)


def rounds_randomly(group: dict[str, Any]) -> bool:
    return group["weight_dtype"] != "bf16+16" and group["weight_rounding"] == "random"


def drop_low_bits(state: State) -> None:
    """Of a weight that was written outside of a step, and is what the model sees of it."""
    if LOW in state:
        state[LOW].zero_()


def begin(weight: Tensor, state: State, group: dict[str, Any]) -> None:
    """Low bits of zero, and the counter of random bits, for a weight that has none yet."""
    for key, (shape, dtype) in low_spec(tuple(weight.shape), weight.dtype, group).items():
        if shape and key not in state:
            state[key] = torch.zeros_like(weight, dtype=dtype)
    if rounds_randomly(group):
        begin_counting((STEP,), weight, state, group)


def noise(name: str, state: State, group: dict[str, Any], first: int, like: Tensor) -> Tensor | None:
    """What `split` adds to a piece that begins at entry `first`, row-major, of the weight `name`; None: nearest.

    A function of (seed, name, own step, entry): under a key of its own, or weight and second moment would round alike.
    """
    if not rounds_randomly(group):
        return None
    key = torch.tensor(keyed_seed(group["weight_seed"], f"{name}/weight", 0), device="cpu")
    bits = random_bits(key, state[STEP], first, first + like.numel(), like.device)
    return bits.bitwise_right_shift_(LOW_BITS[group["weight_dtype"]]).view(like.shape)
