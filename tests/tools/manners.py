"""Every registered method, with each subspace and each way to keep moments that it declares, on a small network.

A new method is there without a line. torch's AdamW is among the plain ones, as control of what manners are.
"""

import io
from typing import Any, get_args

import pytest
import torch
from torch import nn

from thriftlab.optim import METHODS
from thriftlab.optim.core.hyper import hyperparameters, textual

SMALL = {"lr": 0.01, "rank": 2, "gap": 3, "density": 0.5}
TORCH = {"torch": torch.optim.AdamW}


def choices(method: type, key: str) -> list[dict[str, Any]]:
    """One setting for each word that a hyper-parameter may be, as it is declared; none where it is not."""
    declared = hyperparameters(method).get(key)
    if declared is None:
        return [{}]
    kinds = [textual(get_args(declared.annotation)[0])]
    words = [word for kind in kinds for word in get_args(kind)]
    words = [leaf for word in words for leaf in (get_args(word) or [word])]
    return [{key: word} for word in words if isinstance(word, str)] or [{}]


def small(method: type) -> dict[str, Any]:
    """Settings by which a small matrix is split too."""
    return {key: value for key, value in SMALL.items() if key in hyperparameters(method) or method in TORCH.values()}


def kinds() -> dict[str, tuple[type, dict[str, Any]]]:
    """Each method with each subspace, and with each way to keep moments."""
    found = {}
    for name, method in METHODS.items():
        for setting in (*choices(method, "subspace"), *choices(method, "state_dtype")):
            found["-".join([name, *setting.values()])] = (method, {**small(method), **setting})
    return found


KINDS = kinds()
PLAIN = {name: (method, small(method) if method in METHODS.values() else {"lr": 0.01}) for name, method in
         {**TORCH, **METHODS}.items()}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
every_method = pytest.mark.parametrize("kind", PLAIN.values(), ids=PLAIN.keys())
OURS = {name: kind for name, kind in PLAIN.items() if name in METHODS}
every_own = pytest.mark.parametrize("kind", OURS.values(), ids=OURS.keys())


class Net(nn.Module):
    def __init__(self, rows: int = 8, columns: int = 6, dtype: torch.dtype = torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(rows, columns, generator=draw).to(dtype))
        self.b = nn.Parameter(torch.randn(columns, rows, generator=draw).to(dtype))
        self.bias = nn.Parameter(torch.randn(rows, generator=draw).to(dtype))
        self.scalar = nn.Parameter(torch.randn((), generator=draw).to(dtype))


def give_gradients(params: Any, step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(net.parameters(), step)
        optimizer.step()


def trained(kind, steps: int = 4, **net: Any) -> tuple[Net, torch.optim.Optimizer]:
    method, hyper = kind
    model = Net(**net)
    optimizer = method(model.named_parameters(), **hyper)
    train(model, optimizer, range(steps))
    return model, optimizer


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def has_shape(state: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.ndim for value in state.values())


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)
