"""The low-rank plus channel-sparse product of LOST (2508.02668) as two matrix products.

    y = gamma act(x A^T) B^T + (1 - gamma) x_I S^T  =  [gamma act(x A^T) | (1 - gamma) x_I] [B | S]^T

The surprise: the sum of two branches, as it is written, moves the output through memory five times (two products, two
scalings, a sum); side by side in one buffer the branches are summed inside of one product. In backward the same buffer
is rebuilt, so that beside x only h = x A^T, of rank numbers a token, is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(h: Tensor, act: str) -> Tensor:
    if act == "none":
        return h
    return {"silu": F.silu, "gelu": F.gelu, "relu2": lambda h: F.relu(h).square()}[act](h)


def lost_linear(
    x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_weight: Tensor | None, sp_index: Tensor | None,
    gamma: float, act: str,
) -> Tensor:  # fmt: skip
    """y = gamma act(x lr_in^T) lr_out^T + (1 - gamma) x[sp_index] sp_weight^T.

    Args:
        x: [..., in].
        lr_in: [rank, in].
        lr_out: [out, rank].
        sp_weight: [out, channels]; None: the low-rank branch alone.
        sp_index: [channels] int64, distinct.
        gamma: weight of the low-rank branch.
        act: silu, gelu, relu2 or none.

    Returns:
        [..., out].
    """
    low = activate(F.linear(x, lr_in), act)
    if gamma != 1:
        low = low * gamma
    if sp_weight is None or sp_index is None:
        return F.linear(low, lr_out)
    sparse = x.index_select(-1, sp_index) * (1 - gamma)
    return F.linear(torch.cat([low, sparse], -1), torch.cat([lr_out, sp_weight], 1))


def reference(
    x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_weight: Tensor, sp_index: Tensor, gamma: float, act: str
) -> Tensor:
    """The same as it is written: the slow truth."""
    low = activate(x @ lr_in.T, act) @ lr_out.T
    return gamma * low + (1 - gamma) * (x[..., sp_index] @ sp_weight.T)
