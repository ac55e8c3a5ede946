"""A kernel that no GPU should run: a product in tiles of 128 x 256, whose sums alone fill all registers of a thread.

gate.py must refuse it; else it would let pass anything.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from thriftlab.kernels.variant import Variant


@triton.jit
def product(x, y, out, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    row, column, inner = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :], tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, STEP):
        left = tl.load(x + row * depth + (start + inner)[None, :])
        right = tl.load(y + (start + inner)[:, None] * COLUMNS + column)
        total = tl.dot(left, right, total, input_precision="tf32")
    tl.store(out + row * COLUMNS + column, total)


def variants() -> Iterator[Variant]:
    sizes = {"depth": "i32", "ROWS": 128, "COLUMNS": 256, "STEP": 32}
    yield Variant("128 x 256", product, {"x": "*fp32", "y": "*fp32", "out": "*fp32", **sizes}, multiples=("depth",))
