"""A way in which a Triton kernel is compiled: each file of kernels lists its own in `variants()`, for gate.py.

Data alone: what the launcher would hand to the compiler, and what may be expected of the result.
"""

from typing import Any, NamedTuple


class Variant(NamedTuple):
    name: str  # in words, unique in its file: "adam, bf16+8, 8-bit moments"
    kernel: Any  # what @triton.jit made
    arguments: dict[str, Any]  # by name: triton's type ("*fp32", "*i64", "i32", "fp32"), or the value of a constexpr
    warps: int = 4
    stages: int = 3
    multiples: tuple[str, ...] = ()  # integers that the launcher gives as multiples of 16; pointers always are
    exact: bool = False  # promises the interpreter's bits: no fused multiply-add, no flush of subnormals to zero
    narrow: bool = False  # loads or stores 8 or 16 bits at a time: a gather, or a tensor that begins anywhere
