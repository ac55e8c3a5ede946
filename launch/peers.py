"""What the methods are timed beside: torch's AdamW, and other packages' versions of the same methods, if installed.

The surprise: the packages keep Python objects with tensors in their state, so `held_bytes` looks into those, too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from thriftlab.optim import METHODS
from thriftlab.optim.muon import newton_schulz

NO_REFRESH = 10**9  # steps between refreshes: more than are measured
RANK = 128
Tensors = list[Tensor]

# What a table shows of a method besides its defaults.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "frugal": tuple({"subspace": name} for name in ("blocks", "columns", "rows", "coordinates")),
    "apollo": ({"rank": RANK}, {"rank": 1, "granularity": "tensor", "scale": 128.0}),
    "adamw": ({}, {"state_dtype": "bf16"}),
}

# Steps whose kernels are compared with plain torch, and how far they may be from it.
KERNEL_STEPS: dict[str, tuple[str, dict[str, Any], float]] = {
    "adamw": ("adamw", {}, 1e-5),
    "adamw, 8bit": ("adamw", {"state_dtype": "8bit"}, 2e-3),
    "signsgd": ("signsgd", {}, 1e-5),
    "frugal, blocks": ("frugal", {"subspace": "blocks"}, 1e-5),
    "frugal, columns": ("frugal", {"subspace": "columns"}, 1e-5),
    "frugal, rows": ("frugal", {"subspace": "rows"}, 1e-5),
    "galore": ("galore", {"rank": RANK}, 1e-4),
    "fira": ("fira", {"rank": RANK}, 1e-4),
    "apollo": ("apollo", {"rank": RANK}, 1e-4),
}
# Steps whose bits on a device are those of triton's interpreter.
KERNEL_BITS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw, bf16": ("adamw", {"state_dtype": "bf16"}),
    "adamw, 8bit": ("adamw", {"state_dtype": "8bit"}),
    "signsgd": ("signsgd", {}),
    "frugal, columns": ("frugal", {"subspace": "columns"}),
    "frugal, rows, 8bit": ("frugal", {"subspace": "rows", "state_dtype": "8bit"}),
}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (method, hyper-parameters), for every method."""
    found = {}
    for name in sorted(METHODS):
        for hyper in VARIANTS.get(name, ({},)):
            found[" ".join([name, *(f"{key}={value}" for key, value in hyper.items())])] = (name, hyper)
    return found


def galore_torch(split: Tensors, plain: Tensors) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW

    matrices = {"params": split, "rank": RANK, "update_proj_gap": NO_REFRESH, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([{"params": plain}, matrices], lr=1e-6, no_deprecation_warning=True)


def pytorch_optimizer(name: str, **hyper: Any) -> Callable[[Tensors, Tensors], torch.optim.Optimizer]:
    def make(split: Tensors, plain: Tensors) -> torch.optim.Optimizer:
        import pytorch_optimizer

        matrices = dict(params=split, rank=RANK, update_proj_gap=NO_REFRESH, scale=0.25, projection_type="std")
        return getattr(pytorch_optimizer, name)([{"params": plain}, matrices], lr=1e-6, **hyper)

    return make


# Label -> its maker from (matrices, other tensors), which raises ImportError where the package is missing.
PEERS: dict[str, Callable[[Tensors, Tensors], torch.optim.Optimizer]] = {
    "torch AdamW fused": lambda split, plain: torch.optim.AdamW(split + plain, lr=1e-6, fused=True),
    "galore-torch GaLoreAdamW": galore_torch,
    "pytorch-optimizer GaLore": pytorch_optimizer("GaLore"),
    "pytorch-optimizer Fira": pytorch_optimizer("Fira"),
    "pytorch-optimizer APOLLO": pytorch_optimizer("APOLLO", scale_type="channel"),
}


RULER = "torch AdamW foreach"


def ruler(split: Tensors, plain: Tensors) -> torch.optim.Optimizer:
    """torch's AdamW over lists of tensors, what torch takes by default on a GPU."""
    return torch.optim.AdamW(split + plain, lr=1e-6, foreach=True)


FLOOR = "floor of GaLore: products and fused Adam"


class GaLoreFloor(torch.optim.Optimizer):
    """What a step of GaLore does not go below: torch's calls for the two products and Adam, and nothing around them."""

    def __init__(self, split: Tensors, plain: Tensors):
        super().__init__(split + plain, {})
        self.matrices = [(p, torch.randn(min(p.shape), RANK, device=p.device) / min(p.shape) ** 0.5) for p in split]
        smalls = [down(p, basis) for p, basis in self.matrices]
        self.moments = [adam_state(t) for t in smalls]
        self.plain, self.plain_moments = plain, [adam_state(p) for p in plain]
        self.state.update(zip(split + plain, self.moments + self.plain_moments, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        fused_adam(self.plain, [p.grad for p in self.plain], self.plain_moments)
        for (p, basis), moments in zip(self.matrices, self.moments, strict=True):
            normalized = torch.zeros_like(moments["m"])
            assert p.grad is not None
            fused_adam([normalized], [down(p.grad, basis)], [moments])
            left, right = (normalized, basis.T) if p.shape[0] >= p.shape[1] else (basis, normalized)
            p.addmm_(left, right, alpha=-1e-6)


class MuonFloor(torch.optim.Optimizer):
    """What a step of Muon does not go below: its products in bf16, torch's fused Adam, and nothing around them."""

    def __init__(self, split: Tensors, plain: Tensors):
        super().__init__(split + plain, {})
        self.starts = [(p.detach() / p.detach().norm()).bfloat16() for p in split]
        self.plain, self.moments = plain, [adam_state(p) for p in plain]
        self.state.update(zip(plain, self.moments, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        fused_adam(self.plain, [p.grad for p in self.plain], self.moments)
        for start in self.starts:
            newton_schulz(start, [(3.4445, -4.7750, 2.0315)] * 5)


# Label -> the methods that it is the floor of, and its maker from (matrices, other tensors).
FLOORS: dict[str, tuple[tuple[str, ...], Callable[[Tensors, Tensors], torch.optim.Optimizer]]] = {
    FLOOR: (("galore",), GaLoreFloor),
    "floor of Muon: products and fused Adam": (("muon", "normuon"), MuonFloor),
    "floor of SCALE: fused SGD": (
        ("scale", "signsgd"),
        lambda split, plain: torch.optim.SGD(split + plain, lr=1e-6, fused=True),
    ),
}


def down(matrix: Tensor, basis: Tensor) -> Tensor:
    return (matrix @ basis if matrix.shape[0] >= matrix.shape[1] else basis.T @ matrix).detach()


def adam_state(like: Tensor) -> dict[str, Tensor]:
    zeros = {key: torch.zeros_like(like.detach()) for key in ("m", "v")}
    return {**zeros, "step": torch.zeros((), device=like.device)}


def fused_adam(weights: Tensors, grads: list, moments: list[dict[str, Tensor]]) -> None:
    """W <- W - 1e-6 N, as the other rows do it."""
    m, v, steps = ([one[key] for one in moments] for key in ("m", "v", "step"))
    hyper = dict(lr=1e-6, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adamw_(weights, grads, m, v, [], steps, **hyper)  # type: ignore[call-overload]


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the storages that the state keeps alive, 0-dim counters apart."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for t in tensors_in(state)
        if t.ndim
    }
    return sum(storages.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))
