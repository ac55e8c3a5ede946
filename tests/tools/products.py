"""The product of LOST: its tensors, its gradients, a rival form, the bytes that a form keeps and those it moves."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thriftlab.kernels.lost_linear import ACTS

aten = torch.ops.aten


def tensors(lead=(7,), inner=12, rank=5, out=9, channels=3, dtype=torch.float64, seed=0):
    """x, A, B, S that need gradients, I, and a gradient of y."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((*lead, inner), (rank, inner), (out, rank), (out, channels), (*lead, out))
    x, a, b, s, grad = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    index = torch.randperm(inner, generator=g)[:channels].sort().values
    return [t.requires_grad_() for t in (x, a, b, s)], index, grad


def gradients(function, leaves, index, grad, gamma=0.7, act="silu"):
    y = function(*leaves, index, gamma, act)
    return y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))


def concatenated(x, lr_in, lr_out, sp_weight, sp_index, gamma, act):
    """The two products under autograd."""
    buffer = torch.cat([gamma * ACTS[act][0](x @ lr_in.T), (1 - gamma) * x.index_select(-1, sp_index)], -1)
    return buffer @ torch.cat([lr_out, sp_weight], 1).T


def kept(function, leaves, index, **context):
    """Bytes that a forward keeps for its backward beside its arguments, storages counted once."""
    own = {t.untyped_storage().data_ptr() for t in (*leaves, index)}
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, **context):
        y = function(*leaves, index, 0.7, "silu")
    del y
    return sum(size for key, size in found.items() if key not in own)


class Traffic(TorchDispatchMode):
    """Bytes that operations read and write: every argument once and every result once; views are free.

    A gather or a scatter touches what it takes, not what it takes it from; what is made of zeros is written only.
    """

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (aten.index.Tensor, aten.index_select.default):
            moved = (out, out, args[1:])
        elif func is aten.index_put_.default:
            moved = (args[2], args[1:])
        elif func is aten.new_zeros.default:
            moved = out
        else:
            moved = () if func.is_view else (args, kwargs, out)
        self.bytes += sum(t.nbytes for t in tree_leaves(moved) if isinstance(t, torch.Tensor))
        return out


def traffic(function, *args):
    with Traffic() as counted:
        gradients(function, *args)
    return counted.bytes
