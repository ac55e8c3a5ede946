"""Dropout (Srivastava et al. 2014, JMLR 15:1929) where GPT-2 has it, without a generator that goes on.

Each entry of the residual stream after the embedding, and of the outputs of attention and MLP before they are added to
it, is zero with probability `rate` or else divided by 1 - rate. GPT-2 and nanoGPT drop attention weights as well, which
fused attention does not hand out; here they stay.

Whether an entry is dropped is a function of (seed, row of the run, place in the model, number of the entry within its
row). So a resume, the number of ranks, the size of micro-batches and a forward that is repeated do not change it.
Each (row, place) has a stream of splitmix64 (Steele, Lea & Flood 2014), of which a word serves four entries.
The surprise: Inductor compiles products with positions to code that overflows (pytorch issue 175966), so the draws are
an operator of their own, which it leaves alone.
"""

import torch
from torch import Tensor

from thriftlab.optim.state.keys import keyed_seed, mix64_

GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio as int64: splitmix64's increment
LEVELS = 2**16  # of a draw: rates are rounded to 1 / LEVELS


def row_keys(seed: int, first: int, count: int, rank: int, world: int, device: torch.device) -> Tensor:
    """Keys of this rank's part of the rows first, ..., first + count - 1 of the run, int64 [rows]."""
    row = torch.arange(first + rank, first + count, world, device=device)
    return mix64_(row * GOLDEN + keyed_seed(seed, "dropout", 0))


def dropout(x: Tensor, rate: float, keys: Tensor | None, place: int) -> Tensor:
    """x [rows * seq, dim] with entries dropped, or as it is without the keys of its rows; places of a model differ."""
    if keys is None:
        return x
    dropped = round(rate * LEVELS)
    draw = draws(keys, place, x.numel() // len(keys)).reshape(x.shape)
    kept = draw >= dropped - LEVELS // 2
    return x * kept.to(torch.promote_types(x.dtype, torch.float32)).mul_(LEVELS / (LEVELS - dropped))


@torch.library.custom_op("thriftlab::draws", mutates_args=())
def draws(keys: Tensor, place: int, count: int) -> Tensor:
    """Uniform int16 [rows, count]."""
    start = mix64_(keys + place)
    number = torch.arange(1, -(-count // 4) + 1, device=keys.device)
    return mix64_(start[:, None] + number * GOLDEN).view(torch.int16)[:, :count].contiguous()


@draws.register_fake
def _(keys: Tensor, place: int, count: int) -> Tensor:
    return keys.new_empty(len(keys), count, dtype=torch.int16)
