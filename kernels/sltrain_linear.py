"""The low-rank plus sparse product of SLTrain (2406.02214), whose weight never exists as a whole.

    y = x W^T,   W = scale B A + S,   S zero but at fixed positions

Blocks of W's rows are made, used and dropped; backward makes them again, and of the gradient G = dy^T x of W, too, a
block at a time, from which it takes what A, B and the positions of S need. On a GPU one block is the whole W of a
layer: where the entries of a smaller one begin only the device knows, and to ask it would stop the queue.

The surprise: the method saves memory and no work. As the published code does, this multiplies x with a dense W, 6 m n
a token forward and backward, and in every micro-batch adds 8 r m n for the products of the factors. What it does not do
is to hold W and G, m n numbers each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from thriftlab.kernels.lost_linear import product_dtype

BLOCKS = 16  # of W's rows on a CPU: beside activations and factors no more than m n / 8 numbers are there at once


def sltrain_linear(
    x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_value: Tensor, sp_index: Tensor, scale: float
) -> Tensor:
    """y = x W^T with W = scale lr_out lr_in, to which sp_value is added at sp_index. Differentiable once.

    Keeps x alone.

    Args:
        x: [..., in].
        lr_in: [rank, in].
        lr_out: [out, rank].
        sp_value: [entries].
        sp_index: [entries] int64, distinct and ascending: positions in W, row after row.
        scale: of the low-rank part.

    Returns:
        [..., out], of x's dtype, or of autocast's.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = sltrain(rows, lr_in, lr_out, sp_value, sp_index, scale, product_dtype(x))
    return y.view(*x.shape[:-1], len(lr_out))


def forward(
    x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_value: Tensor, sp_index: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    x, lr_in = x.to(dtype), lr_in.to(dtype)
    y = x.new_empty(len(x), len(lr_out))
    for rows, entries in blocks(sp_index, len(lr_out), x.shape[1]):
        place = sp_index[entries] - rows.start * x.shape[1]
        y[:, rows] = x @ block(lr_in, lr_out[rows], sp_value[entries], place, scale).T
    return y


def backward(
    grad: Tensor, x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_value: Tensor, sp_index: Tensor, scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, lr_in, lr_out and sp_value; `grad` is [tokens, out]."""
    inputs, low = x.to(dtype), lr_in.to(dtype)
    grad_x = torch.zeros_like(x, dtype=exact(x.dtype))
    grad_in = torch.zeros_like(lr_in, dtype=exact(lr_in.dtype))
    grad_out, grad_value = torch.empty_like(lr_out), torch.empty_like(sp_value)
    for rows, entries in blocks(sp_index, len(lr_out), x.shape[1]):
        place = sp_index[entries] - rows.start * x.shape[1]
        add_product(grad_x, grad[:, rows], block(low, lr_out[rows], sp_value[entries], place, scale))
        grad_weight = grad[:, rows].T @ inputs  # [rows, in]
        grad_value[entries] = grad_weight.view(-1)[place].to(sp_value.dtype)
        grad_out[rows] = scale * (grad_weight @ low.T)
        add_product(grad_in, (scale * lr_out[rows].T).to(dtype), grad_weight)
        del grad_weight  # before the next block is there
    return grad_x.to(x.dtype), grad_in.to(lr_in.dtype), grad_out, grad_value


# Operators, which torch.compile takes as they are: how many entries a block has it could not know.
sltrain = torch.library.custom_op("thriftlab::sltrain", forward, mutates_args=())
sltrain_backward = torch.library.custom_op("thriftlab::sltrain_backward", backward, mutates_args=())


@sltrain.register_fake
def _(x, lr_in, lr_out, sp_value, sp_index, scale, dtype):
    return x.new_empty(len(x), len(lr_out), dtype=dtype)


@sltrain_backward.register_fake
def _(grad, x, lr_in, lr_out, sp_value, sp_index, scale, dtype):
    return tuple(torch.empty_like(t) for t in (x, lr_in, lr_out, sp_value))


def keep(ctx, inputs, output):
    """x and the weights as they came, whatever the dtype of the products."""
    *tensors, ctx.scale, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx, grad):
    return *sltrain_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.dtype), None, None, None


sltrain.register_autograd(differentiate, setup_context=keep)


def blocks(sp_index: Tensor, rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Rows of W, and the entries of S that stand in them."""
    if sp_index.device.type != "cpu":
        yield slice(0, rows), slice(0, len(sp_index))
        return
    size = -(-rows // BLOCKS)
    starts = range(0, rows, size)
    ends = torch.arange(1, len(starts) + 1, device=sp_index.device) * (size * columns)
    entry = 0
    for start, end in zip(starts, torch.searchsorted(sp_index, ends).tolist(), strict=True):
        yield slice(start, min(start + size, rows)), slice(entry, end)
        entry = end


def block(lr_in: Tensor, lr_out: Tensor, sp_value: Tensor, place: Tensor, scale: float) -> Tensor:
    """Some rows of W, [rows, in], of the dtype of `lr_in`; `lr_out` are those rows, and `place` counts from them."""
    weight = (scale * lr_out).to(lr_in.dtype) @ lr_in
    weight.view(-1)[place] += sp_value.to(lr_in.dtype)  # distinct: nothing is added twice, in any order
    return weight


def exact(dtype: torch.dtype) -> torch.dtype:
    """In which a sum over blocks is made."""
    return torch.promote_types(dtype, torch.float32)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, without a tensor in between where the dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def reference(x: Tensor, lr_in: Tensor, lr_out: Tensor, sp_value: Tensor, sp_index: Tensor, scale: float) -> Tensor:
    """The same as it is written: the slow truth."""
    weight = scale * lr_out @ lr_in
    return x @ weight.flatten().index_add(0, sp_index, sp_value.to(weight.dtype)).view_as(weight).T
