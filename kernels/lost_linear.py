"""The low-rank plus channel-sparse product of LOST (2508.02668) as two matrix products.

    y = gamma act(x A^T) B^T + (1 - gamma) x_I S^T  =  [act(x A^T) | x_I] [gamma B | (1 - gamma) S]^T

The surprise: the sum of two branches, as it is written, moves the output through memory five times (two products, two
scalings, a sum). Side by side the branches are summed inside of one product, gamma falls on the small weights, and
beside x only h = x A^T, of rank numbers a token, is kept for backward. What lies between the products is one Triton
kernel each way on a GPU (branches.py), and plain torch elsewhere.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftlab.kernels.dispatch import path

aten = torch.ops.aten
ALIGN = 8  # columns of what is multiplied: tensor cores and vector units waste the rest of an uneven row

# name -> act(h), its gradient f(grad, h)
ACTS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (F.silu, aten.silu_backward),
    "gelu": (F.gelu, aten.gelu_backward),
    "relu2": (lambda h: F.relu(h).square(), lambda grad, h: grad * F.relu(h) * 2),
    "none": (lambda h: h, lambda grad, h: grad),
}


def lost_linear(
    x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_weight: Tensor | None = None, sp_index: Tensor | None = None,
    gamma: float = 1.0, act: str = "silu",
) -> Tensor:  # fmt: skip
    """y = gamma act(x lr_in^T) lr_out^T + (1 - gamma) x[..., sp_index] sp_weight^T. Differentiable once.

    Args:
        x: [..., in].
        lr_in: [rank, in].
        lr_out: [out, rank].
        sp_weight: [out, channels]; None: the low-rank branch alone.
        sp_index: [channels] int64, distinct.
        gamma: weight of the low-rank branch.
        act: silu, gelu, relu2 or none.

    Returns:
        [..., out], of x's dtype, or of autocast's.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = LostLinearFunction.apply(rows, lr_in, lr_out, sp_weight, sp_index, gamma, act, product_dtype(x))
    return y.view(*x.shape[:-1], len(lr_out))


class LostLinearFunction(torch.autograd.Function):
    """Keeps x and the weights as they came, whatever the dtype of the products: x is shared with other layers."""

    @staticmethod
    def forward(ctx, x, lr_in, lr_out, sp_weight, sp_index, gamma, act, dtype):
        h = F.linear(x.to(dtype), lr_in.to(dtype))  # [tokens, rank]
        ctx.save_for_backward(x, h, lr_in, lr_out, sp_weight, sp_index)
        ctx.gamma, ctx.act = gamma, act
        ctx.by_kernel = sp_index is not None and x.stride(1) == 1 and path(h, "branches") == "triton"
        join, fold, *_ = passes(ctx.by_kernel)
        return F.linear(join(x, h, sp_index, act), fold(lr_out, sp_weight, gamma, dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # [tokens, out]
        x, h, lr_in, lr_out, sp_weight, sp_index = ctx.saved_tensors
        rank, gamma, dtype = h.shape[1], ctx.gamma, h.dtype
        join, fold, part_, add_ = passes(ctx.by_kernel)
        grad_branches = grad @ fold(lr_out, sp_weight, gamma, dtype)  # [tokens, rank + channels]
        grad_h = part_(grad_branches, h, ctx.act)
        grad_x = grad_h @ lr_in.to(dtype)
        grad_in = grad_h.T @ x.to(dtype)
        grad_weight = (grad.T @ join(x, h, sp_index, ctx.act)).to(lr_out.dtype)  # [out, rank + channels]
        grad_out, grad_sparse = grad_weight[:, :rank] * gamma, None
        if sp_index is not None:
            channels = slice(rank, rank + len(sp_index))
            add_(grad_x, grad_branches[:, channels], sp_index)
            grad_sparse = grad_weight[:, channels] * (1 - gamma)
        return grad_x.to(x.dtype), grad_in.to(lr_in.dtype), grad_out, grad_sparse, None, None, None, None


def passes(by_kernel: bool) -> tuple[Callable[..., Tensor], ...]:
    """What lies between the products: see branches.py."""
    if by_kernel:
        from thriftlab.kernels import branches

        return branches.join_branches, branches.fold, branches.part_branches_, branches.add_channels_
    return join_branches, fold, part_branches_, add_channels_


def join_branches(x: Tensor, h: Tensor, sp_index: Tensor | None, act: str) -> Tensor:
    """[act(h) | x_I], [tokens, rank + channels]."""
    return beside(ACTS[act][0](h), None if sp_index is None else x.index_select(1, sp_index).to(h.dtype))


def fold(lr_out: Tensor, sp_weight: Tensor | None, gamma: float, dtype: torch.dtype) -> Tensor:
    """[gamma B | (1 - gamma) S], [out, rank + channels]."""
    low = lr_out if gamma == 1 else gamma * lr_out
    return beside(low.to(dtype), None if sp_weight is None else ((1 - gamma) * sp_weight).to(dtype))


def part_branches_(grad: Tensor, h: Tensor, act: str) -> Tensor:
    """The gradient of h, [tokens, rank]."""
    return ACTS[act][1](grad[:, : h.shape[1]], h)


def add_channels_(grad_x: Tensor, grad: Tensor, sp_index: Tensor) -> Tensor:
    grad_x[:, sp_index] += grad  # distinct: nothing is added twice, in any order
    return grad_x


def beside(low: Tensor, sparse: Tensor | None) -> Tensor:
    """[low | sparse | 0], to a multiple of ALIGN."""
    if sparse is None:
        return low
    missing = -(low.shape[1] + sparse.shape[1]) % ALIGN
    return torch.cat([low, sparse, low.new_zeros(len(low), missing)], 1)


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, has a Linear of x computed."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if casts else x.dtype


def reference(
    x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_weight: Tensor, sp_index: Tensor, gamma: float, act: str
) -> Tensor:
    """The same as it is written: the slow truth."""
    low = ACTS[act][0](x @ lr_in.T) @ lr_out.T
    return gamma * low + (1 - gamma) * (x[..., sp_index] @ sp_weight.T)
