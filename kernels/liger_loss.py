"""The loss of a linear head by Liger's kernel for Hopper: opt-in by THRIFTLAB_KERNELS=liger.

It makes the products and the cross-entropy in one kernel each way, and recomputes the logits in backward. It is not the
default, because the head's gradient is summed over waves of 1024 tokens in bf16: a model of that sum is off by 0.5 %
after 16 waves and by 1.0 % after 64, where one rounding of a sum in fp32 is off by 0.17 %. Every other sum here is
fp32. Logits are staged in fp16, and nothing is kept for the backward, whatever `keep_bytes` says.
"""

import os

import torch
from torch import Tensor

from thriftlab.kernels.dispatch import note

IGNORED = -100  # the one negative target that it takes
UNCHECKED = "LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"  # its check of targets makes the host wait in every call


@torch.compiler.disable
def liger_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[tokens] losses in fp32, of [tokens, dim] in bf16. `dispatch.path` has said that it can run."""
    os.environ[UNCHECKED] = "0"
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    note("loss kernel", "liger, head gradient summed in bf16")
    ignored = targets < 0
    hidden = hidden.masked_fill(ignored[:, None], 0)
    targets = targets.masked_fill(ignored, IGNORED)
    losses = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight.to(hidden.dtype), targets)
    return losses.masked_fill(ignored, 0)  # and with them the gradient, whatever it is
