"""fp32 and bf16 in the same kernel: whatever a tensor holds, its numbers are computed with in fp32.

A bf16 tensor is given as int16, see few_bits.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from thriftlab.kernels.few_bits import from_bf16, to_bf16


def stored(tensor: Tensor) -> Tensor:
    """The tensor as a kernel takes it."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def widened(x):
    """fp32 of what was loaded."""
    if x.dtype == tl.int16:
        return from_bf16(x)
    else:
        return x.to(tl.float32)


@triton.jit
def narrowed(x, kind: tl.constexpr):
    """What is stored of fp32 numbers where elements are of this kind."""
    if kind == tl.int16:
        return to_bf16(x)
    else:
        return x.to(kind)
