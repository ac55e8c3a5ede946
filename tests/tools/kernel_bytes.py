"""Launches whose bytes are known: for each a formula, in bytes an entry, and the launch at a size that shows it.

Sizes are multiples of a tile and large enough that what a launch reads beside its tensors is small.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from tests.tools.triton_trace import Moved, trace
from thriftlab.kernels.dispatch import VARIABLE
from thriftlab.optim import METHODS
from thriftlab.optim.core.fused import books


class Case(NamedTuple):
    formula: float  # bytes of an entry
    launch: Callable[[], int]  # gives the number of entries
    asked: float = 1.15  # what instructions may ask for, in formulas

    def run(self) -> tuple[Moved, int]:
        with trace(books(torch.device("cpu"), None)) as moved:
            entries = self.launch()
        return moved, entries


def step(method: str, dtype: torch.dtype = torch.float32, low: torch.dtype | None = None, **hyper: Any) -> int:
    """The second step of a method; the first one, which makes its state, is plain torch's. Weights and gradients have a
    dtype; `low`: a bf16 weight has low bits of this dtype beside it."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(16, 1024, generator=draw).to(dtype)) for _ in range(2)]
    optimizer = METHODS[method](list(zip("ab", weights, strict=True)), lr=1e-3, weight_decay=0.1, **hyper)
    for weight in weights:
        weight.grad = torch.randn(16, 1024, generator=draw).to(dtype)
    with patch.dict(os.environ, {VARIABLE: "torch"}):
        optimizer.step()
    if low:
        for weight in weights:
            beside = {"weight.low": torch.zeros(weight.shape, dtype=low), "weight.step": torch.tensor(1)}
            optimizer.state[weight].update(beside)
        few = {"weight_dtype": f"bf16+{8 * low.itemsize}", "weight_rounding": "random", "weight_seed": 0}
        optimizer.param_groups[0].update(few)
    with patch.dict(os.environ, {VARIABLE: "triton"}):
        optimizer.step()
    return sum(weight.numel() for weight in weights)


def frugal(subspace: str, **hyper: Any) -> Callable[[], int]:
    return lambda: step("frugal", subspace=subspace, **hyper)


CODES = 4 * (1 + 4 / 256)  # two moments in 8 bits, with their scales: read and written
SHAPES = ((64, 512), (16, 1024))  # rows are channels of the first, columns of the second
ROWS = [True, False]


def matrices() -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in SHAPES]


def channel_norms() -> int:
    from thriftlab.kernels import norm_rows

    norm_rows.norms(matrices(), ROWS)
    return entries()


def adam_small(directions: bool, sizes: bool) -> int:
    from thriftlab.kernels import norm_rows

    given = (matrices(), matrices(), matrices(), torch.ones(2))
    norm_rows.adam_small(*given, (0.9, 0.999), 1e-8, ROWS, directions, sizes)
    return entries()


def scale_add() -> int:
    from thriftlab.kernels import norm_rows

    norm_rows.scale_add(matrices(), matrices(), [torch.zeros(64, 1), torch.zeros(1, 1024)], ROWS)
    return entries()


ROWS_OF_LOGITS, BF16, FP32 = 4, torch.bfloat16, torch.float32


def cross_entropy(dtype: torch.dtype, vocab: int, backward: bool) -> int:
    """Of rows that begin at multiples of 16 entries."""
    from thriftlab.kernels.cross_entropy_rows import ce_grad_, ce_stats

    logits = torch.zeros(ROWS_OF_LOGITS, vocab + -vocab % 16, dtype=dtype)[:, :vocab]
    targets, one = torch.zeros(ROWS_OF_LOGITS, dtype=torch.int64), torch.ones(ROWS_OF_LOGITS)
    ce_grad_(logits, targets, one, one) if backward else ce_stats(logits, targets)
    return logits.numel()


TOKENS, INNER, RANK, CHANNELS = 512, 512, 128, 8
WIDTH = RANK + CHANNELS


def lost(launch: Callable[..., object]) -> int:
    """Of LLaMA-60M's layers; entries are those of [act(h) | x_I]. A channel of a token is a sector of 32 bytes of x."""
    from thriftlab.kernels import branches

    x, h = torch.zeros(TOKENS, INNER, dtype=BF16), torch.zeros(TOKENS, RANK, dtype=BF16)
    launch(branches, x, h, torch.zeros(TOKENS, WIDTH, dtype=BF16), torch.arange(0, INNER, INNER // CHANNELS))
    return TOKENS * WIDTH


def joined(branches, x, h, grad, index) -> None:
    branches.join_branches(x, h, index, "silu")


def parted(branches, x, h, grad, index) -> None:
    branches.part_branches_(grad, h, "silu")


def added(branches, x, h, grad, index) -> None:
    branches.add_channels_(x, grad[:, RANK:], index)


def folded(branches, *_) -> None:
    branches.fold(torch.zeros(TOKENS, RANK), torch.zeros(TOKENS, CHANNELS), 0.7, BF16)


def entries() -> int:
    return sum(rows * columns for rows, columns in SHAPES)


CASES: dict[str, Case] = {
    "AdamW, fp32": Case(12 + 16, lambda: step("adamw")),
    "AdamW, bf16 moments": Case(12 + 8, lambda: step("adamw", state_dtype="bf16")),
    "AdamW, 8-bit moments": Case(12 + CODES, lambda: step("adamw", state_dtype="8bit")),
    "AdamW, bf16+8 weights, 8-bit moments": Case(
        6 + 2 + CODES, lambda: step("adamw", torch.bfloat16, torch.int8, state_dtype="8bit")
    ),
    "AdamW, bf16+16 weights, fp32 moments": Case(8 + 2 + 16, lambda: step("adamw", torch.bfloat16, torch.int16)),
    "signs, bf16+8 weights": Case(6 + 2, lambda: step("signsgd", torch.bfloat16, torch.int8)),
    "signs": Case(12, lambda: step("signsgd")),
    "FRUGAL, half of the blocks": Case(12 + 16 / 2, frugal("blocks", density=0.5)),
    "FRUGAL, a quarter of the columns": Case(12 + 16 / 4, frugal("columns")),
    "FRUGAL, a quarter of the columns, 8-bit moments": Case(12 + CODES / 4, frugal("columns", state_dtype="8bit"), 2.3),
    "FRUGAL, a quarter of the rows": Case(12 + 16 / 4, frugal("rows")),
    "FRUGAL, a quarter of the rows, 8-bit moments": Case(12 + CODES / 4, frugal("rows", state_dtype="8bit")),
    "norms": Case(4, channel_norms),
    "adam_small: N": Case(12 + 8 + 4, lambda: adam_small(True, False)),
    "adam_small: N and norms": Case(12 + 8 + 4, lambda: adam_small(True, True)),
    "adam_small: norms": Case(12 + 8, lambda: adam_small(False, True)),
    "scale_add": Case(8 + 4, scale_add),
    "ce_stats: bf16": Case(2, lambda: cross_entropy(BF16, 50304, False)),
    "ce_stats: bf16, 50257 columns": Case(2, lambda: cross_entropy(BF16, 50257, False)),
    "ce_stats: fp32": Case(4, lambda: cross_entropy(FP32, 50304, False)),
    "ce_grad_: bf16": Case(4, lambda: cross_entropy(BF16, 50304, True)),
    "ce_grad_: bf16, 50257 columns": Case(4, lambda: cross_entropy(BF16, 50257, True)),
    "ce_grad_: fp32": Case(8, lambda: cross_entropy(FP32, 50304, True)),
    "join_branches: bf16": Case((2 * RANK + 32 * CHANNELS) / WIDTH + 2, lambda: lost(joined)),
    "fold: fp32 to bf16": Case(4 + 2, lambda: lost(folded)),
    "part_branches_: bf16": Case((2 + 2 + 2) * RANK / WIDTH, lambda: lost(parted)),
    "add_channels_: bf16": Case((32 + 32 + 2) * CHANNELS / WIDTH, lambda: lost(added)),
}
