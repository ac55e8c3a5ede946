"""Numbers in a Triton kernel: stored as fp32 or bf16, computed with as fp32.

The surprise: no kernel sees a bf16. It is loaded and stored as the 16 bits that it is, the upper half of an fp32, and
rounded here: to nearest, ties to even. So the bits are the same on every GPU, under every version of triton, and in its
interpreter, which computes wrongly with bf16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def stored(tensor: Tensor) -> Tensor:
    """The tensor as a kernel takes it."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def widened(x):
    """fp32 of what was loaded."""
    if x.dtype == tl.int16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, kind: tl.constexpr):
    """What is stored of an fp32 where elements are of this kind."""
    if kind == tl.int16:
        bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))  # the sum below makes a number of other NaNs
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    else:
        return x.to(kind)
